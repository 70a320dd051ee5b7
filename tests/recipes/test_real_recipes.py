"""A recipe of each family, and each method at least twice, on a tiny random pipeline: one iteration per stage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
import torch
from rich.console import Console
from torch import Tensor

from gdmd.diffusion.rng import SampleRng
from gdmd.programs.latents import compute_latents
from gdmd.recipes.build import build
from gdmd.recipes.read import family_names, read_recipe
from gdmd.rewards.preprocessing import to_pil
from gdmd.types import PromptBatch

RECIPES = ("sd15_gdmd", "sdxl_dmd2", "sd3_gdmd", "flux_dmdr", "flux2_dmd")
RECIPES += ("flux2_klein_gdmd", "z_image_dmd2", "qwen_image_dmdr", "qwen_image21_dmd", "sana_dmd", "krea2_gdmd")
RECIPES += ("sd35_medium_gdmd", "flux2_klein_turbo_gdmd", "z_image_turbo_gdmd", "sdxl_lightning_gdmd")
SMALL = {"height": tiny.SIZE, "width": tiny.SIZE, "dtype": "fp32", "lora_rank": 2, "lora_alpha": 2}
SMALL |= {"max_tokens": 256, "embeddings": "null", "checkpointing": "false"}


def redness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A differentiable reward."""
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text("\n".join(tiny.WORDS))
    (folder / "images").mkdir()
    for number, words in enumerate(tiny.WORDS):
        to_pil(torch.rand(1, 3, 40, 36))[0].save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(words)
    return folder


def with_images(folders: Path, name: str, changed: list[str]) -> list[str]:
    """The user's own images, encoded, in the place of prompts."""
    own = [f"real_data.source={folders / 'images'}", f"real_data.latents={folders / name}_latents"]
    changed = [*changed, *own]
    made = compute_latents(read_recipe(name, changed), Console(file=io.StringIO()))
    assert made["images"] == len(tiny.WORDS)
    return changed


def test_every_family_is_covered() -> None:
    assert sorted(name.rpartition("_")[0] for name in RECIPES) == family_names()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_a_tiny_pipeline(folders: Path, name: str) -> None:
    family = str(read_recipe(name).model.family)  # type: ignore[union-attr]
    folder = tiny.saved(folders, family)
    changed = [f"model.{key}={value}" for key, value in SMALL.items()]
    changed += [f"model.path={folder}", "loop.batch_size=2"]
    model: Any = read_recipe(name).model
    changed += [f"model.student={folder}"] if model.student else []
    changed += ["model.student_lora=null", f"model.student={folder}"] if model.student_lora else []
    changed += ["method.group_size=1"] if name.endswith("_gdmd") else ["method.fake_updates=1"]
    if name.endswith("_dmd2"):
        changed = with_images(folders, name, changed)
    else:
        changed.append(f"prompts.file={folders / 'prompts.txt'}")
    if name.endswith(("_gdmd", "_dmdr")):
        changed.append("rewards=[{kind: callable, target: 'test_real_recipes:redness', differentiable: true}]")
    cfg = read_recipe(name, changed)
    components = build(cfg, "cpu")
    for step in (0, cfg.loop.steps - 1):
        prompts, roles = components.stream.at(step), []
        for update in components.method.iteration(step, prompts, SampleRng(0, step, prompts.index)):
            loss = update.loss(update.batch).per_sample.mean()
            torch.autograd.backward(loss)
            weights = [w for key, w in components.roles.parameters(update.role).items() if "lora_B" in key]
            found = [w.grad for w in weights if w.grad is not None]  # what the last block gives the text is not read
            assert loss.isfinite() and len(found) > len(weights) / 2
            assert all(grad.isfinite().all() for grad in found)
            if update.role == "fake":  # the student's weight can be 0: r = 0, or guidance 1 before the first update
                assert any(bool(grad.any()) for grad in found)
            roles.append(update.role)
        assert roles == ["fake", "student"]
