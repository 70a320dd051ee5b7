"""Training the scorers: each learns in a few steps, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gdmd.runs.assets import load_asset
from gdmd.shapes.pretrain import scorers as pretrain_scorers
from gdmd.shapes.pretrain.scorers import checkpoint_path, pretrain_scorer
from gdmd.shapes.rewards import from_asset
from gdmd.shapes.scorer_networks import KINDS, Kind

SMALL = {"batch": 4, "checkpoint_every": 2, "per_task": 4}


class Stop(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain_scorers, "POOL", 2)
    pretrain_scorers._pool.cache_clear()
    yield
    pretrain_scorers._pool.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(kind: Kind, tmp_path: Path):
    whole, parts = tmp_path / "whole" / f"{kind}.safetensors", tmp_path / "parts" / f"{kind}.safetensors"
    pretrain_scorer(kind, 6, 5, whole, **SMALL)

    def kill(step: int, loss: float) -> None:
        if step == 4:  # the checkpoint before it holds 4 finished steps
            raise Stop

    with pytest.raises(Stop):
        pretrain_scorer(kind, 6, 5, parts, on_step=kill, **SMALL)
    assert checkpoint_path(parts).exists() and not parts.exists()
    steps: list[int] = []
    pretrain_scorer(kind, 6, 5, parts, resume=True, on_step=lambda step, loss: steps.append(step), **SMALL)
    assert steps == [4, 5] and not checkpoint_path(parts).exists()
    first, second = load_asset(whole).tensors, load_asset(parts).tensors
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert from_asset(parts).name == kind


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_on_one_batch(kind: Kind, monkeypatch: pytest.MonkeyPatch):
    first = pretrain_scorers.batch_at(pretrain_scorers.ScorerConfig(kind, 20, 0, batch=8), 0)
    monkeypatch.setattr(pretrain_scorers, "batch_at", lambda cfg, step: first)
    monkeypatch.setattr(pretrain_scorers, "step_generator", lambda seed, step: torch.Generator().manual_seed(seed))
    losses: list[float] = []
    pretrain_scorer(kind, 20, 0, batch=8, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.02


def test_weights_depend_on_seed():
    a, b = (pretrain_scorer("shapes_clip_heldout", 1, seed, **SMALL) for seed in (0, 1))
    assert not torch.equal(a.image.read[0].weight, b.image.read[0].weight)


def test_checkpoint_of_another_config(tmp_path: Path):
    asset = tmp_path / "shapes_clip_heldout.safetensors"

    def kill(step: int, loss: float) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        pretrain_scorer("shapes_clip_heldout", 6, 5, asset, on_step=kill, **SMALL)
    with pytest.raises(ValueError, match="was made with seed = 5, this run has 6"):
        pretrain_scorer("shapes_clip_heldout", 6, 6, asset, resume=True, **SMALL)


def test_scorers_never_learn_from_the_checker():
    """Labels come from scenes; a scorer trained on the detector would reward what the evaluation measures."""
    for path in Path(pretrain_scorers.__file__).parent.glob("*.py"):
        assert "shapes.check" not in path.read_text() and "shapes.detect" not in path.read_text(), path
