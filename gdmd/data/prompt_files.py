"""Prompt files, read by their extension. Every prompt is checked, and an error names its line or entry.

    .txt               one prompt per line; blank lines are skipped and counted
    .csv .tsv          a header with a prompt column. Without a comma (tab) in the header, the separator is a semicolon, as
                       Excel writes it in many countries, or a tab (comma)
    .jsonl .ndjson     one object per line
    .json              an array of strings or objects
    .parquet           if pyarrow is installed
    .tar               a WebDataset shard (see ``webdataset``); the prompt is the .txt, else the .caption, else the .json

The prompt is under "prompt" or "prompts" in any case, in tables also under "caption(s)" or "text(s)"; another column can
be named.

The `datasets` library would be shorter, but it silently reads wrong prompts from tables with semicolons, unquoted commas or
PartiPrompts' quotes, and loses the rest of a truncated or damaged tar.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gdmd.data.webdataset import members
from gdmd.io import content_hash

LONGEST_PROMPT = 4000
"""Characters. A longer line is a malformed file (a missing newline), not a prompt."""
MAX_MEMBER_BYTES = 1 << 20
"""Largest text member of a tar, which is one prompt with its metadata."""
TEXTS = ("txt", "caption", "json")
"""Members of a tar, or files next to an image, that contain the prompt; the first that exists counts."""
COLUMNS = (("prompt", "prompts"), ("caption", "captions", "text", "texts"))
"""Names of prompt columns, in lower case; the first group wins over the second."""
TEACHER_PROMPT = "teacher_prompt"
"""The column with what the teacher reads in place of the prompt; where it is missing or empty, it reads the prompt."""
NAME_IT = "name it with prompts.column=NAME (gdmd eval: --prompt-column NAME)"
RENAME_IT = 'rename it to "prompt"'
EXTENSIONS = ".txt (one prompt per line), .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .tar (WebDataset)"
NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
"""Control characters, surrogates and byte order marks: signs of another encoding, or of a binary file."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".7z")

SHOWN_MISTAKES = 5
"""Most mistakes of a file that an error lists."""
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A prompt, its location ("line 3", "entry 3", "member 000.txt"), and its row: "prompt" and other columns."""

    text: str
    where: str
    meta: Mapping[str, Any] | None = None


def teacher_prompt(row: Mapping[str, Any], prompt: str) -> str:
    """What the teacher reads for a prompt."""
    given = row.get(TEACHER_PROMPT)
    return given.strip() if isinstance(given, str) and given.strip() else prompt


def without_teacher(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row as the rewards get it."""
    return {name: value for name, value in row.items() if name != TEACHER_PROMPT} if TEACHER_PROMPT in row else row


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file or a Python object in order. ValueError for a teacher prompt that is not a string.

    source: what they were read from, for messages: "prompt file a.txt". column: their column in a table. blank: number of
    skipped lines.
    """

    source: str
    prompts: tuple[Prompt, ...]
    column: str = ""
    blank: int = 0

    def __post_init__(self) -> None:
        _each([(one.where, one) for one in self.prompts], partial(_check_teacher, self.source))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...] | None:
        """The row of each prompt, with its teacher prompt; None if the file has only texts."""
        if all(prompt.meta is None for prompt in self.prompts):
            return None
        return tuple(prompt.meta or {"prompt": prompt.text} for prompt in self.prompts)

    @property
    def meta(self) -> tuple[Mapping[str, Any], ...] | None:
        """``rows`` without teacher prompts, for rewards that need more than the text."""
        rows = self.rows
        return tuple(without_teacher(row) for row in rows) if rows else None

    def fingerprint(self) -> str:
        """A hash of the prompts and their rows in order, independent of format, line endings and blank lines."""
        rows = (prompt.meta or {"prompt": prompt.text} for prompt in self.prompts)
        return content_hash(*(json.dumps(row, sort_keys=True, default=_stable) for row in rows))

    def note(self) -> str:
        """A note for the user on the column, skipped lines, repeated prompts and teacher prompts; "" without them."""
        repeated = len(self.prompts) - len(set(self.texts))
        taught = sum(teacher_prompt(prompt.meta or {}, prompt.text) != prompt.text for prompt in self.prompts)
        unused = not taught and any(TEACHER_PROMPT in (prompt.meta or {}) for prompt in self.prompts)
        facts = [
            f"read from {self.column!r}" if self.column not in ("", "prompt") else "",
            f"{self.blank} blank line{'s' * (self.blank > 1)} skipped" if self.blank else "",
            f"{repeated} repeat{'s' * (repeated == 1)} an earlier prompt" if repeated else "",
            f"{taught} {'has' if taught == 1 else 'have'} a teacher prompt" if taught else "",
            f"no {TEACHER_PROMPT} differs from its prompt, so the teacher reads the prompts" if unused else "",
        ]
        note = "; ".join(filter(None, facts))
        return f"{self.source}: {len(self.prompts)} prompts; {note}" if note else ""


def prompts_in(path: Path, column: str | None = None) -> PromptFile:
    """Read a file by its extension; ``column``: the name of its prompt column or key.

    ValueError for an unknown extension, a malformed row, or a file without prompts.
    """
    if not os.path.isfile(path):  # Path.is_file raises for long names and null characters
        reason = "it is a folder" if os.path.isdir(path) else "no such file"
        raise ValueError(f"prompt file {path}: cannot be read ({reason}); check the path")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        shown = f"unknown extension {path.suffix!r}" if path.suffix else "it has no extension"
        packed = "decompress it and " if path.suffix.lower() in PACKED else ""
        raise ValueError(f"prompt file {path}: {shown}; {packed}use {EXTENSIONS}")
    found = read(path, column)
    if not found.prompts:
        raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
    return found


def _stable(value: Any) -> str:
    """A value that JSON has no type for, as a string that every process gives it; images and arrays are hashed."""
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):
        size = getattr(value, "shape", None) or getattr(value, "size", "")
        return content_hash(type(value).__name__, str(size), value.tobytes())
    if isinstance(value, set | frozenset):
        return json.dumps(sorted(map(str, value)))
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text  # an address in memory


def _label(path: Path) -> str:
    return f"prompt file {path}"


def prompts_in_rows(source: str, rows: Sequence[Any]) -> PromptFile:
    """The prompts of Python objects: strings, or mappings with a prompt column as in tables. Blank ones are skipped.

    source: their name in errors, which also say the index. ValueError as for files.
    """
    first = next((row for row in rows if isinstance(row, Mapping)), None)
    key = None if first is None else _column(source, "the first row", [str(name) for name in first], None)
    plain: list[Any] = [_named_columns(row) if isinstance(row, Mapping) else row for row in rows]
    found = [(f"index {k}", row) for k, row in enumerate(plain)]
    kept = [(where, row) for where, row in found if not _is_blank(row.get(key) if isinstance(row, dict) else row)]
    if not kept:
        raise ValueError(f"{source}: has no prompts; it needs at least one")
    return _objects(source, kept, key, len(rows) - len(kept), texts=True)


def _named_columns(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row with strings as column names: a table may number its columns, and rewards get them as keyword arguments."""
    return {str(name): value for name, value in row.items()}


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _text(path: Path, column: str | None) -> PromptFile:
    if column is not None:
        raise ValueError(f"prompt file {path}: a .txt file has no column {column!r}; leave the column out")
    lines = _lines(path)
    _check_format(path, next((line.strip() for _, line in lines if line.strip()), ""))
    kept = [(where, line) for where, line in lines if line.strip()]
    found = _each(kept, lambda where, line: Prompt(_checked(_label(path), where, line), where))
    return PromptFile(_label(path), tuple(found), blank=len(lines) - len(found))


def _each(rows: Iterable[tuple[str, Any]], read: Callable[[str, Any], T]) -> list[T]:
    """read(place, content) of each row. One ValueError for all mistakes; it shows the first ones."""
    found: list[T] = []
    mistakes: list[str] = []
    for where, row in rows:
        try:
            found.append(read(where, row))
        except ValueError as error:
            mistakes.append(str(error))
    if more := mistakes[SHOWN_MISTAKES:]:
        mistakes[SHOWN_MISTAKES:] = [f"and {len(more)} more"]
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return found


def _check_format(path: Path, first: str) -> None:
    """ValueError for a .txt whose first line is JSON or the header of a table: its raw rows would become prompts."""
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, (dict, list)):
        raise ValueError(
            f"prompt file {path}: its first line is JSON, but a .txt file has one prompt per line; use the extension "
            ".jsonl, or .json for an array"
        )
    cells = [cell.strip(' "').lower() for cell in re.split("[\t,;]", first)]
    names = [name for group in COLUMNS for name in group] if "\t" in first else COLUMNS[0]
    if any(cell in names for cell in cells) and all(re.fullmatch(r"\w*( \w+)?", cell) for cell in cells):
        raise ValueError(
            f"prompt file {path}: its first line {first[:60]!r} is the header of a table, but a .txt file has one prompt "
            "per line; use the extension .csv or .tsv, or remove that line"
        )


def _json_lines(path: Path, column: str | None) -> PromptFile:
    lines = _lines(path)
    if re.match(r'\s*\[\s*([{"]|$)', next((line for _, line in lines if line.strip()), "")):
        raise ValueError(f"prompt file {path}: contains a JSON array, not one object per line; use the extension .json")
    kept = [(where, line) for where, line in lines if line.strip()]
    rows = _each(kept, lambda where, line: (where, _json(path, where, line)))
    return _objects(_label(path), rows, column, len(lines) - len(rows))


def _json_array(path: Path, column: str | None) -> PromptFile:
    text = _decoded(path)
    if not text.strip():
        raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
    rows = _json(path, "its content", text)
    if not isinstance(rows, list):
        nested = isinstance(rows, dict) and any(isinstance(value, (list, dict)) for value in rows.values())
        advice = "save the array itself" if nested else "for one object per line use the extension .jsonl"
        raise ValueError(
            f'prompt file {path}: expected a JSON array of strings or of {{"prompt": "..."}}, got {type(rows).__name__}; '
            f"{advice}"
        )
    return _objects(_label(path), [(f"entry {number}", row) for number, row in enumerate(rows, 1)], column, texts=True)


def _table(path: Path, column: str | None, delimiters: str) -> PromptFile:
    """A header and rows of cells; rows without text count as blank lines. The header determines the delimiter."""
    text = _decoded(path)
    head = text.lstrip().partition("\n")[0]
    cells = _cells(path, text, next((sign for sign in delimiters if sign in head), delimiters[0]))
    rows = [(where, row) for where, row in cells if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"prompt file {path}: is empty; it needs a header and at least one prompt")
    (where, first), *rest = rows
    header = [name.strip() for name in first]
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise ValueError(f"prompt file {path}, {where}: two columns are named {twice[0]!r}; rename one")
    named = _each(rest, lambda where, row: (where, _named(path, where, header, row)))
    chosen = _column(_label(path), where, [name for name in header if name], column)
    return _objects(_label(path), named, chosen, len(cells) - len(rows))


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[str, list[str]]]:
    """(line, cells) of each row. A tab-separated table with other quotes than CSV's (PartiPrompts.tsv) is read unquoted."""
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
            f"prompt file {path}, line {line}: not a CSV row ({error}); quote a cell that contains a comma, a newline or "
            "a quote, and double the quotes inside it"
        ) from error
    return rows


def _named(path: Path, where: str, header: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    """The cells by column. The last cells of a short row are empty; a long row has an unquoted separator."""
    if any(cell.strip() for cell in row[len(header) :]):
        raise ValueError(
            f"prompt file {path}, {where}: {len(row)} cells under {len(header)} columns; quote a cell that contains the "
            "separator"
        )
    full = [*row, *[""] * (len(header) - len(row))]
    return {name: cell for name, cell in zip(header, full, strict=False) if name}


def _parquet(path: Path, column: str | None) -> PromptFile:
    """Columns of text, numbers and booleans; images and nested columns are not read."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"prompt file {path}: reading .parquet needs pyarrow; do: pip install pyarrow, or convert the file to .csv or "
            ".jsonl"
        ) from error
    types = arrow.types
    scalar = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    try:
        plain = [field.name for field in parquet.read_schema(path) if any(is_type(field.type) for is_type in scalar)]
        rows = parquet.read_table(path, columns=plain).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"prompt file {path}: not a readable parquet file ({str(error)[:200]})") from error
    chosen = _column(_label(path), "the columns of text and numbers", plain, column)
    return _objects(_label(path), [(f"row {number}", row) for number, row in enumerate(rows, 1)], chosen)


def _objects(
    source: str, rows: Sequence[tuple[str, Any]], column: str | None, blank: int = 0, *, texts: bool = False
) -> PromptFile:
    """Rows with the prompt under one key. ``texts``: a row may also be the prompt itself."""
    place, first = next(((where, row) for where, row in rows if isinstance(row, dict)), ("", {}))
    key = "" if not place else column or _key(source, place, list(first))

    def read(where: str, row: Any) -> Prompt:
        if isinstance(row, dict):
            return _object(source, where, row, key)
        if texts and isinstance(row, str) and column is None:
            return Prompt(_checked(source, where, row), where)
        shown = json.dumps(row, ensure_ascii=False, default=str)[:60]
        raise ValueError(f'{source}, {where}: expected {{"prompt": "..."}}, got {shown}')

    return PromptFile(source, tuple(_each(rows, read)), key, blank)


def _key(source: str, where: str, names: Sequence[str]) -> str:
    """The prompt's key in a JSON object: "prompt" or "prompts" in any case. ValueError that lists the keys."""
    near = [name for name in names if name.lower() in COLUMNS[0]]
    if "prompt" in near or len(near) == 1:
        return "prompt" if "prompt" in near else near[0]
    raise ValueError(
        f'{source}, {where}: expected one key "prompt", got {_shown(names)}. If another key has the prompts, '
        f"{_name_it(source)}"
    )


def _name_it(source: str) -> str:
    """What to do about a prompt column with another name, in a file or in a Python object."""
    return NAME_IT if source.startswith("prompt file") else RENAME_IT


def _shown(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def _column(source: str, where: str, names: Sequence[str], given: str | None) -> str:
    """The prompt column of a table. ValueError that lists the columns if none or several could be it."""
    if given is not None:
        if given in names:
            return given
        raise ValueError(f"{source}, {where}: has no column {given!r}; its columns are {_shown(names)}")
    for group in COLUMNS:
        near = [name for name in names if name.strip().lower() in group]
        if len(near) > 1:
            raise ValueError(
                f"{source}, {where}: {' and '.join(map(repr, near))} could be the prompts; {_name_it(source)}"
            )
        if near:
            return near[0]
    raise ValueError(
        f"{source}, {where}: no column is named prompt, caption or text; its columns are {_shown(names)}. "
        f"If one of them has the prompts, {_name_it(source)}; if the file has no header, add one"
    )


def _object(source: str, where: str, row: Mapping[str, Any], key: str) -> Prompt:
    """The prompt of a row, and the row with that prompt under "prompt"."""
    text = row.get(key)
    if not isinstance(text, str):
        got = json.dumps(text, ensure_ascii=False, default=str)[:60] if key in row else f"only {_shown(list(row))}"
        raise ValueError(f"{source}, {where}: {key!r} must be a string, got {got}; add a prompt or remove the row")
    prompt = _checked(source, where, text)
    other = {name: value for name, value in row.items() if name != key or name == "prompt"}
    return Prompt(prompt, where, ({} if "prompt" in other else {"prompt": prompt}) | other | {"prompt": prompt})


def _check_teacher(source: str, where: str, prompt: Prompt) -> None:
    """A missing cell is None, in a DataFrame NaN or NA; an empty one is a blank text."""
    given = (prompt.meta or {}).get(TEACHER_PROMPT)
    if str(given) in ("None", "nan", "<NA>") or _is_blank(given):
        return
    if not isinstance(given, str):
        shown = json.dumps(given, ensure_ascii=False, default=str)[:60]
        raise ValueError(
            f"{source}, {where}: {TEACHER_PROMPT!r} must be a string, got {shown}; leave it empty where the "
            "teacher reads the prompt"
        )
    _checked(source, f"{where}, {TEACHER_PROMPT}", given)


def _lines(path: Path) -> list[tuple[str, str]]:
    """(line, text) of each line. Not splitlines(), which also splits at U+2028, which JSON allows in a string."""
    lines = _decoded(path).split("\n")
    return [(f"line {number}", line) for number, line in enumerate(lines if lines[-1] else lines[:-1], 1)]


def _decoded(path: Path) -> str:
    """The file's text with "\n" line endings."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompt file {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(_label(path), error) from error


def _not_utf8(place: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{place}: not UTF-8 at byte {error.start}; convert it to UTF-8")


def _checked(source: str, where: str, line: str) -> str:
    if not line.strip():
        raise ValueError(f"{source}, {where}: the prompt is empty; remove it or add a prompt")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"{source}, {where}: {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := NO_TEXT.search(line):
        raise ValueError(
            f"{source}, {where}: the character U+{ord(found[0]):04X} is not text; "
            "convert the file to UTF-8 and remove it"
        )
    return line.strip()


def _json(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        hint = "; for one object per line use the extension .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"prompt file {path}, {where}: not JSON ({error.msg} at {place} {error.colno}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, very deep nesting
        raise ValueError(f"prompt file {path}, {where}: cannot be read as JSON ({error})") from error


def _archive(path: Path, column: str | None) -> PromptFile:
    """The prompts of a WebDataset tar in the order of its entries."""
    entries: dict[str, dict[str, str]] = {}
    for member in members(path, "prompt file", dict.fromkeys(TEXTS, MAX_MEMBER_BYTES)):
        where = f"member {member.name!r}"
        texts = entries.setdefault(member.entry, {})
        if member.size > MAX_MEMBER_BYTES and not member.lost:
            raise ValueError(f"prompt file {path}, {where}: {member.size} bytes; at most {MAX_MEMBER_BYTES}")
        if member.kind in texts:
            raise ValueError(f"prompt file {path}, {where}: appears twice; every entry needs its own name")
        try:
            texts[member.kind] = member.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{_label(path)}, {where}", error) from error
    if not entries:
        raise ValueError(f"prompt file {path}: has no member that ends in .txt, .caption or .json")
    return PromptFile(_label(path), tuple(_entry(path, name, texts, column) for name, texts in entries.items()))


def _entry(path: Path, name: str, texts: Mapping[str, str], column: str | None) -> Prompt:
    kind = "json" if column is not None else next((kind for kind in TEXTS if kind in texts), "txt")
    where = f"member {name}.{kind}"
    if kind not in texts:
        advice = "the name of an entry ends at its first dot: rename it" if column is None else "leave the column out"
        raise ValueError(f"{_label(path)}, {where}: is missing, there is only .{', .'.join(texts)}; {advice}")
    if kind == "json":
        return _objects(_label(path), [(where, _json(path, where, texts[kind]))], column).prompts[0]
    text = _checked(_label(path), where, texts[kind])
    meta = _json(path, f"member {name}.json", texts["json"]) if "json" in texts else None
    return Prompt(text, where, {"prompt": text} | meta | {"prompt": text} if isinstance(meta, dict) else None)


_READERS: Mapping[str, Callable[[Path, str | None], PromptFile]] = {
    ".txt": _text,
    ".csv": partial(_table, delimiters=",;\t"),
    ".tsv": partial(_table, delimiters="\t,;"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
    ".tar": _archive,
}
