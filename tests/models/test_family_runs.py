"""Every family from recipe to images: two iterations of GDMD, a resume, export, reload and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from torch import Tensor

from gdmd.config.image_source import read_source
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import ode_sample, times
from gdmd.methods.dmd import Dmd
from gdmd.programs.export import export_run
from gdmd.programs.train import TrainSettings, create_run, prepare, resume_run, run_training
from gdmd.recipes.build import build
from gdmd.rewards.preprocessing import from_pil
from gdmd.sources.base import Source, image_slots
from gdmd.sources.open import open_source
from gdmd.types import PromptBatch

NO_EVALUATION = TrainSettings(evaluation=False)
CAPTIONS = list(tiny.WORDS[:2])


def greenness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward."""
    return images[:, 1].mean((1, 2))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny pipeline, created on first use."""
    place = tmp_path_factory.mktemp("pipelines")
    (place / "prompts.txt").write_text("\n".join(tiny.WORDS))
    return lambda name: tiny.saved(place, name)


def recipe(folder: Path, full: str) -> RunConfig:
    loop: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 1, "log_every": 1, "threads": 1}
    return RunConfig(
        name="tiny",
        model=tiny.config(folder, full=full),
        method=GDMDConfig(group_size=1, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(steps=2, lr_student=1e-2, lr_fake=1e-2, ema=0.5, **loop),
        prompts={"file": str(folder.parent / "prompts.txt")},
        rewards=[{"kind": "callable", "target": "test_family_runs:greenness"}],
        validation={"every": 0},
    )


def images(source: Source) -> Tensor:
    """What ``gdmd sample`` draws: four of each caption. [8, 3, H, W]"""
    return from_pil(source.generate(image_slots(CAPTIONS, 4), seed=3))


def answers(run: Any, role: str) -> Tensor:
    """x0 of a role of a run for one noise, one time and the captions."""
    noise = torch.randn(2, *run.components.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = getattr(run.components.roles, role)(
            noise, torch.full((2,), 0.9), run.components.encoder.encode(CAPTIONS)
        ).x0
    return found


@pytest.mark.parametrize(("name", "full"), [*((name, "none") for name in tiny.BUILD), ("sd3", "both")])
def test_train_resume_export_and_sample(pipeline: Callable[[str], Path], tmp_path: Path, name: str, full: str) -> None:
    folder, run = pipeline(name), tmp_path / "run"
    create_run(recipe(folder, full), run, ["gdmd", "train"], NO_EVALUATION)
    cfg, opened = resume_run(run, None, ["loop.steps=3"])
    done = run_training(cfg, opened, prepare(cfg), NO_EVALUATION)
    assert (done.end.step, done.end.signal) == (3, None)
    files = [file.name for file in export_run(run)]
    assert ("pytorch_lora_weights.safetensors" in files) == (full == "none")
    exported = run / ("export" if full == "none" else "export-merged")
    student = open_source(read_source(str(run)))
    exported = open_source(read_source(str(run / ("export" if full == "none" else "export-merged"))))
    assert (images(exported) - images(student)).abs().max() < 1.01 / 255
    assert not torch.allclose(answers(student, "student"), answers(student, "teacher"), atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "qwen_image"])
def test_regression_pairs_use_the_teachers_times(pipeline: Callable[[str], Path], name: str) -> None:
    """Shifted times, the training steps of a VP model, and a path stretched to its last time."""
    method = DMDConfig(regression_weight=0.25, regression_steps=3, fake_updates=1, guidance=3.0)
    cfg = recipe(pipeline(name), "none").model_copy(update={"method": method, "rewards": ()})
    components = build(cfg, "cpu")
    prompts = components.stream.at(0)
    noise = SampleRng(0, 0, prompts.index).normal("pair_noise", components.latent_shape)
    guided = Guided(components.roles.teacher, 3.0, prompts.uncond, components.roles.guide)
    own, uniform = (
        ode_sample(guided, noise, t, prompts.cond, components.roles.schedule)
        for t in (components.teacher_times(3), times(3))
    )
    assert isinstance(components.method, Dmd)
    found = components.method.pairs.at(0, prompts, SampleRng(0, 0, prompts.index))
    assert torch.equal(found.x0_ode, own) and not torch.allclose(own, uniform, atol=1e-3)
