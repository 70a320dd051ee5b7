"""The best checkpoint: chosen by the mean of a metric, kept next to the newest, and found by name."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from gdmd.io import RunError
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import Best, BestCheckpointTracker, named_best
from gdmd.runs.inputs import CHANGES, last_change
from gdmd.runs.run_folder import write_facts

pytestmark = pytest.mark.usefixtures("no_fsync")


def save(folder: Path, *values: tuple[int, float | None], direction: str = "max", metric: str = "reward") -> None:
    """Save checkpoints at these steps with these values; the newest two are kept."""
    for step, value in values:
        candidate = None if value is None else Best(step, metric, direction, value)  # type: ignore[arg-type]
        checkpoint.save(folder, step, {"student": {"w": torch.tensor(step)}}, {}, 2, candidate)


def chosen(folder: Path, which: str) -> int:
    saved = checkpoint.load_chosen(folder, which)
    assert saved is not None and int(saved.part("student")["w"]) == saved.step
    return saved.step


def test_best_is_kept_next_to_the_newest(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.7), (15, 0.3), (20, 0.7), (25, None))
    assert checkpoint.steps(tmp_path) == [10, 20, 25]
    assert named_best(tmp_path) == Best(10, "reward", "max", 0.7)
    assert (chosen(tmp_path, "best"), chosen(tmp_path, "last"), chosen(tmp_path, "20")) == (10, 25, 20)
    save(tmp_path, (30, 0.8), (35, 0.2), (40, 0.2))
    assert checkpoint.steps(tmp_path) == [30, 35, 40] and chosen(tmp_path, "best") == 30


def test_direction_and_change_of_metric(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.7), (15, 0.3), direction="min")
    assert chosen(tmp_path, "best") == 5
    save(tmp_path, (20, -3.0), (25, -4.0), metric="other")
    assert chosen(tmp_path, "best") == 20


def test_kill_before_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, (5, 0.9), (10, 0.2), (15, 0.1))

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_choose_and_rotate", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, (20, 1.0))
    assert (chosen(tmp_path, "best"), chosen(tmp_path, "last")) == (5, 20)


def test_best_was_set_aside(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.1), (10, 0.2))
    checkpoint.set_aside_after(tmp_path, 5)
    with pytest.raises(RunError, match=r"best.json names step 10 .*choose another checkpoint: last, or a step"):
        chosen(tmp_path, "best")
    save(tmp_path, (15, 0.05))
    assert chosen(tmp_path, "best") == 15


def test_unknown_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_chosen(tmp_path, "last") is None
    with pytest.raises(
        RunError,
        match=r"no best checkpoint.*loop\.best_metric is set\. Choose another checkpoint: last, or a step \(there are: ",
    ):
        checkpoint.load_chosen(tmp_path, "best")
    save(tmp_path, (5, None), (10, None))
    for which in ("7", "newest", "-1", "../5"):
        with pytest.raises(RunError, match=r"give best, last or a step \(there are: 5, 10\)"):
            checkpoint.load_chosen(tmp_path, which)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(RunError, match=r"best\.json.*Delete it"):
        checkpoint.load_chosen(tmp_path, "best")


def test_damaged_best_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, (5, 0.9), (10, 0.1))
    (tmp_path / "step_000005" / "student.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"student\.safetensors is damaged.*choose another checkpoint"):
        checkpoint.load_chosen(tmp_path, "best")


def test_best_points_to_a_missing_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, (5, 0.9), (10, 0.1), (15, 0.2))
    shutil.rmtree(tmp_path / "step_000005")
    with pytest.raises(RunError, match=r"best\.json names step 5 \(reward = 0\.9\).*\(there are: 10, 15\)"):
        checkpoint.load_chosen(tmp_path, "best")
    save(tmp_path, (20, 0.3))
    assert "step 5 (reward = 0.9), is missing" in caplog.text and chosen(tmp_path, "best") == 20


def test_damaged_newest_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, (5, None), (10, None))
    assert chosen(tmp_path, "last") == 10 and not caplog.messages
    (tmp_path / "step_000010" / "student.safetensors").write_bytes(b"")
    assert chosen(tmp_path, "last") == 5
    (said,) = caplog.messages
    assert "student.safetensors is damaged" in said and "checkpoint step 10 was skipped; step 5 is used" in said


def test_score_is_the_mean_of_the_window() -> None:
    tracker = BestCheckpointTracker("reward", "max", 10)
    assert tracker.score(10) is None
    for step, value in ((5, 9.0), (10, 9.0), (15, 1.0), (18, math.nan), (20, 2.0)):
        tracker.add(step, {"reward": value})
    assert tracker.score(20) == Best(20, "reward", "max", 1.5)
    resumed = BestCheckpointTracker("reward", "max", 10)
    resumed.resume([{"step": step, "reward": value} for step, value in ((10, 9.0), (15, 1.0), (20, 2.0))])
    assert resumed.score(20) == tracker.score(20)


def test_metric_that_is_not_logged() -> None:
    tracker = BestCheckpointTracker("reward/targt", "max", 10)
    tracker.add(10, {"loss/student": 1.0, "reward/target": 2.0})
    assert tracker.score(10) is None
    assert "reward/targt has no value in steps 1 ... 10" in tracker.why_unscored(10)
    assert "did you mean reward/target?" in tracker.why_unscored(10)


def test_best_of_earlier_validation_prompts_is_replaced(tmp_path: Path) -> None:
    """A resumed run may have other validation prompts, whose scores cannot be compared with the best score so far."""
    key, teacher = "validation/clip", "validation/teacher/clip"
    rows = [{"step": 0, key: 0.1, teacher: 0.5}, {"step": 10, key: 0.9}, {"step": 20, key: 0.2, teacher: 0.3}]
    tracker = BestCheckpointTracker(key, "max", 10)
    for row in rows:
        tracker.add(int(row["step"]), row)
        if row["step"]:
            checkpoint.save(tmp_path, int(row["step"]), {}, {}, 0, tracker.score(int(row["step"])))
    assert checkpoint.chosen_path(tmp_path, "best").name == "step_000020"
    again = BestCheckpointTracker(key, "max", 10)
    again.resume(rows)
    for step, value, best in ((30, 0.3, 30), (40, 0.25, 30)):
        again.add(step, {key: value})
        checkpoint.save(tmp_path, step, {}, {}, 0, again.score(step))
        assert checkpoint.chosen_path(tmp_path, "best").name == f"step_{best:06d}"


def test_best_of_another_reward_is_replaced(tmp_path: Path) -> None:
    """A changed reward was accepted at step 10: neither the best score so far nor the rows of the window count."""
    save(tmp_path, (10, 9.0))
    write_facts(tmp_path, {CHANGES: [{"step": 5}, {"step": 10}]})
    tracker = BestCheckpointTracker("reward", "max", 10)
    tracker.resume([{"step": 5, "reward": 9.0}, {"step": 10, "reward": 9.0}], last_change(tmp_path))
    assert tracker.score(10) is None
    tracker.add(15, {"reward": 0.1})
    found = tracker.score(15)
    assert found == Best(15, "reward", "max", 0.1, since=11) and found.improves_on(named_best(tmp_path))
    tracker.add(20, {"reward": 0.05})
    later = tracker.score(20)
    assert later is not None and not later.improves_on(found)
