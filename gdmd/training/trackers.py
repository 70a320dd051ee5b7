"""Experiment trackers as callbacks of rank 0: scalars, validation images and the resolved configuration.

They use the libraries' own APIs, four calls each (start, log, image, finish). accelerate's trackers wrap the same calls,
but need its PartialState next to our process group and the diffusers extra, send no images to trackio, and leave
resuming to the caller: the code here would not be shorter.

A run is named after its folder, in the project of the environment variable WANDB_PROJECT, SWANLAB_PROJ_NAME or, since
trackio itself reads none, TRACKIO_PROJECT; else "gdmd". RUN/trackers.json keeps its id and its last step: a resumed run
continues the same tracker run, and the steps that it repeats (with the same numbers) are not sent again. If an input or
the validation has changed, the repeated steps have other numbers, and a new tracker run begins.

A missing library or a failed start is an error before training. A later failure (network, disk) is noted once, and the
run trains on without that tracker until it is resumed; metrics.jsonl has every row.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from gdmd.config.extras import install
from gdmd.io import all_errors, read_json, write_atomic, writing
from gdmd.runs.inputs import CHANGES
from gdmd.runs.run_folder import CONFIG_CHANGES, Run, read_facts
from gdmd.training.callbacks import TrainerCallback, TrainerState

PROJECT = "gdmd"
"""The project of a tracker whose environment variable names none."""


class Tracker(TrainerCallback):
    """One tracker of a run. Subclasses wrap a library in ``open``, ``send``, ``image`` and ``finish``."""

    name = ""
    advice = ""

    def __init__(self, run: Run, note: Callable[[str], None]) -> None:
        self.run, self.note = run, note
        self._active = False

    def open(self, state: TrainerState) -> None:
        """Start the tracker's run, or continue the one of a resumed run."""

    def send(self, values: Mapping[str, Any], step: int) -> None:
        """Record scalars or images at a step."""

    def image(self, path: Path) -> Any:
        """An image file as a value of ``send``."""

    def finish(self, *, failed: bool) -> None:
        """End the tracker's run."""

    @classmethod
    def require_login(cls) -> None:
        """Raises the library's own error if its account is not known; nothing where that shows only at the start."""

    @classmethod
    def check(cls) -> None:
        """``require_login``; ValueError if the library refuses."""
        cls._started(cls.require_login)

    def start(self, state: TrainerState) -> None:
        """``open``; ValueError if the library refuses."""
        self._started(lambda: self.open(state))
        self._active = True

    @classmethod
    def _started(cls, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # the libraries print, and standard output belongs to --json
                action()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"loop.report_to: {cls.name} did not start: {_reason(error)}. {cls.advice}, or take {cls.name} out of "
                "loop.report_to."
            ) from error

    def on_log(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Record a row of metrics."""
        self._guarded(lambda: self.send(logs, state.step))

    def on_images(self, state: TrainerState, images: Mapping[str, Path]) -> None:
        """Record validation images."""
        self._guarded(lambda: self.send({name: self.image(path) for name, path in images.items()}, state.step))

    def on_train_end(self, state: TrainerState) -> None:
        """End the tracker's run as completed."""
        self.close(failed=False)

    def close(self, *, failed: bool = True) -> None:
        """End the tracker's run if it has not ended: as ``failed`` after an error of the training."""
        with redirect_stdout(sys.stderr):
            self._guarded(lambda: self.finish(failed=failed))
        self._active = False

    def _guarded(self, action: Callable[[], None]) -> None:
        if not self._active:
            return
        try:
            action()
        except Exception as error:
            self._active = False
            self.note(
                f"{self.name} failed and gets no more data from this run: {_reason(error)}. Training continues; "
                f"{self.run.metrics} has every row."
            )


class TensorBoard(Tracker):
    """Event files in RUN/tb; a resumed run hides what was logged beyond the step that it resumes from."""

    name = "tensorboard"
    advice = "Check the folder"

    def open(self, state: TrainerState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with writing("the TensorBoard log", self.run.tensorboard):
            self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=state.step + 1 if state.step else 0)

    def send(self, values: Mapping[str, Any], step: int) -> None:
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
            else:
                self.writer.add_image(key, value, step, dataformats="HWC")
        self.writer.flush()

    def image(self, path: Path) -> Any:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))  # [H, W, 3]

    def finish(self, *, failed: bool) -> None:
        self.writer.close()


class _TrackerWithId(Tracker, ABC):
    """A tracker whose run is continued by its id; its last step is known, so that no number is sent twice."""

    library: Any
    handle: Any

    def open(self, state: TrainerState) -> None:
        known = self._memory().get(self.name, {}) if state.step else {}  # a run that starts over is another run
        changes = self._changes()
        if state.step < known.get("step", -1) and changes != known.get("changes", 0):
            self.note(
                f"{self.name}: a new run begins at step {state.step}, because the repeated steps have other numbers"
            )
            known = {}
        self._before: int = known.get("step", -1)  # fixed: images and scalars of one step are sent separately
        self.library = importlib.import_module(self.name)
        run_id = self.begin(known.get("id", ""))
        self._remember(id=run_id, step=self._before, changes=changes)

    @abstractmethod
    def begin(self, known: str) -> str:
        """Start a run, or continue the ``known`` one; returns the id by which it can be continued."""

    def send(self, values: Mapping[str, Any], step: int) -> None:
        if step <= self._before:
            return
        self.handle.log({key: value for key, value in values.items() if _is_finite(value)}, step=step)
        self._remember(step=step)

    def image(self, path: Path) -> Any:
        return self.library.Image(str(path))

    def _changes(self) -> int:
        """How often something was changed on which the numbers of a step depend."""
        facts = read_facts(self.run.path)
        validation = [one for one in facts.get(CONFIG_CHANGES, ()) if one["key"].startswith("validation.")]
        return len(facts.get(CHANGES, ())) + len(validation)

    def _memory(self) -> dict[str, Any]:
        file = self.run.path / "trackers.json"
        return read_json(file, "Delete it: the trackers then begin new runs.") if file.exists() else {}

    def _remember(self, **facts: Any) -> None:
        memory = self._memory()
        memory[self.name] = {**memory.get(self.name, {}), **facts}
        write_atomic(self.run.path / "trackers.json", json.dumps(memory, indent=1), "the trackers' runs")


class Wandb(_TrackerWithId):
    """Weights & Biases; local files go to RUN/wandb unless WANDB_DIR is set."""

    name = "wandb"
    advice = "Log in with `wandb login`, or record offline with WANDB_MODE=offline"

    @classmethod
    def require_login(cls) -> None:
        """Without a key in the environment, wandb looks for one in its files, and on a terminal it asks."""
        known = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        if not known and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
            importlib.import_module("wandb").login(verify=False)

    def begin(self, known: str) -> str:
        self.handle = self.library.init(
            project=_project("WANDB_PROJECT"),
            name=_run_name(self.run),
            id=known or secrets.token_hex(4),
            resume="allow",
            config=dict(self.run.config),
            dir=os.environ.get("WANDB_DIR") or str(self.run.path),
            reinit="create_new",  # a notebook's own run stays as it is
        )
        return str(self.handle.id)

    def finish(self, *, failed: bool) -> None:
        self.handle.finish(exit_code=int(failed))


class Trackio(_TrackerWithId):
    """Trackio: a local SQLite file, or the Space or server of TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

    name = "trackio"
    advice = "Check TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL"

    def begin(self, known: str) -> str:
        """Trackio continues a run by its name, so a second run in a folder of the same name gets a longer one."""
        project, name = _project("TRACKIO_PROJECT"), known or _run_name(self.run)
        if not known and name in self._names(project):
            name = f"{name}-{secrets.token_hex(2)}"
        resume = "allow" if known else "never"
        self.handle = self.library.init(
            project=project, name=name, resume=resume, config=dict(self.run.config), embed=False
        )
        return name

    def _names(self, project: str) -> list[str]:
        try:
            return [run.name for run in self.library.Api().runs(project)]
        except ValueError:  # a new project
            return []

    def finish(self, *, failed: bool) -> None:
        self.library.finish()  # not the run's own: that one would be finished again, and reported, at exit


class Swanlab(_TrackerWithId):
    """SwanLab; local files go to RUN/swanlog unless SWANLAB_LOGDIR is set."""

    name = "swanlab"
    advice = "Log in with `swanlab login`, or record offline with SWANLAB_MODE=offline"

    def begin(self, known: str) -> str:
        run_id = known or secrets.token_hex(8)
        self.handle = self.library.init(
            project=_project("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT"),
            name=_run_name(self.run),
            id=run_id,
            resume="allow",
            config=dict(self.run.config),
            log_dir=os.environ.get("SWANLAB_LOGDIR") or str(self.run.path / "swanlog"),
        )
        return run_id

    def finish(self, *, failed: bool) -> None:
        if failed:
            self.handle.finish(state="crashed", error="the training ended with an error")
        else:
            self.handle.finish()


TRACKERS: Mapping[str, type[Tracker]] = {one.name: one for one in (TensorBoard, Wandb, Trackio, Swanlab)}
"""By name in ``loop.report_to``."""


def trackers(names: Sequence[str], run: Run, note: Callable[[str], None]) -> list[Tracker]:
    """The trackers of a run, not started yet. ValueError if a library is missing."""
    require_trackers(names)
    return [TRACKERS[name](run, note) for name in dict.fromkeys(names)]


def require_trackers(names: Sequence[str]) -> None:
    """ValueError with the commands that install the libraries of ``loop.report_to`` that are missing."""

    def require(name: str) -> None:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"loop.report_to = {name} needs the package {name}, which is not installed; do: {install(name)}, or take "
                f"{name} out of loop.report_to"
            )

    all_errors(*(partial(require, name) for name in names))


def check_trackers(names: Sequence[str]) -> None:
    """``require_trackers``, and a ValueError for a library that knows no account; before anything is loaded."""
    require_trackers(names)
    all_errors(*(TRACKERS[name].check for name in dict.fromkeys(names)))


def _project(*variables: str) -> str:
    """The project that the environment names."""
    return next(filter(None, map(os.environ.get, variables)), PROJECT)


def _run_name(run: Run) -> str:
    return run.path.resolve().name


def _is_finite(value: Any) -> bool:
    """False for a score that is missing; images are kept."""
    return not isinstance(value, float) or math.isfinite(value)


def _reason(error: BaseException) -> str:
    """The first line of an error, without what the environment keeps secret."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300].rstrip(".: ")
    secret = [value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
    for value in sorted((one for one in secret if len(one) > 5), key=len, reverse=True):
        text = text.replace(value, "***")
    return re.sub(r"(token|key)=[^&\s'\"]+", r"\1=***", text)
