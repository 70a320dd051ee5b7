"""Reading and writing files: atomic writes, JSON lines, content hashes, and the error for what the user can fix."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHARDS_STAY = "Finished shards stay: the same command goes on."
"""What a full disk costs where much is computed once."""


class RunError(ValueError):
    """A run folder, checkpoint or asset that cannot be read or written; the message says what to do."""


_ADVICE = {
    errno.ENOSPC: "Free some disk space, or choose another folder",
    errno.EDQUOT: "Free some of the disk quota, or choose another folder",
    errno.EACCES: "Check the folder's permissions, or choose another folder",
    errno.EPERM: "Check the folder's permissions, or choose another folder",
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.ENOTDIR: "A part of the path is a file: choose another folder",
}


@contextmanager
def writing(what: str, path: Path, consequence: str = "", option: str = "--run") -> Iterator[None]:
    """Turn a full disk or unwritable folder met while writing ``path`` into one clear RunError.

    ``option``: what names the folder. safetensors has an error of its own kind, with the system's in its message.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        number = error.errno if isinstance(error, OSError) else number_in(str(error))
        advice = _ADVICE.get(number or 0, "Check the disk and the folder, or choose another folder")
        reason = getattr(error, "strerror", None) or str(error)
        sentences = [f"cannot write {what} {path}: {reason}.", consequence, f"{advice} with {option}."]
        raise RunError(" ".join(filter(None, sentences))) from error


def number_in(message: str) -> int:
    """The errno in a safetensors message such as "I/O error: No space left on device (os error 28)"."""
    tail = message.partition("os error ")[2]
    digits = tail.partition(")")[0]
    return int(digits) if digits.isdigit() else 0


def write_atomic(path: Path, content: str | bytes, what: str, option: str = "--run") -> None:
    """Write a file so that a reader, or a crash, sees the old or the new content and never a part of it.

    ``what`` and ``option`` are for the error: what could not be written, and which option names another folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(what, path, option=option):
        try:
            with partial.open("wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_jsonl(path: Path, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; blank lines are skipped.

    ``torn_tail``: for files that gdmd appends to. A last line without a newline that is not a JSON object was cut off
    by a crash and is left out. Any other damage is a RunError that names the line. Lines end at newlines only:
    ``str.splitlines`` would also split at U+2028, which JSON allows inside a string.
    """
    rows = []
    for number, line, whole in _lines(path):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            if torn_tail and not whole:
                break
            raise RunError(f"{path}, line {number}: {error}. Fix or delete that line.") from error
        rows.append(row)
    return rows


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], what: str, option: str = "--run") -> None:
    """Append rows to a JSON lines file. NaN and infinity are written as null; a torn last line is removed first."""
    text = "".join(json.dumps(finite_or_none(row)) + "\n" for row in rows)
    with writing(what, path, option=option):
        if path.exists():
            _mend_tail(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(number, text, ends in a newline) of each line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. Check that it exists and is readable.") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            # A cut-off line may end inside a character: what cannot be decoded is no JSON either.
            yield number, line.decode("utf-8", errors="surrogateescape"), number < len(lines)


def _mend_tail(path: Path) -> None:
    content = path.read_bytes()
    kept, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    try:
        complete = isinstance(json.loads(tail), dict)
    except (ValueError, RecursionError):
        complete = False
    write_atomic(path, content + b"\n" if complete else kept + newline, "the repaired file")


def finite_or_none(value: Any) -> Any:
    """NaN and infinity as None (JSON has no word for them), through mappings and lists."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. RunError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. Check that it exists and is readable.") from error


def content_hash(*parts: str | bytes) -> str:
    """SHA-256 of several pieces of content, in hexadecimal; where one part ends and the next begins counts."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


_WEIGHTS = (".safetensors", ".bin", ".json")
_hashes: dict[tuple[str, int, int], str] = {}


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the weight and config files of a folder, or of one file.

    Files are hashed once per process while their size and time stay. RunError where there is nothing to hash.
    """
    if folder.is_file():
        return _cached_hash(folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file())
    if not files:
        raise RunError(f"{folder} holds no weights ({', '.join(_WEIGHTS)}). Check the path.")
    return content_hash(*(part for path in files for part in (path.relative_to(folder).as_posix(), _cached_hash(path))))


def _cached_hash(path: Path) -> str:
    known = path.stat()
    key = (str(path.resolve()), known.st_size, known.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = file_hash(path)
    return _hashes[key]
