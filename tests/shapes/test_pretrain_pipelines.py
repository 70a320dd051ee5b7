"""``gdmd pretrain pipeline``: what it trains is a diffusers pipeline that reads every Shapes caption word by word."""

import copy
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from gdmd.config.shapes_pipeline import MARKER
from gdmd.programs.pretrain import pretrain
from gdmd.runs.assets import load_asset, save_asset
from gdmd.shapes.grammar import catalog
from gdmd.shapes.pretrain.miniatures import CLIP_TOKENS, MINIATURES, QWEN_TOKENS, build_miniature
from gdmd.shapes.pretrain.networks import draw_batch, fit
from gdmd.shapes.pretrain.pipelines import denoiser_job, family_of, kl_vae_job, set_vae

FAMILIES = tuple(MINIATURES)
CAPTIONS = [caption.text for caption in catalog().captions]


@pytest.fixture(scope="module")
def pipes():
    return {family: build_miniature(family, 0) for family in FAMILIES}


def test_clip_reads_one_token_per_word(pipes) -> None:
    words = pipes["sdxl"].tokenizer
    for text in CAPTIONS:
        ids = words(text)["input_ids"]
        assert len(ids) == len(text.split()) + 2 <= CLIP_TOKENS, text
        assert words.decode(ids, skip_special_tokens=True).strip() == text


def test_qwen_reads_whole_captions(pipes) -> None:
    words = pipes["flux2_klein"].tokenizer
    for text in CAPTIONS:
        chat = words.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = words(chat)["input_ids"]
        assert len(ids) == len(text.split()) + 2 <= QWEN_TOKENS, text


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_have_different_embeddings(pipes, family: str) -> None:
    """This includes captions that differ only in the order of their words."""
    pair = ["a red circle and a blue square", "a blue circle and a red square"]
    embeds = family_of(pipes[family]).encoder.encode(pair)["embeds"]
    assert (embeds[0] - embeds[1]).square().mean() > 0.1


def test_vae_is_rescaled_and_decodes_as_before() -> None:
    job = kl_vae_job(steps=1, seed=0, batch=4)
    before = copy.deepcopy(job.module)
    job.finish()
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        old, new = before.encode(images).latent_dist, job.module.encode(images).latent_dist
        torch.testing.assert_close(job.module.decode(new.mean).sample, before.decode(old.mean).sample)
    scale = new.std / old.std
    torch.testing.assert_close(new.mean, old.mean * scale)  # the posterior is the same one, rescaled
    torch.testing.assert_close(scale.amin((0, 2, 3)), scale.amax((0, 2, 3)))


def test_denoiser_resumes_bit_exactly(tmp_path: Path) -> None:
    def job():
        return denoiser_job(build_miniature("sdxl", 0), 3, 0, batch=2)

    straight, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    losses = [loss for _, loss in fit(job(), straight, save_every=1)]
    list(islice(fit(job(), broken, save_every=1), 2))
    assert [step for step, _ in fit(job(), broken, resume=True, save_every=1)] == [1, 2]
    resumed = load_asset(broken).tensors
    assert all(torch.isfinite(loss) for loss in losses)
    assert all(torch.equal(value, resumed[name]) for name, value in load_asset(straight).tensors.items())


def test_flux2_batch_norm_describes_the_latents() -> None:
    pipe = build_miniature("flux2_klein", 0)
    set_vae(pipe, build_miniature("sdxl", 1).vae.state_dict(), seed=0)
    latents = family_of(pipe).codec.encode(draw_batch(5, 0, 256)[0])
    assert latents.mean((0, 2, 3)).abs().max() < 0.15 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_folder(family: str, tmp_path: Path) -> None:
    """The folder loads with diffusers alone and draws an image; its marker says how it was trained."""
    vae = build_miniature("sdxl", 1).vae
    save_asset(tmp_path / "shapes_kl_vae.safetensors", vae.state_dict(), command="test", seed=1)
    *_, folder = pretrain("pipeline", 2, 7, tmp_path, False, [], family, Console(quiet=True))
    facts = json.loads((folder / MARKER).read_text())
    assert facts["command"] == f"gdmd pretrain pipeline {family} --steps 2 --seed 7"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 3e6
    without = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **without)
    pipe.set_progress_bar_config(disable=True)
    limit = {"max_sequence_length": facts["max_tokens"]} if facts["max_tokens"] else {}
    image = pipe(prompt="a red circle", num_inference_steps=2, height=32, width=32, **limit).images[0]
    assert image.size == (32, 32)


def test_unknown_family_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'sd35'; name sd3, sdxl or flux2_klein"):
        list(pretrain("pipeline", None, None, tmp_path, False, [], "sd35", Console(quiet=True)))


def test_resume_trains_again_for_another_vae(tmp_path: Path) -> None:
    """A finished denoiser is reused, but not with a VAE that it was not trained with."""

    def denoiser(seed: int) -> dict[str, torch.Tensor]:
        vae = build_miniature("sdxl", seed).vae.state_dict()
        save_asset(tmp_path / "shapes_kl_vae.safetensors", vae, command="test", seed=seed)
        list(pretrain("pipeline", 1, 7, tmp_path, True, [], "sdxl", Console(quiet=True)))
        return load_asset(tmp_path / "shapes_sdxl.safetensors").tensors

    first, same, other = denoiser(1), denoiser(1), denoiser(2)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
