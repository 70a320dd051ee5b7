"""A run folder, the public contract between training and everything that reads its results. No torch here.

config.yaml      the resolved configuration
run.json         versions, git commit, command, hash of the configuration, when it was started and resumed
metrics.jsonl    one JSON object per logged step; "step" counts finished outer iterations; null = not scored
tb/              the same numbers for TensorBoard
trackers.json    with wandb, trackio or swanlab: the id and the last step of the tracker's run
grids/           step_000040.png: validation images; teacher.safetensors: the teacher's
checkpoints/     step_000040/: see ``runs.checkpoint``
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from gdmd.io import RunError, append_jsonl, near_name, numbered_jsonl, read_json, typed, write_atomic, writing
from gdmd.runs.process import RUN_LOCK

TEACHER_FILE = "teacher.safetensors"
"""The file in RUN/grids with the teacher's validation images, 8-bit [N, 3, H, W], and what they depend on."""
CONFIG_CHANGES = "config_changes"
"""The key in run.json for changes of the configuration when the run was resumed."""
TRAINED_BEFORE = "trained_before"
"""The key in run.json, and in a student file, for the rewards that trained the student of loop.start_from."""
PACKAGES = ("gdmd", "torch", "numpy", "pydantic", "safetensors")


@dataclass(frozen=True)
class Run:
    """An open run folder. ``config`` is the resolved configuration as plain data."""

    path: Path
    config: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def grid(self, step: int) -> Path:
        """The file of the validation images of a step."""
        return self.path / "grids" / f"step_{step:06d}.png"

    @property
    def teacher_images(self) -> Path:
        """TEACHER_FILE of the run."""
        return self.path / "grids" / TEACHER_FILE

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; it survives kill -9 from the moment this returns."""
        append_jsonl(self.metrics, [{"step": step, **values}], "the metrics")

    def rewind(self, step: int) -> None:
        """Remove rows and grids after ``step`` (and a torn last line): the run continues from there."""
        for grid in (self.path / "grids").glob("step_*.png"):
            if grid.stem[5:].isdigit() and int(grid.stem[5:]) > step:
                with writing("the validation images", grid):
                    grid.unlink()
        if not self.metrics.exists():
            return
        rows = [row for row in _metric_rows(self.metrics) if row["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows), "the metrics")

    def note_resume(self, step: int) -> None:
        """Record in run.json that the run was resumed from ``step``, and with which versions."""
        facts = read_facts(self.path)
        resumed = [*facts.get("resumed", []), {"at": now(), "step": step, "versions": versions()}]
        write_facts(self.path, facts | {"resumed": resumed})

    def note_changes(self, step: int, changes: Sequence[Change]) -> None:
        """Record in run.json what is changed in the configuration when the run is resumed from ``step``."""
        facts = read_facts(self.path)
        # a key that one side lacks differs because of another version of gdmd
        known = [one for one in changes if MISSING not in (one.before, one.after)]
        rows = [{"at": now(), "step": step, "key": one.key, "was": one.before, "now": one.after} for one in known]
        if rows:
            write_facts(self.path, facts | {CONFIG_CHANGES: [*facts.get(CONFIG_CHANGES, []), *rows]})


def create(path: Path, config: Mapping[str, Any], command: Sequence[str] | None = None) -> Run:
    """Create a run folder for ``config`` (JSON types), or restart an interrupted run that has no checkpoint yet.

    RunError for a folder with other files, with a run of another configuration (its keys are named), or with
    checkpoints.
    """
    path = Path(path)
    check_new(path, config)
    with writing("the run folder", path):
        path.mkdir(parents=True, exist_ok=True)
        for name in ("tb", "grids", "checkpoints"):
            (path / name).mkdir(exist_ok=True)
    facts = {
        "command": list(sys.argv if command is None else command),
        "config_sha256": config_hash(config),
        "started": now(),
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }
    write_facts(path, facts)
    write_atomic(path / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False), "the configuration")
    run = Run(path, _plain(config))
    run.rewind(-1)
    return run


def open_run(path: Path) -> Run:
    """Open an existing run folder, to resume or to read it."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        seen = "it holds no config.yaml." if path.exists() else f"it does not exist.{near_name(path)}"
        raise RunError(f"{path} is not a run folder: {seen} Name a folder written by gdmd train.")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # a YAML error has several lines
        raise RunError(f"cannot read {path / 'config.yaml'}: {reason}. Restore it or start a new run.") from error
    if not isinstance(config, dict):
        raise RunError(f"{path / 'config.yaml'} is not a mapping. Restore it or start a new run.")
    return Run(path, config)


ANOTHER_FOLDER = "Choose another folder with --run, or continue that run as it is with --resume."


def check_same_config(
    run: Run, config: Mapping[str, Any], allowed: Sequence[str] = (), advice: str = ANOTHER_FOLDER
) -> None:
    """Raise a RunError that names the keys in which ``config`` differs from the run's own, except ``allowed``."""
    changes = [change for change in differing(run.config, _plain(config)) if change.key not in allowed]
    if changes:
        raise RunError(
            f"{run.path} holds a run with another configuration. Its value -> yours: {'; '.join(map(str, changes))}. "
            f"{advice}"
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl in order; null becomes NaN, a torn last line is left out."""
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in _metric_rows(file)]


def read_facts(path: Path) -> dict[str, Any]:
    """The content of run.json."""
    return read_json(Path(path) / "run.json", "Restore the file or start a new run.")


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Replace run.json."""
    write_atomic(Path(path) / "run.json", json.dumps(facts, indent=2), "the run's facts")


def config_change_lines(facts: Mapping[str, Any]) -> list[str]:
    """What was changed in the training loop when the run was resumed, for a report or card, in order.

    What may change in other sections does not affect training: validation, offloading, and file locations, which a
    published card does not show.
    """
    return [
        f"{one['key']}: {one['was']} -> {one['now']}, from step {one['step']} on"
        for one in facts.get(CONFIG_CHANGES, ())
        if one["key"].startswith("loop.")
    ]


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the configuration as canonical JSON."""
    return hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest()


class Missing:
    """The value of a key that one side lacks."""

    def __str__(self) -> str:
        return "nothing"


MISSING = Missing()


@dataclass(frozen=True)
class Change:
    """A dotted key whose value differs between two configurations; MISSING if one side lacks the key."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys whose values differ, in the order of ``old`` and then of ``new``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changes = [Change(key, before.get(key, MISSING), after.get(key, MISSING)) for key in before | after]
    return [change for change in changes if change.before != change.after]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def commit() -> str | None:
    """The git commit of this source tree ("+changes" when tracked files differ); None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None  # git is missing or refuses: a run without a known commit is still a run


def check_new(path: Path, config: Mapping[str, Any]) -> None:
    """RunError if ``create`` cannot use this folder."""
    if path.is_file():
        raise RunError(f"{path} is a file, not a folder. Choose another folder with --run.")
    with writing("the run folder", path):
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission to write in {there}")
    if not path.exists():
        return
    if (path / "config.yaml").exists():
        run = open_run(path)
        check_same_config(run, config)
        if any(run.checkpoints.glob("step_*")):
            raise RunError(
                f"{path} already holds this run, with checkpoints. Continue it with gdmd train --resume {typed(path)}, "
                "or choose another folder with --run."
            )
        return
    # these are left if a run was killed while its folder was being created
    ours = {"tb", "grids", "checkpoints", "run.json", RUN_LOCK}
    with writing("the run folder", path):
        names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if name not in ours and not name.endswith(".partial")]
    if others:
        raise RunError(
            f"{path} is not empty and is not a run folder (it holds {', '.join(others[:3])}). "
            "Choose a new or empty folder with --run."
        )


def _metric_rows(file: Path) -> list[dict[str, Any]]:
    """The rows, with integer steps; a last line that a crash cut off is left out."""
    rows = numbered_jsonl(file, torn_tail=True)
    for number, row in rows:
        try:
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise RunError(f"{file}, line {number} is not a metrics row ({error}). Delete that line.") from error
    return [row for _, row in rows]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
        return
    yield prefix, tree


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON and back: tuples become lists, so that a stored configuration equals the original."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def now() -> str:
    """Local time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
