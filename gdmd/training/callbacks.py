"""Callbacks of the training loop: a subclass of ``TrainerCallback`` sees the events that matter, and can stop the run.

Events are called on every rank, so that a callback may use collectives; ``state.is_main`` is True on rank 0, which
prints and writes. Give every rank the same callbacks.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.config.load import ConfigError


@dataclass
class TrainerState:
    """Where a training is. ``step`` counts finished outer iterations.

    Setting ``should_stop``, on any rank, ends the run after this iteration, with a checkpoint from which it can resume.
    """

    step: int
    max_steps: int
    output_dir: Path
    is_main: bool
    should_stop: bool = False


class TrainerCallback:
    """The events of a training run, as methods that do nothing: override those that you need.

    An exception in one ends the run with an error: a single process saves a checkpoint of this iteration first, several
    ranks end at once.
    """

    def on_train_begin(self, state: TrainerState) -> None:
        """Before the first iteration of a new or resumed run; ``state.step`` is 0 or the step it resumes from."""

    def on_step_end(self, state: TrainerState) -> None:
        """After each outer iteration."""

    def on_log(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """After a row was written to metrics.jsonl; NaN = not scored."""

    def on_save(self, state: TrainerState, checkpoint: Path) -> None:
        """When a checkpoint is complete: with ``loop.checkpoint_async`` some iterations after its step."""

    def on_images(self, state: TrainerState, images: Mapping[str, Path]) -> None:
        """After validation images were drawn; rank 0 has written the files."""

    def on_train_end(self, state: TrainerState) -> None:
        """When the run has ended, also early, and its last checkpoint is complete. Not called after an error."""


def check_callbacks(given: Any) -> None:
    """ConfigError unless it is a list of ``TrainerCallback`` objects; a class or a function would fail in the run."""
    listed = given if isinstance(given, list | tuple) else [given]
    wrong = [one for one in listed if not isinstance(one, TrainerCallback)]
    if wrong or listed is not given:
        got = (wrong or listed)[0]
        raise ConfigError(
            [f"callbacks: got {got!r:.80}: give a list of TrainerCallback objects, such as [MyCallback()]"]
        )


class CallbackError(ValueError):
    """A callback raised; the message names it, the event and the user's own line."""


def call(callback: TrainerCallback, event: str, *arguments: Any) -> None:
    """Call one event. CallbackError for any exception in it, also sys.exit."""
    try:
        getattr(callback, event)(*arguments)
    except (Exception, SystemExit) as error:
        where = _own_line(traceback.extract_tb(error.__traceback__)[1:])  # the first frame is the call above
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise CallbackError(f"callback {type(callback).__name__}.{event} failed{where}: {reason}") from error


def _own_line(frames: list[traceback.FrameSummary]) -> str:
    """The deepest frame in the folder of the first one: the user's code, not a library's."""
    if not frames:
        return ""
    folder = str(Path(frames[0].filename).parent)
    own = [frame for frame in frames if frame.filename.startswith(folder)][-1]
    return f" at {own.filename}:{own.lineno}, in {own.name}: `{own.line}`"
