"""The error of this package: something about files on disk that the user can mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
