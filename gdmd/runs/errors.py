"""The error of this package: something about files on disk that the user can mend."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(ValueError):
    """A run folder, checkpoint or asset that cannot be read or written; the message says what to do."""


_ADVICE = {
    errno.ENOSPC: "Free some disk space, or choose another folder with --run.",
    errno.EDQUOT: "Free some of the disk quota, or choose another folder with --run.",
    errno.EACCES: "Check the folder's permissions, or choose another folder with --run.",
    errno.EPERM: "Check the folder's permissions, or choose another folder with --run.",
    errno.EROFS: "The file system is read-only: choose another folder with --run.",
    errno.ENOTDIR: "A part of the path is a file: choose another folder with --run.",
}


@contextmanager
def writing(what: str, path: Path, consequence: str = "") -> Iterator[None]:
    """Turn an OSError (full disk, unwritable folder) raised while writing ``path`` into one clear RunError."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Check the disk and the folder, or choose another folder with --run.")
        reason = error.strerror or str(error)
        sentences = [f"cannot write {what} {path}: {reason}.", consequence, advice]
        raise RunError(" ".join(filter(None, sentences))) from error
