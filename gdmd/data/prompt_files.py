"""Files of prompts, read by their ending in any case. Every prompt is checked, and an error names its line or entry.

    .txt               one prompt a line; blank lines are skipped and counted
    .csv .tsv          a header and a prompt column; quoted commas and newlines as the csv module reads them. Where the
                       header has no comma (tab), another separator is taken: Excel writes semicolons in many countries
    .jsonl .ndjson     one object a line
    .json              an array of strings or objects
    .parquet           where pyarrow is installed
    .tar               a WebDataset shard

An object's key is "prompt" or "prompts" in any case. A table's column is that, else "caption(s)" or "text(s)". Another
one can be named.

tar: members are read one after the other in memory and never extracted, so their names cannot write anywhere. Members
that begin with the same name up to the first dot are one entry; its prompt is the .txt, else the .caption, else the
.json member. Everything else (images) is passed over unread.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gdmd.io import content_hash

LONGEST_PROMPT = 4000
"""Characters. Longer lines are a malformed file (a missing newline), not a prompt."""
LARGEST_MEMBER = 1 << 20
"""Bytes of a text member of a tar; it is one prompt with its metadata."""
MOST_MEMBERS = 10_000_000
"""Members of a tar: more are a damaged or hostile file."""
TEXTS = ("txt", "caption", "json")
"""Endings of the members of a tar that hold the prompt, in the order in which they are asked."""
COLUMNS = (("prompt", "prompts"), ("caption", "captions", "text", "texts"))
"""What a prompt column is called, in lower case; a name of the first group wins over one of the second."""
NAME_IT = "name it with prompts.column=NAME (gdmd eval: --prompt-column NAME)"
ENDINGS = ".txt (one prompt a line), .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .tar (WebDataset)"
NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
"""Control characters, half characters and byte order marks: signs of another encoding, or of a binary file."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".7z")
_BLOCK = 512


@dataclass(frozen=True)
class Prompt:
    """A prompt, where it was read ("line 3", "entry 3", "member 000.txt"), and its row: "prompt" and what else is known."""

    text: str
    where: str
    meta: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file in its order. ``column``: where a table holds them; ``blank``: lines that were skipped."""

    path: Path
    prompts: tuple[Prompt, ...]
    column: str = ""
    blank: int = 0

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def meta(self) -> tuple[Mapping[str, Any], ...] | None:
        """The row of each prompt, for rewards that read more than the text; None where the file has texts only."""
        if all(prompt.meta is None for prompt in self.prompts):
            return None
        return tuple(prompt.meta or {"prompt": prompt.text} for prompt in self.prompts)

    def fingerprint(self) -> str:
        """A hash of the prompts and their rows, in order: the same for every format, ending of lines and blank line."""
        return content_hash(
            *(
                json.dumps(prompt.meta or {"prompt": prompt.text}, sort_keys=True, default=str)
                for prompt in self.prompts
            )
        )

    def note(self) -> str:
        """What the user should know: the column that was chosen, skipped lines, repeated prompts; "" for nothing."""
        repeated = len(self.prompts) - len(set(self.texts))
        facts = [
            f"read from {self.column!r}" if self.column not in ("", "prompt") else "",
            f"{self.blank} blank line{'s' * (self.blank > 1)} skipped" if self.blank else "",
            f"{repeated} repeat{'s' * (repeated == 1)} an earlier prompt" if repeated else "",
        ]
        said = "; ".join(filter(None, facts))
        return f"prompt file {self.path}: {len(self.prompts)} prompts; {said}" if said else ""


def prompts_in(path: Path, column: str | None = None) -> PromptFile:
    """Read a file by its ending; ``column``: the name of its prompt column or key.

    ValueError for an unknown ending, a malformed row, or a file without prompts.
    """
    if not os.path.isfile(path):  # False, where Path.is_file raises: a name too long, a null character
        reason = "it is a folder" if os.path.isdir(path) else "no such file"
        raise ValueError(f"prompt file {path}: cannot be read ({reason}); check the path")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        shown = f"the ending {path.suffix!r} is not known" if path.suffix else "it has no ending"
        packed = "unpack it and " if path.suffix.lower() in PACKED else ""
        raise ValueError(f"prompt file {path}: {shown}; {packed}give {ENDINGS}")
    found = read(path, column)
    if not found.prompts:
        raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
    return found


def _text(path: Path, column: str | None) -> PromptFile:
    if column is not None:
        raise ValueError(f"prompt file {path}: a .txt file has no column {column!r}; leave the column out")
    lines = _lines(path)
    _refuse_other_format(path, [line.strip() for _, line in lines if line.strip()][:1])
    found = tuple(Prompt(_checked(path, where, line), where) for where, line in lines if line.strip())
    return PromptFile(path, found, blank=len(lines) - len(found))


def _refuse_other_format(path: Path, first: Sequence[str]) -> None:
    """ValueError for a text whose first line is that of JSON or of a table: its rows would be trained on as they are."""
    for line in first:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, (dict, list)):
            raise ValueError(
                f"prompt file {path}: its first line is JSON, and a .txt file holds one prompt a line; use the ending "
                ".jsonl, or .json for an array"
            )
        cells = [cell.strip(' "').lower() for cell in re.split("[\t,;]", line)]
        names = [name for group in COLUMNS for name in group] if "\t" in line else COLUMNS[0]
        if any(cell in names for cell in cells) and all(re.fullmatch(r"\w*( \w+)?", cell) for cell in cells):
            raise ValueError(
                f"prompt file {path}: its first line {line[:60]!r} is the header of a table, and a .txt file holds one "
                "prompt a line; use the ending .csv or .tsv, or remove that line"
            )


def _json_lines(path: Path, column: str | None) -> PromptFile:
    lines = _lines(path)
    if re.match(r'\s*\[\s*([{"]|$)', next((line for _, line in lines if line.strip()), "")):
        raise ValueError(f"prompt file {path}: holds a JSON array, not one object a line; use the ending .json")
    rows = [(where, _json(path, where, line)) for where, line in lines if line.strip()]
    return _objects(path, rows, column, len(lines) - len(rows))


def _json_array(path: Path, column: str | None) -> PromptFile:
    rows = _json(path, "the file", _decoded(path))
    if not isinstance(rows, list):
        nested = isinstance(rows, dict) and any(isinstance(value, (list, dict)) for value in rows.values())
        advice = "save the array itself" if nested else "for one object a line use the ending .jsonl"
        raise ValueError(
            f'prompt file {path}: expected a JSON array of strings or of {{"prompt": "..."}}, got {type(rows).__name__}; '
            f"{advice}"
        )
    return _objects(path, [(f"entry {number}", row) for number, row in enumerate(rows, 1)], column, texts=True)


def _comma_table(path: Path, column: str | None) -> PromptFile:
    return _table(path, column, ",;\t")


def _tab_table(path: Path, column: str | None) -> PromptFile:
    return _table(path, column, "\t,;")


def _table(path: Path, column: str | None, delimiters: str) -> PromptFile:
    """A header and rows of cells; rows without any text are blank lines. The first delimiter in the header counts."""
    text = _decoded(path)
    head = text.lstrip().partition("\n")[0]
    cells = _cells(path, text, next((sign for sign in delimiters if sign in head), delimiters[0]))
    rows = [(where, row) for where, row in cells if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"prompt file {path}: is empty; it needs a header and at least one prompt")
    (where, first), *rest = rows
    header = [name.strip() for name in first]
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise ValueError(f"prompt file {path}, {where}: two columns are called {twice[0]!r}; rename one")
    named = [(where, _named(path, where, header, row)) for where, row in rest]
    chosen = _column(path, where, [name for name in header if name], column)
    return _objects(path, named, chosen, len(cells) - len(rows))


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[str, list[str]]]:
    """(line, cells) of each row. A tab table whose quotes are not CSV's, such as PartiPrompts.tsv, has none."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, list[str]]] = []
    line = 1
    try:
        for row in reader:
            rows.append((f"line {line}", row))
            line = reader.line_num + 1
    except csv.Error as error:
        if delimiter == "\t":
            return [(f"line {n}", row.split("\t")) for n, row in enumerate(text.removesuffix("\n").split("\n"), 1)]
        raise ValueError(
            f"prompt file {path}, line {line}: not a CSV row ({error}); quote a cell that holds a comma, a newline or a "
            "quote, and double the quotes inside it"
        ) from error
    return rows


def _named(path: Path, where: str, header: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    """The cells by column. A short row lacks its last cells; a long one has a separator too many."""
    if any(cell.strip() for cell in row[len(header) :]):
        raise ValueError(
            f"prompt file {path}, {where}: {len(row)} cells under {len(header)} columns; quote a cell that holds the "
            "separator"
        )
    full = [*row, *[""] * (len(header) - len(row))]
    return {name: cell for name, cell in zip(header, full, strict=False) if name}


def _parquet(path: Path, column: str | None) -> PromptFile:
    """Columns of texts, numbers and booleans; images and nested columns are not read."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"prompt file {path}: reading .parquet needs pyarrow; do: pip install pyarrow, or convert the file to .csv or "
            ".jsonl"
        ) from error
    of = arrow.types
    kinds = (of.is_string, of.is_large_string, of.is_integer, of.is_floating, of.is_boolean)
    try:
        plain = [field.name for field in parquet.read_schema(path) if any(is_kind(field.type) for is_kind in kinds)]
        rows = parquet.read_table(path, columns=plain).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"prompt file {path}: not a readable parquet file ({str(error)[:200]})") from error
    chosen = _column(path, "the columns of text and numbers", plain, column)
    return _objects(path, [(f"row {number}", row) for number, row in enumerate(rows, 1)], chosen)


def _objects(
    path: Path, rows: Sequence[tuple[str, Any]], column: str | None, blank: int = 0, *, texts: bool = False
) -> PromptFile:
    """Rows with a prompt under the same key. ``texts``: a row may also be the prompt itself."""
    found, key = [], ""
    for where, row in rows:
        if isinstance(row, dict):
            key = key or column or _key(path, where, list(row))
            found.append(_object(path, where, row, key))
        elif texts and isinstance(row, str) and column is None:
            found.append(Prompt(_checked(path, where, row), where))
        else:
            shown = json.dumps(row, ensure_ascii=False)[:60]
            raise ValueError(f'prompt file {path}, {where}: expected {{"prompt": "..."}}, got {shown}')
    return PromptFile(path, tuple(found), key, blank)


def _key(path: Path, where: str, names: Sequence[str]) -> str:
    """The prompt's key in a JSON object: "prompt" or "prompts" in any case. ValueError that shows what there is."""
    near = [name for name in names if name.lower() in COLUMNS[0]]
    if "prompt" in near or len(near) == 1:
        return "prompt" if "prompt" in near else near[0]
    raise ValueError(
        f'prompt file {path}, {where}: expected one key "prompt", got {_shown(names)}. If another one holds the prompts, '
        f"{NAME_IT}"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def _column(path: Path, where: str, names: Sequence[str], given: str | None) -> str:
    """The prompt column of a table. ValueError that shows its columns where none or several could be it."""
    if given is not None:
        if given in names:
            return given
        raise ValueError(f"prompt file {path}, {where}: has no column {given!r}; its columns are {_shown(names)}")
    for group in COLUMNS:
        near = [name for name in names if name.strip().lower() in group]
        if len(near) > 1:
            raise ValueError(
                f"prompt file {path}, {where}: {' and '.join(map(repr, near))} may be the prompts; {NAME_IT}"
            )
        if near:
            return near[0]
    raise ValueError(
        f"prompt file {path}, {where}: no column is called prompt, caption or text; its columns are {_shown(names)}. "
        f"If one of them holds the prompts, {NAME_IT}; if the file has no header, add one"
    )


def _object(path: Path, where: str, row: Mapping[str, Any], key: str) -> Prompt:
    """The prompt of a row, and the row with that prompt under "prompt"."""
    text = row.get(key)
    if not isinstance(text, str):
        got = json.dumps(text, ensure_ascii=False)[:60] if key in row else f"only {_shown(list(row))}"
        raise ValueError(
            f"prompt file {path}, {where}: {key!r} must be a text, got {got}; write a prompt or remove the row"
        )
    prompt = _checked(path, where, text)
    other = {name: value for name, value in row.items() if name != key or name == "prompt"}
    return Prompt(prompt, where, ({} if "prompt" in other else {"prompt": prompt}) | other | {"prompt": prompt})


def _lines(path: Path) -> list[tuple[str, str]]:
    """Without splitlines(), which would also cut at U+2028: JSON allows it in a string."""
    lines = _decoded(path).split("\n")
    return [(f"line {number}", line) for number, line in enumerate(lines if lines[-1] else lines[:-1], 1)]


def _decoded(path: Path) -> str:
    """The file's text with "\n" line ends."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompt file {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def _checked(path: Path, where: str, line: str) -> str:
    if not line.strip():
        raise ValueError(f"prompt file {path}, {where}: the prompt is empty; remove it or write a prompt")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"prompt file {path}, {where}: {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := NO_TEXT.search(line):
        raise ValueError(
            f"prompt file {path}, {where}: the character U+{ord(found[0]):04X} is not text; "
            "convert the file to UTF-8 and remove it"
        )
    return line.strip()


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        hint = "; for one object a line use the ending .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"prompt file {path}, {where}: not JSON ({error.msg} at {place} {error.colno}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ValueError(f"prompt file {path}, {where}: cannot be read as JSON ({error})") from error


def _archive(path: Path, column: str | None) -> PromptFile:
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
    if not entries:
        raise ValueError(f"prompt file {path}: holds no member that ends in .txt, .caption or .json")
    return PromptFile(path, tuple(_entry(path, name, parts, column) for name, parts in entries.items()))


def _entry(path: Path, name: str, parts: Mapping[str, str], column: str | None) -> Prompt:
    ending = next(ending for ending in TEXTS if ending in parts)
    where = f"member {name}.{ending}"
    if ending == "json":
        return _objects(path, [(where, _json(path, where, parts[ending]))], column).prompts[0]
    text = _checked(path, where, parts[ending])
    known = _json(path, f"member {name}.json", parts["json"]) if "json" in parts else None
    return Prompt(text, where, {"prompt": text} | known | {"prompt": text} if isinstance(known, dict) else None)


def _take(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, entries: dict[str, dict[str, str]]) -> None:
    """Keep a member that holds text; links, folders and images are left where they are."""
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


_READERS: Mapping[str, Callable[[Path, str | None], PromptFile]] = {
    ".txt": _text,
    ".csv": _comma_table,
    ".tsv": _tab_table,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
    ".tar": _archive,
}
