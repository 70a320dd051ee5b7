"""Features of FLUX.2 only, each against diffusers' own code."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import tiny_pipelines as tiny
from diffusers.pipelines.flux2 import pipeline_flux2, pipeline_flux2_klein
from torch import nn

from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.sampling import ode_sample
from gdmd.models.families.base import Family
from gdmd.models.families.flux2 import empirical_mu
from gdmd.models.loading import open_family
from gdmd.models.packing import in_patches, pack
from gdmd.models.roles import DiffusersRoles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux2_klein", tmp_path_factory.mktemp("pipelines") / "flux2_klein")


@pytest.fixture
def klein(folder: Path) -> Family:
    """On images that are not square."""
    return open_family(tiny.config(folder, height=32, width=48))


def teachers_latents(family: Family, steps: int, guidance: float, noise: torch.Tensor) -> torch.Tensor:
    guided = Guided(lambda *at: family.predict(family.net, *at), guidance, family.encoder.null(1))
    captions = family.encoder.encode(tiny.WORDS[:1])
    return ode_sample(guided, noise, family.teacher_times(steps), captions, family.schedule)


def stock_latents(family: Family, steps: int, guidance: float, noise: torch.Tensor) -> torch.Tensor:
    size = {"height": 32, "width": 48, "max_sequence_length": 256, "output_type": "latent"}
    given = {"num_inference_steps": steps, "guidance_scale": guidance, "latents": in_patches(noise)}
    z = family.pipe(prompt=[tiny.WORDS[0]], **given, **size).images
    return family.codec.from_vae(z)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("tokens", [64, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
def test_shift_equals_the_pipelines(tokens: int, steps: int) -> None:
    for pipeline in (pipeline_flux2, pipeline_flux2_klein):
        assert empirical_mu(tokens, steps) == pytest.approx(pipeline.compute_empirical_mu(tokens, steps), rel=1e-6)


@pytest.mark.parametrize(("steps", "guidance"), [(2, 1.0), (7, 5.0)])
def test_sampling_at_other_steps_and_shapes(klein: Family, steps: int, guidance: float) -> None:
    noise = torch.randn(1, *klein.latent_shape)
    wanted = stock_latents(klein, steps, guidance, noise)
    assert torch.allclose(teachers_latents(klein, steps, guidance, noise), wanted, atol=1e-4)


def test_distilled_klein_has_no_guidance(klein: Family) -> None:
    klein.pipe.register_to_config(is_distilled=True)
    noise = torch.randn(1, *klein.latent_shape)
    wanted = stock_latents(klein, 2, 5.0, noise)
    assert torch.allclose(teachers_latents(klein, 2, 1.0, noise), wanted, atol=1e-4)


def test_student_times_depend_on_the_number_of_steps(klein: Family) -> None:
    four, two = klein.student_times((1.0, 0.75, 0.5, 0.25)), klein.student_times((1.0, 0.5))
    assert four[2] != two[1] and four[2] == pytest.approx(float(klein.teacher_times(4)[2]))


def test_encoding_equals_the_pipelines(klein: Family) -> None:
    codec: Any = klein.codec
    images = torch.rand(2, 3, 32, 48)
    latents = codec.encode(images)
    assert latents.shape[1:] == klein.latent_shape
    wanted = klein.pipe._encode_vae_image(2 * images - 1, None)
    assert torch.allclose(in_patches(latents), wanted, atol=1e-5)
    assert torch.allclose(codec.from_vae(codec.to_vae(latents)), latents, atol=1e-5)


def test_patches_are_the_packed_tokens() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(in_patches(x).flatten(2).transpose(1, 2), pack(x))
    assert torch.equal(in_patches(x), diffusers.Flux2Pipeline._patchify_latents(x))


def test_every_linear_layer_gets_an_adapter(klein: Family) -> None:
    linear = {name for name, layer in klein.net.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name}
    worn = {name.split(".lora_")[0] for name in DiffusersRoles(klein).parameters("student")}
    assert worn == linear and "single_transformer_blocks.1.attn.to_out" in worn


def test_missing_library_of_the_processor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "dev")
    index = tmp_path / "dev" / "model_index.json"
    given = json.loads(index.read_text())
    index.write_text(json.dumps(given | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else there(name))
    with pytest.raises(
        ValueError, match=r"'tokenizer' \(PixtralProcessor\) needs torchvision: .*pip install torchvision"
    ):
        open_family(tiny.config(tmp_path / "dev"))

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("it requires the SentencePiece library")

    monkeypatch.setattr(diffusers.Flux2KleinPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="cannot be loaded: it requires the SentencePiece library"):
        open_family(tiny.config(folder))
