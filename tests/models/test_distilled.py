"""Few-step and guidance-distilled base models are detected, and guidance on them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from stock_pipelines import dmd_recipe

from gdmd.models.distilled import why_distilled
from gdmd.plan.networks import networks_of
from gdmd.recipes.build import build

LCM = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("flux2_klein", {"parts": {"index": {"is_distilled": True}}}, "model_index.json says is_distilled"),
        (
            "flux",
            {"parts": {"transformer": {"guidance_embeds": False}}},
            "its transformer has no guidance embedding .*FLUX.1-schnell",
        ),
        ("sdxl", {"scheduler": LCM}, "its scheduler is a LCMScheduler"),
        ("krea2", {"parts": {"index": {"is_distilled": True}}}, "model_index.json says is_distilled"),
        ("qwen_image21", {"parts": {"index": {"sample_sigmas": [1.0, 0.5]}}}, "model_index.json has sample_sigmas"),
        ("sdxl", {"called": "sdxl-turbo"}, "its name says turbo"),
        ("z_image", {"called": "Z-Image-Turbo"}, "its name says turbo"),
        (
            "sd3",
            {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)},
            "its scheduler has stochastic_sampling",
        ),
    ],
)
def test_guidance_on_a_distilled_base(
    saved: Callable[..., Path], name: str, changes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(name, **changes)
    (prompts := folder / "prompts.txt").write_text("a red cube")
    for made in (build, networks_of) if name == "flux2_klein" else (networks_of,):
        with pytest.raises(
            ValueError, match=rf"method.guidance = 3, but .* is a distilled model \({why}.*method.guidance=1"
        ):
            made(dmd_recipe(folder, prompts))
        made(dmd_recipe(folder, prompts, distilled=False))
        assert "is a distilled model" not in caplog.text
        made(dmd_recipe(folder, prompts, guidance=1.0))
        assert "is a distilled model" in caplog.text and "embedded_guidance does nothing" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("stabilityai/sdxl-turbo", "turbo"),
        ("Z-Image-Turbo", "turbo"),
        ("krea/Krea-2-Turbo", "turbo"),
        ("Qwen/Qwen-Image-2.1-Turbo", "turbo"),
        ("stable-diffusion-3.5-large-turbo", "turbo"),
        ("DreamShaperXL_Turbo_v2", "turbo"),
        ("RealVisXL_V4.0_Lightning", "lightning"),
        ("sdxl_lightning_4step_unet", "lightning"),
        ("LCM_Dreamshaper_v7", "lcm"),
        ("FLUX.1-schnell", "schnell"),
        ("hub/models--stabilityai--sdxl-turbo/snapshots/1a2b", "turbo"),
        ("my-turbo-dog", None),
        ("lightning-style", None),
        ("porsche-911-turbo-sdxl", None),
        ("stable-diffusion-xl-base-1.0", None),
    ],
)
def test_names_of_few_step_models(name: str, word: str | None) -> None:
    parts = {"unet": SimpleNamespace(config={}), "scheduler": diffusers.DDIMScheduler()}
    why = why_distilled(SimpleNamespace(components=parts, config={}), name)
    assert why == (word and f"its name says {word}")


@pytest.mark.parametrize(
    ("name", "called", "note"),
    [
        ("sdxl", "my-turbo-dog", "contains 'turbo', but nothing else indicates a few-step model"),
        ("flux", "base", "method.guidance = 3 is applied on top of model.embedded_guidance = 3.5"),
    ],
)
def test_guidance_on_a_maybe_distilled_base_warns(
    saved: Callable[..., Path], name: str, called: str, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(name, called=called)
    for changes in ({"distilled": False}, {"guidance": 1.0}):
        networks_of(dmd_recipe(folder, Path("prompts.txt"), **changes))
        assert note not in caplog.text
    networks_of(dmd_recipe(folder, Path("prompts.txt")))
    assert caplog.text.count(note) == 1


def test_base_declared_as_distilled(saved: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="model.distilled = true"):
        networks_of(dmd_recipe(saved("sdxl"), Path("prompts.txt"), distilled=True))
