"""Suggestions for unknown names: near misses, and names of other libraries."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from gdmd.config.option_names import described, option_named


def near(got: str, known: Sequence[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The most similar known names, best first, ignoring case."""
    plain = {name.lower(): name for name in known}
    return [plain[one] for one in difflib.get_close_matches(got[:100].lower(), list(plain), n=most, cutoff=cutoff)]


def listed(names: Sequence[str], quoted: bool = True, last: str = "or") -> str:
    """'a', 'b' or 'c'."""
    *most, final = (f"'{name}'" if quoted else name for name in names)
    return f"{', '.join(most)} {last} {final}" if most else final


def similar_fields(got: str, siblings: Sequence[str], fields: Sequence[str]) -> str:
    """Suggestion for an unknown key, such as "; did you mean ...?", or "".

    siblings: the known keys of the same section; fields: every path of the config.
    """
    name = got.lower().lstrip("-").replace("-", "_")
    row = option_named(name)
    if row and "loop" in fields:
        return f"; {described(row, fields)}"
    if similar := near(got, siblings):
        return f"; did you mean '{similar[0]}'?"
    last = {path: path.rpartition(".")[2] for path in fields if "." in path}
    same = [path for path, own in last.items() if own == name][:3]
    spelled = near(name, list(last.values()), cutoff=0.85)
    return _ask(same or [path for path, own in last.items() if own in spelled][:3])


def argument_named(got: str, setters: Mapping[str, str], known: Sequence[str]) -> str:
    """Suggestion for an unknown argument of ``TrainingConfig`` by its name in another library, or "".

    setters: recipe path -> the argument that sets it; known: all arguments.
    """
    row = option_named(got)
    if row is None or not row.fields:
        return ""
    named = [setters[path] for path in row.fields if path in setters]
    if not named and near(got, known):
        return ""  # a near miss is the better guess
    here = named or [f'overrides={{"{path}": ...}}' for path in row.fields]
    return f"; here this is {' and '.join(here)}{f' ({row.note})' if row.note else ''}"


def _ask(paths: Sequence[str]) -> str:
    return f"; did you mean {listed(paths, quoted=False)}?" if paths else ""
