"""Callbacks of the loop: order of events, stopping early, resuming, and errors in the user's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Toy, student_weights, toy_config

from gdmd.cli.train import _print_end
from gdmd.programs.train import TrainOutput
from gdmd.runs.run_folder import read_metrics
from gdmd.training.callbacks import TrainerCallback, TrainerState
from gdmd.training.loop import Hooks, TrainEnd


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_begin(self, state: TrainerState) -> None:
        self.events.append(("begin", state.step))

    def on_step_end(self, state: TrainerState) -> None:
        self.events.append(("step", state.step))

    def on_log(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        self.events.append(("log", state.step, logs["loss/student"]))

    def on_save(self, state: TrainerState, checkpoint: Path) -> None:
        assert (checkpoint / "state.json").is_file(), "the checkpoint is complete"
        self.events.append(("save", int(checkpoint.name[5:])))

    def on_images(self, state: TrainerState, images: Mapping[str, Path]) -> None:
        assert all(path.is_file() for path in images.values())
        self.events.append(("images", state.step))

    def on_train_end(self, state: TrainerState) -> None:
        self.events.append(("end", state.step))


class StopAt(TrainerCallback):
    """Stops at a step, in the given event."""

    def __init__(self, step: int, event: str) -> None:
        def stop(state: TrainerState, *_: Any) -> None:
            state.should_stop = state.should_stop or state.step == step

        setattr(self, event, stop)


def train(
    folder: Path, *callbacks: TrainerCallback, steps: int = 4, validate_every: int = 0, **changes: Any
) -> TrainEnd:
    def validate(step: int, path: Path) -> dict[str, float]:
        path.write_bytes(b"image")
        return {}

    cfg = toy_config(steps, **{"checkpoint_every": 3, "log_every": 2, "report_to": ()} | changes)
    return Toy(folder, cfg, hooks=Hooks(validate=validate, validate_every=validate_every, callbacks=callbacks)).train()


def test_events_in_order(tmp_path: Path) -> None:
    seen = Recorder()
    train(tmp_path / "run", seen, validate_every=4)
    logged = {row["step"]: row["loss/student"] for row in read_metrics(tmp_path / "run")}
    assert seen.events == [
        *(("begin", 0), ("images", 0), ("step", 1), ("step", 2), ("log", 2, logged[2]), ("step", 3), ("save", 3)),
        *(("step", 4), ("images", 4), ("log", 4, logged[4]), ("save", 4), ("end", 4)),
    ]
    resumed = Recorder()
    train(tmp_path / "run", resumed, steps=5)
    assert resumed.events[0] == ("begin", 4) and resumed.events[-1] == ("end", 5)


def test_each_checkpoint_written_in_the_background_is_announced_once(tmp_path: Path) -> None:
    seen = Recorder()
    train(tmp_path / "run", seen, steps=10, checkpoint_async=True)
    assert [event[1] for event in seen.events if event[0] == "save"] == [3, 6, 9, 10]


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_images"])
def test_a_callback_stops_the_run_and_a_resume_completes_it(tmp_path: Path, event: str) -> None:
    end = train(tmp_path / "run", StopAt(4, event), steps=8, validate_every=4)
    assert (end.step, end.stopped, end.signal, end.exit_code) == (4, True, None, 0)
    assert end.checkpoint.name == "step_000004"
    end = train(tmp_path / "run", steps=8)
    assert (end.step, end.stopped) == (8, False)
    train(tmp_path / "whole", steps=8)
    resumed, whole = student_weights(tmp_path / "run"), student_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_stopping_at_the_last_step_is_completing_the_run(tmp_path: Path) -> None:
    assert not train(tmp_path / "run", StopAt(4, "on_step_end")).stopped


class Broken(TrainerCallback):
    def on_log(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        if state.step == 4:
            print(logs["reward/none"])


def test_an_exception_in_a_callback_names_the_users_line_and_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        train(tmp_path / "run", Broken(), steps=8)
    message = str(caught.value)
    assert message.startswith("step 4: callback Broken.on_log failed at ")
    assert "test_callbacks.py" in message and "`print(logs[\"reward/none\"])`: KeyError: 'reward/none'. " in message
    assert "step_000004" in message and f"continue with: gdmd train --resume {tmp_path / 'run'} (" in message
    assert train(tmp_path / "run", steps=8).step == 8


class FailsAt(TrainerCallback):
    """Raises in the first event of this name at a step or after it: a save in the background ends some steps later."""

    def __init__(self, step: int, event: str) -> None:
        def fail(state: TrainerState, *_: Any) -> None:
            if state.step >= step:
                raise RuntimeError("broken")

        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_images", "on_save", "on_train_end"])
@pytest.mark.parametrize("in_background", [False, True])
def test_an_exception_in_a_callback_loses_no_step(tmp_path: Path, event: str, in_background: bool) -> None:
    """The failed step has its row and its checkpoint, and the resumed run equals the uninterrupted one."""
    at = {"on_save": 6, "on_train_end": 8}.get(event, 4)
    options: dict[str, Any] = {"steps": 8, "checkpoint_async": in_background, "validate_every": 4}
    seen = Recorder()
    with pytest.raises(ValueError, match=f"step [4-8]: callback FailsAt.{event} failed .*RuntimeError: broken"):
        train(tmp_path / "run", seen, FailsAt(at, event), **options)
    assert ("end", at) not in seen.events or event == "on_train_end"
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    assert int(saved.name[5:]) >= at
    assert [row["step"] for row in read_metrics(tmp_path / "run")][: at // 2] == list(range(2, at + 1, 2))
    train(tmp_path / "run", **options)
    train(tmp_path / "whole", **options)
    resumed, whole = student_weights(tmp_path / "run"), student_weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_exception_before_the_first_step_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 0: callback FailsAt.on_train_begin failed .*no checkpoint yet"):
        train(tmp_path / "run", FailsAt(0, "on_train_begin"))
    assert not read_metrics(tmp_path / "run")


class Exits(TrainerCallback):
    def on_save(self, state: TrainerState, checkpoint: Path) -> None:
        raise SystemExit(3)


def test_a_callback_cannot_exit_the_program(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 3: callback Exits.on_save failed .*SystemExit: 3. .*step_000003"):
        train(tmp_path / "run", Exits())


def test_callbacks_do_not_change_what_is_computed(tmp_path: Path) -> None:
    train(tmp_path / "plain", steps=6)
    train(tmp_path / "watched", Recorder(), steps=6, report_to=("tensorboard",))
    plain, watched = student_weights(tmp_path / "plain"), student_weights(tmp_path / "watched")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_the_callback_of_the_guide_stops_the_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "guides" / "track.md"
    names: dict[str, Any] = {}
    exec(page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    state = TrainerState(1, 2, Path(), is_main=True)
    stop = names["StopWhenGood"](0.9)
    for reward, stopped in ((0.8, False), (0.95, True)):
        stop.on_log(state, {"reward/target": reward})
        assert state.should_stop is stopped


def test_logs_cannot_be_changed(tmp_path: Path) -> None:
    class Changes(TrainerCallback):
        def on_log(self, state: TrainerState, logs: Any) -> None:
            logs["loss/student"] = 0.0

    with pytest.raises(ValueError, match="Changes.on_log failed.*TypeError"):
        train(tmp_path / "run", Changes())


def test_the_command_says_that_a_callback_stopped_it(capsys: pytest.CaptureFixture[str]) -> None:
    trained = TrainOutput(Path("runs/mine"), TrainEnd(4, Path("step_000004"), stopped=True), steps=8, seconds=1.0)
    _print_end(trained)
    said = capsys.readouterr().err
    assert said == "a callback stopped the run at step 4 of 8; resume with: gdmd train --resume runs/mine\n"
    assert trained.json()["finished"] is False and trained.end.exit_code == 0
