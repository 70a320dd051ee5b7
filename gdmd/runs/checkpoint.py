"""Checkpoints that are complete or absent: step_000040/ with one safetensors file per part and state.json.

A checkpoint is written to a hidden sibling folder, fsynced and renamed; state.json holds the sha256 of every file and
of itself. Reading takes the newest that verifies and names the damaged file of a newer one. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.io import RunError, follow_umask, number_in, writing
from gdmd.runs.best_checkpoint import FILE as BEST_FILE
from gdmd.runs.best_checkpoint import Best, named_best, write_best

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})", re.ASCII)  # as save() writes it: one name per step
_FILE = re.compile(r"[^/\\\0]+\.safetensors")  # inside the checkpoint's folder
_log = logging.getLogger(__name__)
_CHUNK = 1 << 22  # bytes per read when hashing: 4 MiB


class DamagedCheckpoint(RunError):
    """A checkpoint that does not verify; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. ``messages`` name newer checkpoints that are damaged and were skipped."""

    step: int
    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    messages: tuple[str, ...] = ()

    def part(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a part; empty when it had none."""
        return self.tensors.get(name, {})


@dataclass(frozen=True)
class _Target:
    """Where checkpoint ``step`` goes."""

    folder: Path
    step: int

    @property
    def final(self) -> Path:
        return self.folder / f"step_{self.step:06d}"

    @property
    def partial(self) -> Path:
        return self.folder / f".step_{self.step:06d}.partial"

    def consequence(self) -> str:
        """What a failed save leaves, for the error."""
        newest = max(steps(self.folder), default=None)
        older = "there is no older one" if newest is None else f"the checkpoint of step {newest} is intact"
        return f"No partial checkpoint was left; {older}."


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 0,
    candidate: Best | None = None,
) -> Path:
    """Write checkpoint ``step`` and delete all but the ``keep`` newest (0 = keep all) and the best. Returns its folder.

    ``candidate``: the score of this checkpoint; it becomes the best one if it improves on the previous best. On failure
    (full disk, ...) nothing is left behind, the older checkpoints stay, and a RunError says so.
    """
    target = _Target(Path(folder), step)
    with _complete_or_absent(target):
        _clear(target.folder)
        target.partial.mkdir(parents=True)
        digests = {f"{part}.safetensors": _write(target, part, named) for part, named in tensors.items() if named}
        _commit(target, digests, state)
    with writing("the checkpoint", target.final, target.consequence()):
        _choose_and_rotate(target, keep, candidate)
    return target.final


def _write(target: _Target, part: str, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file into the hidden folder; its sha256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = target.partial / f"{part}.safetensors"
    try:
        save_file(_separate(tensors), file)
    except SafetensorError as error:  # its writer wraps the OSError in a message
        raise OSError(number_in(str(error)), f"{file.name}: {error}") from error
    follow_umask(file)
    _fsync(file)
    return _sha256(file)


def _commit(target: _Target, digests: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Sign the files and rename the hidden folder: from then on the checkpoint exists."""
    final, folder = target.final, target.folder
    body = {"format": FORMAT, "step": target.step, "files": dict(digests), "state": dict(state)}
    with (target.partial / "state.json").open("w", encoding="utf-8") as text:
        json.dump(body | {"sha256": _digest(body)}, text, indent=2)
        text.flush()
        os.fsync(text.fileno())
    _fsync(target.partial)
    if final.exists():  # a damaged or abandoned one of the same step
        final.rename(folder / f".step_{target.step:06d}.replaced")
    target.partial.rename(final)
    _fsync(folder)
    _clear(folder)


def load(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read and verify one checkpoint folder; a DamagedCheckpoint names the file that is wrong.

    ``verify`` may be false if another rank has just compared the sums.
    """
    from safetensors.torch import load_file

    state = _checked(path, verify=verify)
    tensors = {}
    for name in state["files"]:
        with _damage(path / name):
            tensors[(path / name).stem] = load_file(path / name)
    return Checkpoint(state["step"], path, tensors, state["state"])


def newest_intact(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """The newest step that verifies (None without one), and what is wrong with each newer one. No tensor is loaded."""
    messages = []
    for step in reversed(steps(folder)):
        try:
            _checked(Path(folder) / f"step_{step:06d}", verify=True)
        except DamagedCheckpoint as error:
            messages.append(str(error))
            continue
        return step, tuple(messages)
    return None, tuple(messages)


def _checked(path: Path, *, verify: bool) -> dict[str, Any]:
    """state.json of a checkpoint whose files all exist and, if ``verify``, have the content that was saved."""
    state = _read_state(path)
    for name, digest in state["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        with _damage(file):
            if verify and _sha256(file) != digest:
                raise DamagedCheckpoint(f"{file} is damaged (its sha256 differs from the one in state.json)")
    return state


def shapes(path: Path, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors by name, from the header of its file alone."""
    from safetensors import safe_open

    file = path / f"{part}.safetensors"
    if file.name not in _read_state(path)["files"]:
        return {}
    with _damage(file), safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def load_chosen(folder: Path, which: str = "last") -> Checkpoint | None:
    """Checkpoint "best", "last" (the newest that verifies) or of a step; None when "last" finds none at all.

    A damaged newest one is skipped with a warning that names the step used instead; a damaged or missing best one, or
    step, is a RunError.
    """
    folder = Path(folder)
    if which == "last":
        saved = load_newest(folder)
        for message in saved.messages if saved else ():
            _log.warning("%s; step %d is used", message, saved.step if saved else 0)
        return saved
    try:
        return load(chosen_path(folder, which))
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}. Restore it, or choose another checkpoint: last, or a step.") from error


def chosen_path(folder: Path, which: str) -> Path:
    """The folder of checkpoint "best" or of a step. RunError if it does not exist."""
    if which == "best":
        which = str(_best_step(folder))
    path = folder / f"step_{int(which):06d}" if re.fullmatch(r"\d{1,18}", which, re.ASCII) else None
    if path is None or not path.is_dir():
        raise RunError(f"there is no checkpoint {which!r} in {folder}: give best, last or a step ({_listed(folder)}).")
    return path


def _best_step(folder: Path) -> int:
    best = named_best(folder)
    if best is None:
        raise RunError(
            f"{folder} has no best checkpoint: a run keeps one only if loop.best_metric is set. Choose another "
            f"checkpoint: last, or a step ({_listed(folder)})."
        )
    if best.step not in steps(folder):
        raise RunError(
            f"{folder / BEST_FILE} names step {best.step} ({best.metric} = {best.value:g}), which is not in {folder} "
            f"({_listed(folder)}). Restore it, or choose another checkpoint: last, or a step."
        )
    return best.step


def _listed(folder: Path) -> str:
    return f"there are: {', '.join(map(str, steps(folder))) or 'none'}"


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when there is none at all; RunError when all are damaged."""
    found = steps(folder)
    messages: list[str] = []
    for step in reversed(found):
        try:
            checkpoint = load(Path(folder) / f"step_{step:06d}")
        except DamagedCheckpoint as error:
            messages.append(f"{error}; checkpoint step {step} was skipped")
            continue
        return Checkpoint(checkpoint.step, checkpoint.path, checkpoint.tensors, checkpoint.state, tuple(messages))
    if found:
        raise RunError(
            f"no checkpoint in {folder} can be used: {'; '.join(messages)}. Restore one, or start a new run."
        )
    return None


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending. Unfinished ones have hidden names and do not count."""
    names = (entry.name for entry in Path(folder).glob("step_*") if entry.is_dir())
    return sorted(int(name[5:]) for name in names if _NAME.fullmatch(name))


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than ``step`` (damaged ones) to *.damaged, so that none is taken for the newest."""
    moved = []
    for newer in (number for number in steps(folder) if number > step):
        path = Path(folder) / f"step_{newer:06d}"
        aside = path.with_name(path.name + ".damaged")
        with writing("the checkpoint", aside):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        moved.append(aside)
    return moved


def _choose_and_rotate(target: _Target, keep: int, candidate: Best | None) -> None:
    """The best checkpoint is named before anything is deleted, and never deleted."""
    folder = target.folder
    best = named_best(folder)
    if best and best.step not in steps(folder):
        _log.warning("the best checkpoint, step %d (%s = %g), is missing", best.step, best.metric, best.value)
        best = None
    if candidate is not None and candidate.improves_on(best):
        best = candidate
        write_best(folder, best)
    older = [number for number in steps(folder) if number <= target.step]
    for number in older[:-keep] if keep else []:
        if best is None or number != best.step:
            shutil.rmtree(folder / f"step_{number:06d}")


@contextmanager
def _complete_or_absent(target: _Target) -> Iterator[None]:
    """An OSError inside removes the hidden folder and becomes a RunError."""
    with writing("the checkpoint", target.final, target.consequence()):
        try:
            yield
        except OSError:
            shutil.rmtree(target.partial, ignore_errors=True)
            raise


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """An unreadable file means a damaged checkpoint."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from error


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and none a view of memory that others use: safetensors refuses those."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in named.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.numel() * own.element_size():
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    if not file.exists():
        raise DamagedCheckpoint(f"{file} is missing")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        verifies = digest == _digest(body)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged ({error})") from error
    if not verifies:
        raise DamagedCheckpoint(f"{file} is damaged (its sha256 differs)")
    if body.get("format") != FORMAT:
        raise RunError(f"{file} has format {body.get('format')}, not {FORMAT}: use the version of gdmd that wrote it.")
    files, kinds = body.get("files"), (int, dict, dict)
    whole = all(isinstance(body.get(key), kind) for key, kind in zip(("step", "files", "state"), kinds, strict=True))
    if not whole or not all(_FILE.fullmatch(name) for name in files):
        raise DamagedCheckpoint(f"{file} lacks step, files or state, or names a file outside its folder")
    if _NAME.fullmatch(path.name) and int(path.name[5:]) != body["step"]:
        raise DamagedCheckpoint(f"{path} holds step {body['step']}, so it was renamed: call it step_{body['step']:06d}")
    return dict(body)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for pattern in (".step_*.partial", ".step_*.replaced"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)
