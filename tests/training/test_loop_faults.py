"""The loop when things go wrong: bad numbers, signals, full disks, damaged checkpoints; and what it reports."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from toy_training import Toy, full_disk, read_only_disk, signal_at, toy_config

from gdmd.io import RunError
from gdmd.runs import checkpoint
from gdmd.runs import run_folder as rundir
from gdmd.runs.best_checkpoint import named_best
from gdmd.training.loop import Hooks
from gdmd.training.progress import SHOWN, PlainProgress, legend, progress_for, summary
from gdmd.training.role_state import NonFiniteError

pytestmark = pytest.mark.usefixtures("no_fsync")


@dataclass
class Watcher:
    steps: list[int] = field(default_factory=list)
    rows: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin(self, step: int) -> None:
        return

    def advance(self, step: int) -> None:
        self.steps.append(step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, values))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def status(self, doing: str) -> None:
        return


def poison_at(*steps: int):  # noqa: ANN201
    def poison(step: int, role: str, per_sample: Tensor) -> Tensor:
        places = torch.arange(len(per_sample))
        return per_sample / (places != 3) if step in steps and role == "fake" else per_sample

    return poison


def test_nonfinite_loss_stops_the_run_with_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        Toy(tmp_path / "run", toy_config(20), poison=poison_at(12)).train()
    message = str(caught.value)
    assert message.startswith("step 13, sample(s) [3]") and "fake" in message
    assert "step_000010" in message and "lr_fake" in message
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 10]
    assert Toy(tmp_path / "run", toy_config(20)).train().step == 20


def test_nonfinite_loss_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="no checkpoint yet"):
        Toy(tmp_path / "run", toy_config(20), poison=poison_at(0)).train()


def test_nonfinite_updates_are_skipped_up_to_the_limit(tmp_path: Path) -> None:
    few = toy_config(20, on_nonfinite="skip", skip_limit=4)
    toy = Toy(tmp_path / "few", few, poison=poison_at(3, 8))  # two fake updates in each of the two steps
    assert toy.train().exit_code == 0
    row = rundir.read_metrics(tmp_path / "few")[-1]
    assert (row["skipped/fake"], row["updates/fake"], row["updates/student"]) == (4, 36, 40)
    with pytest.raises(ValueError, match=r"step 10: 6 updates.*skip_limit = 4.*step_000005"):
        Toy(tmp_path / "many", few, poison=poison_at(3, 8, 9)).train()


def test_first_signal_saves(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    end = Toy(tmp_path / "run", toy_config(20), signal_at(6)).train()
    assert (end.step, end.exit_code, end.checkpoint.name) == (7, 143, "step_000007")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_second_ctrl_c_ends_the_run_at_once(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 6:
            first = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is first:  # signals that are still pending become one
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)  # interrupted by the second

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with SIG_IGN
    try:
        with pytest.raises(KeyboardInterrupt):
            Toy(tmp_path / "run", toy_config(20), interrupt).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]


def test_disk_full_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(step: int) -> None:
        if step == 7:
            monkeypatch.setattr(checkpoint, "_fsync", full_disk)

    with pytest.raises(RunError, match=r"step_000010: No space left.*step \d+ is intact.*Free some disk space"):
        Toy(tmp_path / "run", toy_config(20), fill).train()
    monkeypatch.undo()
    watcher = Watcher()
    assert Toy(tmp_path / "run", toy_config(20), hooks=Hooks(watcher)).train().step == 20
    assert any("resumed from step 5" in note for note in watcher.notes)
    assert [row["step"] for row in rundir.read_metrics(tmp_path / "run")] == list(range(1, 21))


def test_background_writer_error_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(step: int) -> None:
        while step == 6 and any(thread.name == "gdmd-checkpoint" for thread in threading.enumerate()):
            time.sleep(0.001)

    monkeypatch.setattr(checkpoint, "_fsync", read_only_disk)
    watcher = Watcher()
    with pytest.raises(RunError, match=r"step_000005.*read-only"):
        Toy(tmp_path / "run", toy_config(20, checkpoint_async=True), wait, hooks=Hooks(watcher)).train()
    assert watcher.steps[-1] <= 6


def test_sigterm_waits_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path) -> None:
        time.sleep(0.05)

    def terminate(step: int) -> None:
        if step == 5:
            assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "_fsync", slow)
    end = Toy(tmp_path / "run", toy_config(20, checkpoint_async=True), terminate).train()
    assert (end.exit_code, end.checkpoint.name) == (143, "step_000006")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 6]


def test_best_checkpoint_after_a_resume(tmp_path: Path) -> None:
    changes = {"best_metric": "loss/student", "best_direction": "min", "keep_checkpoints": 1}
    Toy(tmp_path / "whole", toy_config(40, **changes)).train()

    Toy(tmp_path / "parts", toy_config(40, **changes), signal_at(19)).train()
    Toy(tmp_path / "parts", toy_config(40, **changes)).train()
    best = named_best(tmp_path / "whole" / "checkpoints")
    assert best is not None and named_best(tmp_path / "parts" / "checkpoints") == best
    rows = {row["step"]: row["loss/student"] for row in rundir.read_metrics(tmp_path / "whole")}
    means = {step: sum(rows[step - i] for i in range(5)) / 5 for step in range(5, 41, 5)}
    assert best.step == min(means, key=means.__getitem__) and best.value == pytest.approx(means[best.step])
    assert checkpoint.steps(tmp_path / "whole" / "checkpoints") == sorted({best.step, 40})


def test_best_metric_that_is_not_logged(tmp_path: Path) -> None:
    watcher = Watcher()
    Toy(tmp_path / "run", toy_config(5, best_metric="loss/studnt"), hooks=Hooks(watcher)).train()
    assert any("did you mean loss/student?" in note for note in watcher.notes)


def test_resume_skips_a_damaged_newest_checkpoint(tmp_path: Path) -> None:
    Toy(tmp_path / "run", toy_config(10)).train()
    (tmp_path / "run" / "checkpoints" / "step_000010" / "fake.safetensors").write_bytes(b"")
    watcher = Watcher()
    Toy(tmp_path / "run", toy_config(10), hooks=Hooks(watcher)).train()
    assert "step_000010/fake.safetensors is damaged" in watcher.notes[0]
    assert watcher.steps == [6, 7, 8, 9, 10]


def test_learning_rate_of_a_row_is_that_of_its_last_update(tmp_path: Path) -> None:
    """The warm-up counts student updates, of which an iteration of the toy has two."""
    watcher = Watcher()
    Toy(tmp_path / "run", toy_config(2, log_every=1, lr_schedule="constant", warmup=10), hooks=Hooks(watcher)).train()
    assert [row["lr/student"] for _, row in watcher.rows] == pytest.approx([1e-2 * 2 / 10, 1e-2 * 4 / 10])


def test_resume_of_a_finished_run(tmp_path: Path) -> None:
    first = Toy(tmp_path / "run", toy_config(6)).train()
    watcher = Watcher()
    assert Toy(tmp_path / "run", toy_config(6), hooks=Hooks(watcher)).train() == first
    assert watcher.steps == [] and first.checkpoint.name == "step_000006"


def test_rows_are_logged_every_log_every_steps(tmp_path: Path) -> None:
    watcher = Watcher()
    Toy(tmp_path / "run", toy_config(10, log_every=4, lr_schedule="linear", warmup=0), hooks=Hooks(watcher)).train()
    assert [step for step, _ in watcher.rows] == [4, 8, 10]
    row = watcher.rows[1][1]
    assert {"loss/student", "loss/fake", "grad_norm/fake", "size/student", "scale/grad"} <= row.keys()
    assert row["lr/student"] == pytest.approx(1e-2 * (1 - 7 / 10))
    assert row["speed/images_per_s"] > 0 and row["updates/student"] == 16
    assert watcher.steps == list(range(1, 11))
    assert list((tmp_path / "run" / "tb").glob("events*"))


def test_validation_uses_the_ema_weights(tmp_path: Path) -> None:
    """Each validation is logged in a row: in a separate one, unless the step is logged anyway."""
    seen: list[tuple[int, str, Tensor]] = []
    toy = Toy(tmp_path / "run", toy_config(7, ema=0.9, log_every=2))
    weight = toy.roles.student.layers[0].weight

    def validate(step: int, path: Path) -> dict[str, float]:
        seen.append((step, path.name, weight.detach().clone()))
        return {"validation/size": float(step)}

    toy.hooks = Hooks(validate=validate, validate_every=3)
    toy.train()
    rows = [
        (row["step"], row.get("validation/size"), "loss/student" in row)
        for row in rundir.read_metrics(tmp_path / "run")
    ]
    assert rows == [
        *((0, 0.0, False), (2, None, True), (3, 3.0, False), (4, None, True)),
        *((6, 6.0, True), (7, 7.0, True)),
    ]
    assert [(step, name) for step, name, _ in seen] == [(step, f"step_{step:06d}.png") for step in (0, 3, 6, 7)]
    saved = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert torch.equal(seen[-1][2], saved.part("ema")["layers.0.weight"])
    assert torch.equal(weight, saved.part("student")["layers.0.weight"])
    assert not torch.equal(seen[-1][2], weight)


def test_micro_batches_train_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for micro_batch in (0, 2):
        toy = Toy(tmp_path / str(micro_batch), toy_config(5, micro_batch=micro_batch))
        toy.train()
        weights.append(toy.roles.student.layers[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_bf16_run_keeps_fp32_weights(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "run", toy_config(5, precision="bf16"))
    assert toy.train().exit_code == 0
    assert toy.roles.student.layers[0].weight.dtype == torch.float32


def test_summary_and_legend() -> None:
    """Known statistics in their order with their meaning; what was not scored reads "-"."""
    values = {"reward/target": math.nan, "loss/fake": 0.25, "loss/gan": 2.0, "loss/student": 0.5, "lr/fake": 1.0}
    assert summary(values) == ["student 0.5", "fake 0.25", "gan 2", "R(target) -"]
    assert (
        legend(values)
        == "student = loss of the student; fake = loss of the fake score; R(target) = reward of the targets"
    )


def test_plain_progress() -> None:
    """Without a terminal: the legend once, then one line per row, with an ETA from the second step on."""
    stream = io.StringIO()
    progress = PlainProgress(10, stream)
    for step in (1, 2):
        progress.advance(step)
        progress.row(step, {"loss/student": 1.0, "weight/share_below_half": 0.25})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("metrics: student = ") and len(lines) == 3
    assert lines[1] == "step 1/10  student 1  r<1/2 0.25"
    assert lines[2].startswith("step 2/10  student 1  r<1/2 0.25  ETA 0:")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("done", [2, 4])
def test_slow_first_iteration_is_announced_if_there_is_one(terminal: bool, done: int) -> None:
    """A finished run that is resumed has no iteration left; the bar shows the steps that are done."""
    stream = io.StringIO()
    with progress_for(4, Console(file=stream, force_terminal=terminal, width=80)) as progress:
        progress.begin(done)
    text = stream.getvalue()
    assert ("first iteration" in text) == (done < 4)
    assert not terminal or f"step {done}/4" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_progress_at_80_columns(terminal: bool) -> None:
    """On a terminal: step, ETA and whole metrics fit 80 columns; elsewhere there are no escape codes."""
    stream = io.StringIO()
    values = dict.fromkeys(SHOWN, 0.123456)
    with progress_for(4, Console(file=stream, force_terminal=terminal, width=80)) as progress:
        for step in (1, 2):
            progress.advance(step)
        progress.row(2, values)
        progress.note("resumed from step 1")
    text = stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert ("\x1b" in text) == terminal and "resumed from step 1" in text
    assert "student 0.123" in plain and "images/s 0.123" in plain and "ETA 0:" in plain
    if terminal:
        assert "step 2/4" in plain and max(map(len, re.split(r"[\r\n]", plain))) <= 80
