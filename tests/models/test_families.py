"""Every family against diffusers itself: same weights, noise and captions give the same latents and images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from stock_pipelines import shared
from torch import Tensor

from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.sampling import ode_sample
from gdmd.export.pipeline import call_arguments, student_scheduler
from gdmd.models import vae
from gdmd.models.families.base import Family
from gdmd.models.loading import LazyTextEncoder, open_family
from gdmd.models.packing import in_patches, pack, unpack
from gdmd.models.roles import DiffusersRoles
from gdmd.models.timesteps import VpTimesteps
from gdmd.types import Cond, Prediction

STEPS = 4
UNIFORM = (1.0, 0.75, 0.5, 0.25)
CAPTIONS = list(tiny.WORDS[:2])
STOCK: dict[str, dict[str, Any]] = {  # what the stock call needs for classifier-free guidance 3
    "sd15": {"guidance_scale": 3.0},
    "sdxl": {"guidance_scale": 3.0},
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": 256},
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "guidance_scale": 3.5, "max_sequence_length": 256},
    "flux2": {"guidance_scale": 3.5, "max_sequence_length": 256},  # embedded, and there is no other
    "flux2_klein": {"guidance_scale": 3.0, "max_sequence_length": 256},
    "z_image": {"guidance_scale": 2.0, "max_sequence_length": 256},  # it counts from 0: cond + w (cond - uncond)
    "sana": {"guidance_scale": 3.0, "max_sequence_length": 256, "use_resolution_binning": False},
    "krea2": {"guidance_scale": 2.0, "max_sequence_length": 256},  # counts from 0, too
    "qwen_image21": {"true_cfg_scale": 3.0, "negative_prompt": ""},
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "], "max_sequence_length": 256},
}


def opened(folders: Path, name: str, **changes: Any) -> Family:
    return open_family(tiny.config(tiny.saved(folders, name), **changes))


def teacher(family: Family) -> Any:
    def denoiser(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return family.predict(family.net, x_t, t, cond)

    return denoiser


def stock(family: Family, noise: Tensor, kind: str) -> Tensor:
    height, width = (side * family.pixels_per_latent for side in noise.shape[-2:])
    size = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": kind}
    enter = {"flux": pack, "qwen_image": pack, "krea2": pack, "flux2": in_patches, "flux2_klein": in_patches}.get(
        family.name
    )
    latents = enter(noise) if enter else noise
    if family.name == "qwen_image21":  # one caption at a time: its images depend on the padding of a batch
        both = zip(CAPTIONS, noise.flatten(2).mT[:, None], strict=True)
        alone = [family.pipe(prompt=text, latents=one, **size, **STOCK[family.name]).images for text, one in both]
        rows = torch.cat(alone)
        return rows.mT.reshape(noise.shape) if kind == "latent" else vae.on_white(rows)
    made = family.pipe(prompt=list(CAPTIONS), latents=latents, **size, **STOCK[family.name]).images
    if kind == "latent" and family.name == "flux2_klein":
        return family.codec.from_vae(made)  # type: ignore[attr-defined, no-any-return]  # already made ready to decode
    return unpack(made, *noise.shape[-2:]) if kind == "latent" and enter else made


@pytest.mark.parametrize("name", tiny.BUILD)
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_teacher_sampling_equals_the_pipeline(folders: Path, name: str, size: tuple[int, int]) -> None:
    """At every image size: the network is that of the family as it was opened, at 32 x 32."""
    family = shared(tiny.saved(folders, name))
    at_size = family.at_size(*size)
    noise = torch.randn(2, *at_size.latent_shape)
    guidance = 1.0 if name == "flux2" else 3.0
    guided = Guided(teacher(family), guidance, family.encoder.null(2), family.guide)
    path = at_size.teacher_times(STEPS)
    ours = ode_sample(guided, noise, path, family.encoder.encode(CAPTIONS), family.schedule)
    torch.testing.assert_close(ours, stock(family, noise, "latent"), atol=1e-5, rtol=1e-5)
    images = family.codec.decode(ours).clamp(0, 1)
    torch.testing.assert_close(images, stock(family, noise, "pt"), atol=1e-5, rtol=1e-5)
    assert images.std() > 0.01


def test_krea2_reads_the_time_in_its_dtype(folders: Path) -> None:
    """Its pipeline rounds t to that dtype; in bf16 this moves t by up to two of 1000 training steps."""
    family = opened(folders, "krea2", dtype="bf16").at_size(32, 64)
    noise, null = torch.randn(2, *family.latent_shape), family.encoder.null(2)
    path, cond = family.teacher_times(STEPS), family.encoder.encode(CAPTIONS)
    ours = ode_sample(Guided(teacher(family), 3.0, null, family.guide), noise, path, cond, family.schedule)
    stocks = stock(family, noise.bfloat16(), "latent").float()
    assert (ours - stocks).norm() < 0.01 * stocks.norm()


@pytest.mark.parametrize("name", tiny.BUILD)
def test_full_copy_in_bf16_starts_as_the_teacher(folders: Path, name: str) -> None:
    """Autocast rounds a little less inside the blocks; time and embedded guidance are what the teacher reads."""
    roles = DiffusersRoles(opened(folders, name, dtype="bf16", full="fake"))
    x_t, t = torch.randn(6, *roles.family.latent_shape), torch.linspace(0.95, 0.05, 6)
    cond = roles.family.encoder.encode(CAPTIONS[:1] * 6)
    with torch.no_grad():
        teachers, copies = roles.teacher(x_t, t, cond).velocity, roles.fake(x_t, t, cond).velocity
    assert (copies - teachers).norm() < 0.01 * teachers.norm()


@pytest.mark.parametrize("name", ["flux", "flux2_klein", "krea2", "qwen_image", "z_image"])
def test_student_times_follow_the_size(folders: Path, name: str) -> None:
    """They are the times of the exported scheduler in the stock pipeline, called at the same size."""
    family, found = opened(folders, name), []
    family.pipe.scheduler = student_scheduler(family, UNIFORM)
    for height, width in ((32, 32), (64, 32)):
        given = call_arguments(family, UNIFORM) | {"height": height, "width": width, "output_type": "latent"}
        family.pipe(prompt=CAPTIONS[0], **given)
        found.append(family.at_size(height, width).student_times(UNIFORM))
        assert found[-1] == pytest.approx(family.pipe.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert (found[0] == found[1]) == (not family.settings.dynamic)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z_image"])
def test_prediction_is_fp32_and_depends_on_caption_and_time(folders: Path, name: str) -> None:
    family = opened(folders, name, dtype="bf16")
    denoiser, x_t = teacher(family), torch.randn(2, *family.latent_shape)
    cond, t = family.encoder.encode(CAPTIONS), torch.tensor([0.9, 0.9])
    answer = denoiser(x_t, t, cond)
    assert answer.x0.dtype == answer.eps.dtype == torch.float32
    assert answer.x0.isfinite().all()
    assert not torch.equal(answer.velocity, denoiser(x_t, t / 2, cond).velocity)
    assert not torch.equal(answer.velocity, denoiser(x_t, t, family.encoder.null(2)).velocity)


@pytest.mark.parametrize("name", tiny.BUILD)
def test_a_prediction_is_one_call_of_the_network_unless_it_is_row_by_row(folders: Path, name: str) -> None:
    family, calls = shared(tiny.saved(folders, name)), []
    hook = family.net.register_forward_pre_hook(lambda net, given: calls.append(given))
    teacher(family)(torch.randn(3, *family.latent_shape), torch.rand(3), family.encoder.null(3))
    hook.remove()
    assert len(calls) == (3 if family.row_by_row else 1)


@pytest.mark.parametrize("name", tiny.BUILD)
def test_conditioning_shapes_do_not_depend_on_the_caption(folders: Path, name: str) -> None:
    encoder = shared(tiny.saved(folders, name)).encoder
    short, long = encoder.encode(["a"]), encoder.encode(["a long caption of many words " * 2])
    null = encoder.null(3)
    assert all(short[key].shape == long[key].shape for key in short)
    assert all(null[key].shape == (3, *short[key].shape[1:]) for key in short)


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "qwen_image21"])
def test_decoding_in_chunks_equals_the_whole_batch(folders: Path, name: str) -> None:
    family = shared(tiny.saved(folders, name))
    latents = torch.randn(3, *family.latent_shape, requires_grad=True)
    one_by_one = family.codec.decode(latents)
    whole = type(family.codec)(family.pipe.vae, chunk=3)  # type: ignore[call-arg]
    assert torch.allclose(one_by_one, whole.decode(latents), atol=1e-5)
    (gradient,) = torch.autograd.grad(one_by_one.sum(), latents)
    assert gradient.abs().amin((1, 2, 3)).gt(0).any() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["sdxl", "flux2"])
def test_tiled_decoding_is_checkpointed(folders: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 pixels here; at the VAE's own tile size the image would not be split."""
    monkeypatch.setattr(vae, "TILE", 16)
    whole, tiled = opened(folders, name), opened(folders, name, decode_tiled=True)
    calls: list[torch.Size] = []
    tiled.pipe.vae.decoder.conv_in.register_forward_hook(lambda layer, given, answer: calls.append(answer.shape[-2:]))
    latents = torch.randn(1, *whole.latent_shape, requires_grad=True)
    images = tiled.codec.decode(latents)
    assert images.shape == whole.codec.decode(latents).shape
    assert max(max(side) for side in calls) == 8 and len(calls) == 9, (
        "3 x 3 tiles, each begins 12 pixels after the last"
    )
    (gradient,) = torch.autograd.grad(images.square().sum(), latents)
    assert len(calls) == 18, "computed again, tile by tile"
    del tiled.pipe.vae.decoder.forward
    (kept,) = torch.autograd.grad(tiled.codec.decode(latents).square().sum(), latents)
    assert len(calls) == 27 and torch.allclose(gradient, kept, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "qwen_image21", "flux2", "sana"])
def test_encoding_inverts_the_scaling(folders: Path, name: str) -> None:
    codec = shared(tiny.saved(folders, name)).codec
    images = torch.rand(1, 3, tiny.SIZE, tiny.SIZE)
    latents = codec.encode(images)
    z = codec.to_vae(latents)  # type: ignore[attr-defined]
    frames = 2 * images - 1
    assert torch.allclose(z, codec.encode_chunk(frames), atol=1e-5)  # type: ignore[attr-defined]


def test_packing_has_an_inverse() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert pack(x).shape == (2, 6, 12)
    assert torch.equal(unpack(pack(x), 4, 6), x)


def test_student_times_of_one_training_step_are_an_error() -> None:
    assert len(VpTimesteps().student([k / 1000 for k in range(1000, 0, -1)])) == 1000
    with pytest.raises(ValueError, match=r"student_steps \[1, 0.9999, 0.5\] are the training steps \[999, 999, 499\]"):
        VpTimesteps().student([1, 0.9999, 0.5])


def test_student_times_are_shifted_or_training_steps(folders: Path) -> None:
    assert shared(tiny.saved(folders, "sd3")).student_times(UNIFORM) == pytest.approx((1, 0.9, 0.75, 0.5))
    discrete = [999 * t for t in shared(tiny.saved(folders, "sdxl")).student_times(UNIFORM)]
    assert discrete == pytest.approx([999, 749, 499, 249])


def test_sd3_without_t5_reads_zeros_in_its_place(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(tiny.saved(folders, "sd3"), folder)
    shutil.rmtree(folder / "text_encoder_3")
    for family in (opened(folders, "sd3", t5=False), open_family(tiny.config(folder))):
        assert family.pipe.text_encoder_3 is None
        embeds = family.encoder.encode(CAPTIONS)["embeds"]
        assert embeds.shape == (2, 77 + 256, 32) and not embeds[:, 77:].any()


def test_unload_keeps_the_unconditional_input(folders: Path) -> None:
    encoder = opened(folders, "sdxl").encoder
    before = encoder.null(2)
    encoder.unload()
    assert encoder.pipe.text_encoder is None and encoder.pipe.text_encoder_2 is None
    assert all(torch.equal(before[key], value) for key, value in encoder.null(2).items())


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux2", "qwen_image21", "krea2"])
def test_lazy_text_encoder_gives_the_same_embeddings(folders: Path, name: str) -> None:
    at_once, late = opened(folders, name), open_family(tiny.config(folders / name), encoders=False)
    assert late.pipe.text_encoder is None
    text = LazyTextEncoder(late)
    text.unload()
    assert late.pipe.text_encoder is None
    for wanted, found in (
        (at_once.encoder.encode(CAPTIONS), text.encode(CAPTIONS)),
        (at_once.encoder.null(1), text.null(1)),
    ):
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert not any(weights.requires_grad for weights in late.pipe.text_encoder.parameters())
    text.unload()
    assert late.pipe.text_encoder is None


def test_wrong_size_suggests_a_valid_one(folders: Path) -> None:
    folder = tiny.saved(folders, "flux")
    config = tiny.config(folder, height=40)  # 40 / 2 = 20 latents: even; the real VAE's factor 8 would refuse
    assert open_family(config).latent_shape == (4, 20, 16)
    family = opened(folders, "flux")
    family.pipe.vae_scale_factor = 8
    family.cfg = tiny.config(folder, height=40)
    with pytest.raises(ValueError, match=r"model.height = 40.*multiples of 16.*use 32"):
        _ = family.latent_shape
