"""Read WebDataset tars: members in order, in memory, never extracted. A truncated or damaged tar is an error.

Members whose names are equal up to the first dot belong to one entry. The readers of `datasets` and `webdataset` end
silently at a damaged header or a missing end, and lose the rest of the entries.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_MEMBERS = 10_000_000
"""A tar with more is damaged or malicious."""
_BLOCK, _CHUNK = 512, 1 << 20


@dataclass(frozen=True)
class Member:
    """A file in a tar. entry: its name up to the first dot; kind: the rest, in lower case.

    size: bytes; content: the first ``limit`` + 1 of them, none of a file with a ``lost`` name.
    """

    name: str
    entry: str
    kind: str
    size: int
    content: bytes

    @property
    def lost(self) -> bool:
        """Whether its name has another dot before the ending: 1.5.jpg has the kind 5.jpg, and belongs to entry 1."""
        return "." in self.kind


def members(path: Path, what: str, limits: Mapping[str, int]) -> Iterator[Member]:
    """The regular files of the kinds in ``limits`` (bytes to read of each), also with a ``lost`` name.

    Others, folders and links are skipped.
    ValueError that starts with ``what`` and the path for a file that is not a complete tar.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for number, info in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise ValueError(f"{what} {path}: more than {MAX_MEMBERS} members; split it")
                name = PurePosixPath(info.name)
                stem, _, kind = name.name.partition(".")
                kind = kind.lower()
                lost = stem and kind.rpartition(".")[2] in limits  # not a hidden file, such as ._a.jpg of macOS
                if info.isreg() and (kind in limits or lost):
                    content = _read(archive, info, limits[kind] + 1) if kind in limits else b""
                    yield Member(info.name[:100], str(name.parent / stem), kind, info.size, content)
            _check_end(path, archive.offset)
    except OSError as error:
        raise ValueError(f"{what} {path}: cannot be read ({error.strerror or error}); check the path") from error
    except tarfile.TarError as error:
        raise ValueError(
            f"{what} {path}: truncated, damaged, or not an uncompressed tar ({error}); copy it again, and decompress a "
            ".tar.gz"
        ) from error


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo, most: int) -> bytes:
    file = archive.extractfile(info)
    assert file is not None, "a regular file can be read"
    content = file.read(most)
    if len(content) < min(info.size, most):
        raise tarfile.ReadError("unexpected end of data")
    return content


def _check_end(path: Path, offset: int) -> None:
    """ReadError if the block of zeros that ends a tar is missing, or if anything but zeros follows it.

    tarfile stops silently at a damaged header, at the end, and at the end of the first of several tars in one file.
    """
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        more = any(part.strip(b"\0") for part in iter(lambda: file.read(_CHUNK), b""))
    if len(block) < _BLOCK:
        raise tarfile.ReadError(f"no end mark after byte {offset}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {offset}")
    if more:
        raise tarfile.ReadError(f"data after the end mark at byte {offset}; give the joined tars as separate files")
