"""Features of Sana only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from diffusers import DPMSolverMultistepScheduler

from gdmd.export.pipeline import call_arguments, student_scheduler
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family

UNIFORM = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sana", tmp_path_factory.mktemp("pipelines") / "sana")


def with_solver(folder: Path, **options: object) -> Family:
    """The pipeline with the scheduler of its published checkpoints."""
    wanted = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 6.0} | options
    solver = DPMSolverMultistepScheduler(**wanted)
    solver.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"))
    return open_family(tiny.config(folder))


def test_dpm_solvers_shift_is_used_everywhere(folder: Path) -> None:
    family = with_solver(folder)
    assert type(family.pipe.scheduler) is DPMSolverMultistepScheduler
    times = family.student_times(UNIFORM)
    assert times == pytest.approx([6 * u / (1 + 5 * u) for u in UNIFORM])
    stock = student_scheduler(family, UNIFORM)
    stock.set_timesteps(sigmas=call_arguments(family, UNIFORM)["sigmas"])
    assert stock.sigmas[:-1].tolist() == pytest.approx(times, abs=1e-6) and stock.config.stochastic_sampling


def test_solver_of_another_prediction_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a flow model, but its scheduler .*'epsilon'.* is for models with a beta"):
        with_solver(folder, prediction_type="epsilon", use_flow_sigmas=False)


def test_instruction_precedes_captions_but_not_the_empty_one(folder: Path) -> None:
    family = with_solver(folder)
    wanted = family.pipe.encode_prompt([tiny.WORDS[0]], max_sequence_length=256)
    ours, null = family.encoder.encode(tiny.WORDS[:1]), family.encoder.null(1)
    bare = wanted[0]  # without the instruction
    assert not torch.allclose(ours["embeds"], bare, atol=1e-2) and ours["mask"].shape == null["mask"].shape == (1, 256)
    torch.testing.assert_close(null["embeds"], wanted[2])
    assert torch.equal(null["mask"], wanted[3]) and null["mask"].sum() < ours["mask"].sum()
