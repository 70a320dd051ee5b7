"""A base model's scheduler, guidance and VAE settings are used or rejected: in training, plan and export."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import tiny_pipelines as tiny
from stock_pipelines import CAPTIONS, UNIFORM, dmd_recipe, stock_images, trainers_images
from torch import Tensor

from gdmd.config.image_source import read_source
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.sampling import ode_sample
from gdmd.diffusion.schedule import VpSchedule
from gdmd.export.pipeline import call_arguments, student_scheduler
from gdmd.methods.base import FakeBatch
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.packing import pack, unpack
from gdmd.models.roles import DiffusersRoles
from gdmd.models.schedulers import read_flow, read_vp
from gdmd.models.scoring_decoder import check_tiny
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.networks import networks_of
from gdmd.recipes.build import build
from gdmd.sources.open import open_source
from gdmd.types import Cond, Prediction, StudentSampler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
TRAILING = BETAS | {"timestep_spacing": "trailing", "set_alpha_to_one": False}
V = TRAILING | {"prediction_type": "v_prediction"}
SOLVERS = ("DPMSolverMultistepScheduler", "SASolverScheduler")


def both(folder: Path, **changes: Any) -> list[Family]:
    """As opened by training, and by a plan."""
    config = tiny.config(folder, **changes)
    return [open_family(config), meta_family(config).family]


def refused(folder: Path, message: str, **changes: Any) -> None:
    for opening in (open_family, meta_family):
        with pytest.raises(ValueError, match=message):
            opening(tiny.config(folder, **changes))


def teachers(family: Family, noise: Tensor, steps: int, guidance: float) -> Tensor:
    def denoiser(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return family.predict(family.net, x_t, t, cond)

    guided = Guided(denoiser, guidance, family.encoder.null(2), family.guide)
    return ode_sample(guided, noise, family.teacher_times(steps), family.encoder.encode(CAPTIONS), family.schedule)


def stocks(family: Family, noise: Tensor, steps: int, **arguments: Any) -> Tensor:
    given = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": steps, "output_type": "latent"}
    latents: Tensor = family.pipe(prompt=list(CAPTIONS), latents=noise, **given, **arguments).images
    return latents


def same(found: Tensor, wanted: Tensor) -> bool:
    """To 1e-5 of the largest: a small alpha at t = 1 makes latents large."""
    return bool((found - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1))


# ---------------------------------------------------------------- flow models


@pytest.mark.parametrize("kind", SOLVERS)
def test_flow_shift_of_solvers_is_read(saved: Callable[..., Path], kind: str) -> None:
    for family in both(saved("sd3", getattr(diffusers, kind)(**FLOW))):
        assert family.student_times(UNIFORM) == pytest.approx((1, 0.9, 0.75, 0.5))
        stock = student_scheduler(family, UNIFORM)
        stock.set_timesteps(sigmas=call_arguments(family, UNIFORM)["sigmas"])
        assert stock.sigmas[:-1].tolist() == pytest.approx((1, 0.9, 0.75, 0.5)) and stock.config.stochastic_sampling
    euler = open_family(tiny.config(saved("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), called="euler")))
    torch.testing.assert_close(family.teacher_times(5), euler.teacher_times(5))


def test_leftover_keys_of_another_class_are_ignored(saved: Callable[..., Path]) -> None:
    """A config keeps the keys of the class that it was made from; the class that uses it does not read them."""
    solver = diffusers.DPMSolverMultistepScheduler(**FLOW | {"flow_shift": 5.0})
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(solver.config, shift=2.0)
    assert euler.config.flow_shift == 5.0
    (family, _) = both(saved("sana", euler))
    assert family.student_times((0.5,)) == pytest.approx((2 / 3,))
    assert "flow_shift" not in student_scheduler(family, UNIFORM).config


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd3", diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        ("z_image", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500)),
        ("flux2_klein", diffusers.UniPCMultistepScheduler(**FLOW)),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_shift_of_other_flow_schedulers_is_read(saved: Callable[..., Path], name: str, scheduler: Any) -> None:
    for family in both(saved(name, scheduler)):
        assert family.student_times(UNIFORM) == pytest.approx((1, 0.9, 0.75, 0.5))


@pytest.mark.parametrize(
    ("size", "shape", "terminal"),
    [
        ({"height": 32, "width": 32}, "exponential", 0.05),
        ({"height": 24, "width": 16}, "exponential", None),
        ({"height": 24, "width": 16}, "linear", 0.05),
    ],
)
def test_dynamic_shifting_equals_the_pipeline(
    saved: Callable[..., Path], size: dict[str, int], shape: Any, terminal: float | None
) -> None:
    own = {"base_shift": 0.7, "max_shift": 2.1, "base_image_seq_len": 20, "max_image_seq_len": 300}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=shape, shift_terminal=terminal, **own
    )
    family = open_family(tiny.config(saved("qwen_image", scheduler), **size))
    given = {"num_inference_steps": 5, "output_type": "latent", "max_sequence_length": 64} | size
    family.pipe(prompt=["a"], **given)
    torch.testing.assert_close(family.teacher_times(5), family.pipe.scheduler.sigmas)
    stock = student_scheduler(family, UNIFORM)
    mu = 0.7 + (size["height"] * size["width"] / 16 - 20) * 1.4 / 280
    stock.set_timesteps(sigmas=list(UNIFORM), mu=mu)
    assert stock.sigmas[:-1].tolist() == pytest.approx(family.student_times(UNIFORM))


@pytest.mark.parametrize(
    ("name", "index", "scheduler", "given"),
    [
        ("krea2", {"is_distilled": True}, None, {"guidance_scale": 0.0}),
        (
            "qwen_image21",
            {"sample_sigmas": [1.0, 0.95, 0.7, 0.4]},
            diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
            {},
        ),
    ],
)
def test_distilled_checkpoints_have_separate_times(
    saved: Callable[..., Path], name: str, index: dict[str, Any], scheduler: Any, given: dict[str, float]
) -> None:
    base = open_family(tiny.config(saved(name, called="undistilled")))
    opened, meta = both(saved(name, scheduler, {"index": index}))
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": 4, "output_type": "latent"}
    opened.pipe(prompt=["a"], **size, **given)
    torch.testing.assert_close(opened.teacher_times(4), opened.pipe.scheduler.sigmas)
    assert torch.equal(meta.teacher_times(4), opened.teacher_times(4))
    assert not torch.allclose(base.teacher_times(4), opened.teacher_times(4), atol=1e-2)


def test_krea2_with_a_scheduler_without_the_size_of_its_shift(saved: Callable[..., Path]) -> None:
    """mu grows up to 6400 image tokens, the default of its pipeline; the others' is 4096."""
    (family, _) = both(saved("krea2", diffusers.UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True)))
    family.pipe(prompt=["a"], height=64, width=32, num_inference_steps=4, output_type="latent", guidance_scale=0.0)
    wanted = family.pipe.scheduler.sigmas[:-1]
    torch.testing.assert_close(family.at_size(64, 32).teacher_times(4)[:-1], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["z_image", "sana", "krea2"])
def test_other_number_of_training_steps(saved: Callable[..., Path], name: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500)
    family = open_family(tiny.config(saved(name, scheduler)))
    noise, extra = torch.randn(2, *family.latent_shape), {"sana": {"use_resolution_binning": False}}.get(name, {})
    guidance = {"guidance_scale": 0.0 if name != "sana" else 1.0, "max_sequence_length": 256}
    stock = stocks(family, pack(noise) if name == "krea2" else noise, 4, **guidance, **extra)
    stock = unpack(stock, *noise.shape[-2:]) if name == "krea2" else stock
    torch.testing.assert_close(teachers(family, noise, 4, 1.0), stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scheduler", "message"),
    [
        ("sd3", diffusers.EulerDiscreteScheduler(), r"flow model.*EulerDiscreteScheduler.*models with a beta schedule"),
        ("z_image", diffusers.DDIMScheduler(**BETAS), r"flow model.*DDIMScheduler.*models with a beta schedule"),
        ("flux", diffusers.DPMSolverMultistepScheduler(), r"flow model.*with use_flow_sigmas = true"),
        ("sd3", diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type = 'epsilon'"),
        ("sd3", diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas = False"),
        ("sd3", diffusers.EDMEulerScheduler(), "flow model.*EDM models"),
        ("sd3", diffusers.LTXEulerAncestralRFScheduler(), "not supported by gdmd"),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas = True"),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True), "use_exponential_sigmas"),
        ("flux", diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas = True"),
        ("sd3", diffusers.FlowMatchLCMScheduler(scale_factors=[0.5, 1.0]), "scale_factors"),
        ("sana", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "SanaPipeline does not support"),
        (
            "flux",
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=256),
            "max_image_seq_len = 256; the second must be larger",
        ),
    ],
)
def test_unsupported_flow_schedulers(saved: Callable[..., Path], name: str, scheduler: Any, message: str) -> None:
    refused(saved(name, scheduler), message)


# ---------------------------------------------------------------- scheduler files as published

SD = BETAS | {"num_train_timesteps": 1000, "trained_betas": None, "set_alpha_to_one": False, "skip_prk_steps": True}
SDXL = SD | {
    **{"prediction_type": "epsilon", "interpolation_type": "linear", "sample_max_value": 1.0, "steps_offset": 1},
    **{"timestep_spacing": "leading", "use_karras_sigmas": False, "sigma_min": None, "sigma_max": None},
    **{
        "final_sigmas_type": "zero",
        "timestep_type": "discrete",
        "use_beta_sigmas": False,
        "_diffusers_version": "0.35.1",
    },
}
SHIFTS = {
    **{
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "invert_sigmas": False,
    },
    **{"num_train_timesteps": 1000, "shift": 3.0, "shift_terminal": None, "stochastic_sampling": False},
    **{"time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True},
    **{"use_exponential_sigmas": False, "use_karras_sigmas": False, "_diffusers_version": "0.36.0.dev0"},
}
SOLVED = {
    **{"algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": False},
    **{"lambda_min_clipped": -math.inf, "lower_order_final": True, "sample_max_value": 1.0, "solver_order": 2},
    **{"solver_type": "midpoint", "thresholding": False, "trained_betas": None, "use_lu_lambdas": False},
    **{"variance_type": None, "use_exponential_sigmas": False, "rescale_betas_zero_snr": False, "steps_offset": 0},
}
EULER_FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("kind", "config", "predicts"),
    [
        ("PNDMScheduler", SD | {"_diffusers_version": "0.6.0", "steps_offset": 1}, "eps"),  # SD1.5
        ("DDIMScheduler", SD | {"prediction_type": "v_prediction", "steps_offset": 1}, "v"),  # SD2.1
        ("EulerDiscreteScheduler", SDXL, "eps"),  # SDXL base
        ("EulerAncestralDiscreteScheduler", SDXL, "eps"),
        ("EulerDiscreteScheduler", SDXL | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v"),
        ("DPMSolverMultistepScheduler", SDXL | SOLVED | {"use_karras_sigmas": True}, "eps"),
        (
            "UniPCMultistepScheduler",
            SDXL | {"disable_corrector": [], "solver_type": "bh2", "use_flow_sigmas": False},
            "eps",
        ),
        (
            "DDPMScheduler",
            SD | {"variance_type": "fixed_small", "clip_sample_range": 1.0, "thresholding": False},
            "eps",
        ),
        ("KDPM2AncestralDiscreteScheduler", SDXL, "eps"),
        ("HeunDiscreteScheduler", SDXL | {"use_karras_sigmas": True}, "eps"),
    ],
)
def test_published_unet_schedulers(kind: str, config: dict[str, Any], predicts: str) -> None:
    found = read_vp(getattr(diffusers, kind).from_config(config), "model.path 'x'")
    assert found.predicts == predicts
    assert found.schedule == VpSchedule(zero_snr=bool(config.get("rescale_betas_zero_snr")))


@pytest.mark.parametrize(
    ("kind", "config", "shift", "dynamic"),
    [
        (EULER_FLOW, {"num_train_timesteps": 1000, "shift": 3.0}, 3.0, None),  # SD3 medium
        (EULER_FLOW, SHIFTS | {"use_dynamic_shifting": False}, 3.0, None),  # SD3.5
        (EULER_FLOW, SHIFTS, 3.0, (0.5, 1.15, 4096, None)),  # FLUX.1-dev, FLUX.2, klein
        (EULER_FLOW, SHIFTS | {"use_dynamic_shifting": False, "shift": 1.0}, 1.0, None),  # FLUX.1-schnell
        (EULER_FLOW, {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 3.0}, 3.0, None),  # Z-Image
        (
            EULER_FLOW,  # Qwen-Image
            SHIFTS | {"max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02},
            1.0,
            (0.5, 0.9, 8192, 0.02),
        ),
        (
            "DPMSolverMultistepScheduler",
            SOLVED | FLOW | {"beta_end": 0.02, "use_karras_sigmas": False},
            3.0,
            None,
        ),  # Sana
        (EULER_FLOW, SDXL | {"shift": 3.0, "use_flow_sigmas": False, "flow_shift": 9.0}, 3.0, None),  # keys of others
    ],
)
def test_published_flow_schedulers(
    kind: str, config: dict[str, Any], shift: float, dynamic: tuple[Any, ...] | None
) -> None:
    found = read_flow(getattr(diffusers, kind).from_config(config), "model.path 'x'")
    assert (found.shift, found.dynamic, found.train_steps) == (shift, dynamic is not None, 1000)
    if dynamic is not None:
        assert (found.base_shift, found.max_shift, found.max_tokens, found.terminal) == dynamic


# ---------------------------------------------------------------- UNets with a beta schedule

UNETS = {
    "v": V,
    "v, zero SNR": V | {"rescale_betas_zero_snr": True},
    "x0": TRAILING | {"prediction_type": "sample"},
    "500 steps, linear betas": TRAILING | {"num_train_timesteps": 500, "beta_schedule": "linear"},
    "cosine betas": TRAILING | {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
    "trained betas": V | {"trained_betas": [0.001 + 0.0004 * k for k in range(60)], "num_train_timesteps": 60},
    "leading with an offset": BETAS | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "ends on clean data": BETAS | {"timestep_spacing": "leading", "steps_offset": 1},
    "v, leading": BETAS | {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1},
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("sdxl", kind) for kind in UNETS), ("sd15", "v"), ("sd15", "ends on clean data")]
)
def test_unet_teacher_equals_the_pipeline(saved: Callable[..., Path], name: str, kind: str) -> None:
    family = open_family(tiny.config(saved(name, diffusers.DDIMScheduler(**UNETS[kind]))))
    noise = torch.randn(2, *family.latent_shape)
    found, wanted = teachers(family, noise, 5, 3.0), stocks(family, noise, 5, guidance_scale=3.0)
    assert same(found, wanted)


@pytest.mark.parametrize("kind", ["v, zero SNR", "x0"])
def test_rescaled_guidance_equals_the_pipeline(saved: Callable[..., Path], kind: str) -> None:
    folder = saved("sdxl", diffusers.DDIMScheduler(**UNETS[kind]))
    family = open_family(tiny.config(folder, guidance_rescale=0.7))
    noise = torch.randn(2, *family.latent_shape)
    wanted = stocks(family, noise, 5, guidance_scale=3.0, guidance_rescale=0.7)
    assert same(teachers(family, noise, 5, 3.0), wanted)
    assert not same(wanted, stocks(family, noise, 5, guidance_scale=3.0))
    source: Any = open_source(read_source(f"{folder},dtype=fp32,device=cpu,guidance_rescale=0.7"))
    assert source.arguments["guidance_rescale"] == 0.7


def test_rescaled_guidance_needs_a_unet(saved: Callable[..., Path]) -> None:
    folder = saved("sd3")
    refused(folder, "guidance_rescale = 0.7: a StableDiffusion3Pipeline does not use it", guidance_rescale=0.7)
    with pytest.raises(ValueError, match="guidance_rescale is set, but a StableDiffusion3Pipeline does not read it"):
        open_source(read_source(f"{folder},dtype=fp32,device=cpu,guidance_rescale=0.7"))


@pytest.mark.parametrize("kind", ["v, zero SNR", "x0", "500 steps, linear betas", "trained betas"])
@pytest.mark.parametrize(("sampler", "uniform"), [("renoise", UNIFORM), ("ode", UNIFORM), ("ode", (1.0, 0.9, 0.334))])
def test_exported_unet_draws_the_images_of_training(
    saved: Callable[..., Path],
    kind: str,
    sampler: StudentSampler,
    uniform: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles = DiffusersRoles(open_family(tiny.config(saved("sdxl", diffusers.DDIMScheduler(**UNETS[kind])))))
    with torch.no_grad():
        for weights in roles.parameters("student").values():
            weights.add_(0.2 * torch.randn_like(weights))
    noises = [torch.randn(2, *roles.family.latent_shape) for _ in uniform]
    wanted, pipe = trainers_images(roles, noises, sampler=sampler, uniform=uniform), roles.family.pipe
    roles.backbone.set_adapter(roles.student.net.adapter)  # type: ignore[union-attr]
    pipe.scheduler = student_scheduler(roles.family, uniform, sampler)
    found = stock_images(pipe, roles, noises, monkeypatch, uniform=uniform)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if sampler == "ode" else 1e-5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "model with a beta schedule.*flow models"),
        (diffusers.UniPCMultistepScheduler(**FLOW), "model with a beta schedule.*flow models"),
        (diffusers.EDMEulerScheduler(), "EDM model.*EDMEulerScheduler.*not supported"),
        (diffusers.EDMDPMSolverMultistepScheduler(), "EDM model.*not supported"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "EDM model"),
        (diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True), "pure noise.*Models with zero terminal SNR"),
        (diffusers.DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule = 'sigmoid'"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "variance_type = 'learned_range'"),
        (diffusers.DDIMScheduler(**BETAS, num_train_timesteps=9, trained_betas=[0.1, 0.2]), "one beta for each"),
        (diffusers.IPNDMScheduler(), "not supported by gdmd"),
        (
            diffusers.DDIMScheduler(timestep_spacing="quad"),
            "timestep_spacing = 'quad'; supported are trailing, leading",
        ),
        (
            diffusers.DDIMScheduler(beta_end=1.5, beta_schedule="linear"),
            "betas from 0.0001 to 1.5; they must be between",
        ),
    ],
)
def test_unsupported_unet_schedulers(saved: Callable[..., Path], scheduler: Any, message: str) -> None:
    refused(saved("sdxl", scheduler), message)


@pytest.mark.parametrize("kind", ["v", "v, zero SNR", "x0"])
def test_fake_loss_is_in_the_networks_prediction(saved: Callable[..., Path], kind: str) -> None:
    folder = saved("sdxl", diffusers.DDIMScheduler(**UNETS[kind]))
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    components = build(dmd_recipe(folder, prompts), "cpu")
    x0, eps = torch.randn(2, 2, *components.latent_shape)
    t, cond, schedule = torch.tensor([0.3, 1.0]), components.encoder.encode(CAPTIONS), components.roles.schedule
    alpha, sigma = (value[:, None, None, None] for value in (schedule.alpha(t), schedule.sigma(t)))
    batch = FakeBatch(x0, alpha * x0 + sigma * eps, t, eps, cond)
    answer = components.roles.family.call(components.roles.family.net, batch.x_t, t, cond)
    wanted = (answer - (x0 if kind == "x0" else alpha * eps - sigma * x0)).square().flatten(1).mean(1)
    method: Any = components.method
    torch.testing.assert_close(method.fake_loss(batch).per_sample, wanted, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the VAE's own scale, and sizes

OWN_SCALE = {"latents_mean": [-1.6, 1.2, 0.9, -0.3], "latents_std": [8.4, 5.9, 5.6, 4.7], "scaling_factor": 0.5}


def test_sdxl_vae_with_mean_and_std(saved: Callable[..., Path]) -> None:
    family = open_family(tiny.config(saved("sdxl", parts={"vae": OWN_SCALE})))
    noise = torch.randn(2, *family.latent_shape)
    images = family.codec.decode(teachers(family, noise, 2, 1.0)).clamp(0, 1)
    given = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": 2, "guidance_scale": 1.0}
    wanted = family.pipe(prompt=list(CAPTIONS), latents=noise, output_type="pt", **given).images
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="its own latents_mean and latents_std"):
        check_tiny(family, diffusers.AutoencoderTiny(latent_channels=4))


@pytest.mark.parametrize(("name", "vae"), [("sd15", OWN_SCALE), ("sd3", OWN_SCALE), ("sdxl", {"shift_factor": 0.1})])
def test_vae_scaling_that_the_pipeline_ignores(saved: Callable[..., Path], name: str, vae: dict[str, Any]) -> None:
    refused(saved(name, parts={"vae": vae}), "its VAE has (latents_mean|shift_factor) = .* does not read")


@pytest.mark.parametrize(("name", "largest"), [("sd3", 64), ("z_image", 256)])
def test_size_beyond_the_position_table(saved: Callable[..., Path], name: str, largest: int) -> None:
    folder = saved(name)
    refused(folder, f"model.width = {largest + 8}: the network has positions for {largest} pixels", width=largest + 8)
    assert both(folder, width=largest)[0].latent_shape[2] == largest // 2
    with pytest.raises(ValueError, match=f"height = {largest + 8}: the network has positions for {largest} pixels"):
        open_source(read_source(f"{folder},dtype=fp32,device=cpu,height={largest + 8}"))


def test_more_caption_tokens_than_positions(saved: Callable[..., Path]) -> None:
    refused(saved("z_image"), "max_tokens = 1010: the transformer has positions for 992", max_tokens=1010)


# ---------------------------------------------------------------- other UNets


def test_lcm_unet_reads_the_embedded_guidance(folders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = tiny.sd15()
    pipe.register_modules(unet=tiny.unet(16, time_cond_proj_dim=9), scheduler=diffusers.DDIMScheduler(**TRAILING))
    pipe.save_pretrained(tmp_path / "lcm-like")
    (prompts := tmp_path / "prompts.txt").write_text("a red cube")
    found = {}
    for embedded in (2.0, 7.5):
        family = open_family(tiny.config(tmp_path / "lcm-like", embedded_guidance=embedded))
        noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
        found[embedded] = teachers(family, noise, 4, 1.0)
        wanted = stocks(family, noise, 4, guidance_scale=embedded)
        assert same(found[embedded], wanted)
        assert call_arguments(family, UNIFORM)["guidance_scale"] == embedded
    assert not torch.allclose(found[2.0], found[7.5], atol=1e-3)
    with pytest.raises(ValueError, match=r"time_cond_proj_dim.*model.embedded_guidance = 3.5"):
        networks_of(dmd_recipe(tmp_path / "lcm-like", prompts))


def test_lcm_unet_in_its_default_precision(tmp_path: Path) -> None:
    """The embedded guidance is cast to the weights' bf16: the two precisions differ by rounding."""
    torch.manual_seed(0)
    pipe = tiny.sd15()
    pipe.register_modules(unet=tiny.unet(16, time_cond_proj_dim=9))
    pipe.save_pretrained(tmp_path / "lcm-like")
    found = []
    for dtype in ("fp32", "bf16"):
        family = open_family(tiny.config(tmp_path / "lcm-like", dtype=dtype))
        noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
        found.append(family.predict(family.net, noise, torch.full((2,), 0.8), family.encoder.encode(["a", "b"])).eps)
    assert (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max()


def test_inpainting_unet_is_refused(folders: Path, tmp_path: Path) -> None:
    pipe = tiny.sd15()
    pipe.register_modules(unet=tiny.unet(16, in_channels=9))
    pipe.save_pretrained(tmp_path / "inpainting")
    refused(tmp_path / "inpainting", "its UNet has 9 input and 4 output channels, but latents have 4; inpainting")
