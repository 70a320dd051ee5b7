"""Files of prompts: txt, jsonl, json and WebDataset tar. Every prompt is checked, and an error says where it stands.

tar: members are read one after the other in memory and never extracted, so their names cannot write anywhere. Members
that begin with the same name up to the first dot are one entry; its prompt is the .txt, else the .caption, else the
.json member. Everything else (pictures) is passed over unread.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

LONGEST_PROMPT = 4000
"""Characters. Longer lines are a malformed file (a missing newline), not a prompt."""
LARGEST_MEMBER = 1 << 20
"""Bytes of a text member of a tar; it is one prompt with its metadata."""
MOST_MEMBERS = 10_000_000
"""Members of a tar: more are a damaged or hostile file."""
TEXTS = ("txt", "caption", "json")
"""Endings of the members of a tar that hold the prompt, in the order in which they are asked."""
NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
"""Control characters, half characters and byte order marks: signs of another encoding, or of a binary file."""
_BLOCK = 512


@dataclass(frozen=True)
class Prompt:
    """A prompt, what else is known of it, and where it stands: "line 3", "entry 3", "member 000.txt"."""

    text: str
    where: str
    meta: Mapping[str, Any] | None = None


def prompts_in(path: Path) -> tuple[Prompt, ...]:
    """All prompts of a file in its order, by the file's ending. ValueError for what is malformed, or for none."""
    if path.suffix == ".tar":
        found = tuple(_archive(path))
        if not found:
            raise ValueError(f"prompt file {path}: holds no member that ends in .txt, .caption or .json")
        return found
    text = _decoded(path)
    if path.suffix == ".json":
        found = tuple(_array(path, text))
        if not found:
            raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
        return found
    lines = re.split(r"\r\n|\r|\n", text)  # splitlines() would also cut at U+2028, which JSON allows in a string
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
    places = ((f"line {number}", line) for number, line in enumerate(lines, 1))
    if path.suffix == ".jsonl":
        return tuple(_object(path, where, _json(path, where, line), line) for where, line in places)
    return tuple(Prompt(_checked(path, where, line), where) for where, line in places)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompt file {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def _checked(path: Path, where: str, line: str) -> str:
    if not line.strip():
        raise ValueError(f"prompt file {path}, {where}: empty line; remove it or write a prompt")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"prompt file {path}, {where}: {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := NO_TEXT.search(line):
        raise ValueError(
            f"prompt file {path}, {where}: the character U+{ord(found[0]):04X} is no text; "
            "convert the file to UTF-8 and remove it"
        )
    return line.strip()


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise ValueError(f"prompt file {path}, {where}: not JSON ({error.msg} at {place} {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ValueError(f"prompt file {path}, {where}: cannot be read as JSON ({error})") from error


def _object(path: Path, where: str, row: Any, shown: str) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'prompt file {path}, {where}: expected {{"prompt": "..."}}, got {shown[:60]!r}')
    return Prompt(_checked(path, where, row["prompt"]), where, row)


def _array(path: Path, text: str) -> Iterator[Prompt]:
    """A JSON array of strings, or of objects with "prompt"."""
    rows = _json(path, "the file", text)
    if not isinstance(rows, list):
        raise ValueError(
            f'prompt file {path}: expected a JSON array of strings or of {{"prompt": "..."}}, got '
            f"{type(rows).__name__}; for one object a line use the ending .jsonl"
        )
    for number, row in enumerate(rows, 1):
        where = f"entry {number}"
        if isinstance(row, str):
            yield Prompt(_checked(path, where, row), where)
        else:
            yield _object(path, where, row, repr(row))


def _archive(path: Path) -> Iterator[Prompt]:
    """The prompts of a WebDataset tar in the order of its entries."""
    entries: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for number, member in enumerate(archive):
                if number >= MOST_MEMBERS:
                    raise ValueError(f"prompt file {path}: more than {MOST_MEMBERS} members; divide it")
                _take(path, archive, member, entries)
            check_end(path, archive.offset)
    except OSError as error:
        raise ValueError(f"prompt file {path}: cannot be read ({error.strerror or error}); check the path") from error
    except tarfile.TarError as error:
        raise ValueError(
            f"prompt file {path}: truncated, damaged, or no plain tar ({error}); copy it again, and unpack a .tar.gz"
        ) from error
    for key, parts in entries.items():
        ending = next(ending for ending in TEXTS if ending in parts)
        where = f"member {key}.{ending}"
        if ending == "json":
            yield _object(path, where, _json(path, where, parts[ending]), parts[ending])
        else:
            known = _json(path, f"member {key}.json", parts["json"]) if "json" in parts else None
            yield Prompt(_checked(path, where, parts[ending]), where, known if isinstance(known, dict) else None)


def _take(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, entries: dict[str, dict[str, str]]) -> None:
    """Keep a member that holds text; links, folders and pictures are left where they are."""
    stem, dot, ending = PurePosixPath(member.name).name.partition(".")
    if not member.isreg() or not dot or ending.lower() not in TEXTS:
        return
    where = f"member {member.name[:100]!r}"
    if member.size > LARGEST_MEMBER:
        raise ValueError(f"prompt file {path}, {where}: {member.size} bytes; at most {LARGEST_MEMBER}")
    opened = archive.extractfile(member)
    assert opened is not None, "a regular member can be read"
    content = opened.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    own = entries.setdefault(str(PurePosixPath(member.name).parent / stem), {})
    if ending.lower() in own:
        raise ValueError(f"prompt file {path}, {where}: comes twice; give every entry its own name")
    try:
        own[ending.lower()] = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {path}, {where}: not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error


def check_end(path: Path, offset: int) -> None:
    """tarfile stops in silence at a damaged header and at a missing end: the end is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError(f"no end mark after byte {offset}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {offset}")
