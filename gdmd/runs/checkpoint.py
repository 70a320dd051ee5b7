"""Checkpoints that are whole or absent: step_000040/ with one safetensors file per part and state.json.

A checkpoint is written into a hidden sibling, fsynced and renamed; state.json holds the sha256 of every file and of
itself. Reading takes the newest that verifies and says which file of a newer one was damaged. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.runs.errors import RunError, writing

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})", re.ASCII)  # as save() writes it: one name per step
_FILE = re.compile(r"[^/\\\0]+\.safetensors")  # inside the checkpoint's folder
_CHUNK = 1 << 22  # bytes per read when hashing: 4 MiB


class DamagedCheckpoint(RunError):
    """A checkpoint that does not verify; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. ``messages`` tells of newer checkpoints that were damaged and passed over."""

    step: int
    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    messages: tuple[str, ...] = ()

    def part(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a part; empty when it had none."""
        return self.tensors.get(name, {})


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write checkpoint ``step`` and delete all but the ``keep`` newest (0 = keep all). Returns its folder.

    On failure (full disk, ...) nothing is left behind, the older checkpoints stay, and a RunError says so.
    """
    folder = Path(folder)
    final = folder / f"step_{step:06d}"
    partial = folder / f".step_{step:06d}.partial"
    left = f"Nothing was half-written; {len(steps(folder))} older checkpoint(s) are intact."
    with writing("the checkpoint", final, left):
        try:
            _clear(folder)
            partial.mkdir(parents=True)
            _write(partial, step, tensors, state)
            if final.exists():  # a damaged or abandoned one of the same step
                final.rename(folder / f".step_{step:06d}.replaced")
            partial.rename(final)
            _fsync(folder)
            _clear(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        older = [number for number in steps(folder) if number <= step]
        for number in older[:-keep] if keep else []:
            shutil.rmtree(folder / f"step_{number:06d}")
    return final


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder; a DamagedCheckpoint names the file that is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = _read_state(path)
    tensors = {}
    for name, digest in state["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        try:
            if _sha256(file) != digest:
                raise DamagedCheckpoint(f"{file} is damaged (its sha256 differs from the one in state.json)")
            tensors[file.stem] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{file} cannot be read ({error})") from error
    return Checkpoint(state["step"], path, tensors, state["state"])


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None when there is none at all; RunError when all are damaged."""
    found = steps(folder)
    messages: list[str] = []
    for step in reversed(found):
        try:
            checkpoint = load(Path(folder) / f"step_{step:06d}")
        except DamagedCheckpoint as error:
            messages.append(f"{error}; checkpoint step {step} was passed over")
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


def _write(partial: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    digests = {}
    for part, named in tensors.items():
        if not named:
            continue
        file = partial / f"{part}.safetensors"
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
        try:
            save_file(plain, file)
        except SafetensorError as error:  # its writer wraps the OSError in a message
            raise OSError(_errno(str(error)), f"{file.name}: {error}") from error
        _fsync(file)
        digests[file.name] = _sha256(file)
    body = {"format": FORMAT, "step": step, "files": digests, "state": dict(state)}
    with (partial / "state.json").open("w", encoding="utf-8") as text:
        json.dump(body | {"sha256": _digest(body)}, text, indent=2)
        text.flush()
        os.fsync(text.fileno())
    _fsync(partial)


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        verifies = digest == _digest(body)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is missing or damaged ({error})") from error
    if not verifies:
        raise DamagedCheckpoint(f"{file} is damaged (its sha256 differs)")
    if body.get("format") != FORMAT:
        raise RunError(f"{file} has format {body.get('format')}, not {FORMAT}: use the gdmd that wrote it.")
    files, kinds = body.get("files"), (int, dict, dict)
    whole = all(isinstance(body.get(key), kind) for key, kind in zip(("step", "files", "state"), kinds, strict=True))
    if not whole or not all(_FILE.fullmatch(name) for name in files):
        raise DamagedCheckpoint(f"{file} lacks step, files or state, or names a file outside its folder")
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


def _errno(message: str) -> int:
    """The errno in a safetensors message such as "I/O error: No space left on device (os error 28)"."""
    tail = message.partition("os error ")[2]
    digits = tail.partition(")")[0]
    return int(digits) if digits.isdigit() else 0
