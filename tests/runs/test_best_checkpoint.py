"""The best checkpoint: chosen by the mean of a metric, kept beside the newest, and found by name."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from gdmd.io import RunError
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import Best, Judge, named_best


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save(folder: Path, *values: tuple[int, float | None], direction: str = "max", metric: str = "reward") -> None:
    """Checkpoints of these steps with these values, the newest two of which are kept."""
    for step, value in values:
        candidate = None if value is None else Best(step, metric, direction, value)  # type: ignore[arg-type]
        checkpoint.save(folder, step, {"student": {"w": torch.tensor(step)}}, {}, 2, candidate)


def chosen(folder: Path, which: str) -> int:
    saved = checkpoint.load_chosen(folder, which)
    assert saved is not None and int(saved.part("student")["w"]) == saved.step
    return saved.step


def test_the_best_one_stays_beside_the_newest_until_a_better_one_comes(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.7), (15, 0.3), (20, 0.7), (25, None))
    assert checkpoint.steps(tmp_path) == [10, 20, 25]
    assert named_best(tmp_path) == Best(10, "reward", "max", 0.7)
    assert (chosen(tmp_path, "best"), chosen(tmp_path, "last"), chosen(tmp_path, "20")) == (10, 25, 20)
    save(tmp_path, (30, 0.8), (35, 0.2), (40, 0.2))
    assert checkpoint.steps(tmp_path) == [30, 35, 40] and chosen(tmp_path, "best") == 30


def test_less_can_be_better_and_another_metric_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.7), (15, 0.3), direction="min")
    assert chosen(tmp_path, "best") == 5
    save(tmp_path, (20, -3.0), (25, -4.0), metric="other")
    assert chosen(tmp_path, "best") == 20


def test_a_kill_between_rename_and_rotation_loses_neither_best_nor_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, (5, 0.9), (10, 0.2), (15, 0.1))

    def killed(place: checkpoint.Place) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_choose_and_rotate", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, (20, 1.0))
    assert (chosen(tmp_path, "best"), chosen(tmp_path, "last")) == (5, 20)


def test_a_best_checkpoint_that_was_set_aside_is_none(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.2))
    checkpoint.set_aside_after(tmp_path, 5)
    with pytest.raises(RunError, match=r"best.json names step 10 .*choose another checkpoint: last, or a step"):
        chosen(tmp_path, "best")
    save(tmp_path, (15, 0.05))
    assert chosen(tmp_path, "best") == 15


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    assert checkpoint.load_chosen(tmp_path, "last") is None
    with pytest.raises(RunError, match=r"no best checkpoint.*loop\.best_metric"):
        checkpoint.load_chosen(tmp_path, "best")
    save(tmp_path, (5, None), (10, None))
    for which in ("7", "newest", "-1", "../5"):
        with pytest.raises(RunError, match=r"give best, last or a step \(there are: 5, 10\)"):
            checkpoint.load_chosen(tmp_path, which)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(RunError, match=r"best\.json.*Delete it"):
        checkpoint.load_chosen(tmp_path, "best")


def test_a_damaged_best_checkpoint_is_not_replaced_by_another_in_silence(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.9), (10, 0.1))
    (tmp_path / "step_000005" / "student.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"student\.safetensors is damaged.*choose another checkpoint"):
        checkpoint.load_chosen(tmp_path, "best")


def test_a_best_pointer_to_a_missing_step_is_named_with_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, (5, 0.9), (10, 0.1), (15, 0.2))
    shutil.rmtree(tmp_path / "step_000005")
    with pytest.raises(RunError, match=r"best\.json names step 5 \(reward = 0\.9\).*\(there are: 10, 15\)"):
        checkpoint.load_chosen(tmp_path, "best")
    save(tmp_path, (20, 0.3))
    assert "step 5 (reward = 0.9), is no longer there" in caplog.text and chosen(tmp_path, "best") == 20


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_that_names_both_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, (5, None), (10, None))
    assert chosen(tmp_path, "last") == 10 and not caplog.messages
    (tmp_path / "step_000010" / "student.safetensors").write_bytes(b"")
    assert chosen(tmp_path, "last") == 5
    (said,) = caplog.messages
    assert "student.safetensors is damaged" in said and "step 10 was passed over; step 5 is used" in said


def test_the_value_is_the_mean_of_the_scored_rows_of_the_window() -> None:
    judge = Judge("reward", "max", 10)
    assert judge.at(10) is None
    for step, value in ((5, 9.0), (10, 9.0), (15, 1.0), (18, math.nan), (20, 2.0)):
        judge.add(step, {"reward": value})
    assert judge.at(20) == Best(20, "reward", "max", 1.5)
    again = Judge("reward", "max", 10)
    again.take_up([{"step": step, "reward": value} for step, value in ((10, 9.0), (15, 1.0), (20, 2.0))])
    assert again.at(20) == judge.at(20)


def test_a_metric_that_is_not_logged_is_named_with_its_neighbor() -> None:
    judge = Judge("reward/targt", "max", 10)
    judge.add(10, {"loss/student": 1.0, "reward/target": 2.0})
    assert judge.at(10) is None
    assert "reward/targt has no value in steps 1 ... 10" in judge.complaint(10)
    assert "did you mean reward/target?" in judge.complaint(10)
