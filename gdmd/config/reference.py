"""The fields of a config class with type, default and description: for the docs and ``gdmd recipes NAME --explain``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

REQUIRED, NESTED = "required", "see below"
"""Shown in place of a default: the field has none, or it is a section with fields."""
WIDTH = 80


class FieldRow(NamedTuple):
    """One field."""

    name: str
    type: str
    """The type, its bounds or its choices."""
    default: str
    """As YAML; or REQUIRED, NESTED or ""."""
    description: str


class Section(NamedTuple):
    """One config class, at the first place where it occurs."""

    title: str
    """Name of the class."""
    path: str
    """Such as "method" or "rewards[]"; "" for the whole config."""
    kinds: tuple[str, ...]
    """The values of ``kind`` that choose this class."""
    description: str
    rows: tuple[FieldRow, ...]


def sections(cls: type[BaseModel]) -> Iterator[Section]:
    """The class and all config classes in it, outer ones first, each once."""
    schema = cls.model_json_schema()
    seen: set[str] = set()
    queue = [("", schema)]
    while queue:
        path, definition = queue.pop(0)
        kind = definition["properties"].get("kind", {})
        kinds = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
        about = definition.get("description", "")
        yield Section(definition["title"], path, tuple(kinds), about, tuple(_rows(definition)))
        for name, field in definition["properties"].items():
            below = (f"{path}.{name}" if path else name) + ("[]" if "items" in field else "")
            for reference in _references(field):
                if reference not in seen:
                    seen.add(reference)
                    queue.append((below, schema["$defs"][reference]))


def _references(field: Any) -> Iterator[str]:
    if isinstance(field, Mapping):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key, value in field.items():
            if key not in ("discriminator", "default"):
                yield from _references(value)
    elif isinstance(field, list):
        for value in field:
            yield from _references(value)


def _rows(definition: Mapping[str, Any]) -> Iterator[FieldRow]:
    required = definition.get("required", ())
    for name, field in definition["properties"].items():
        default = REQUIRED if name in required else _default(field)
        yield FieldRow(name, _type(field), default, field.get("description", ""))


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "$ref" in field:
        return "section"
    if field.get("type") == "array":
        inner = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return f"list of {_type(inner)}"
    low = [f">= {field['minimum']}"] if "minimum" in field else []
    low += [f"> {field['exclusiveMinimum']}"] if "exclusiveMinimum" in field else []
    high = [f"<= {field['maximum']}"] if field.get("maximum", 2**63) < 2**62 else []
    high += [f"< {field['exclusiveMaximum']}"] if "exclusiveMaximum" in field else []
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "true or false", "object": "mapping"}
    return " ".join([names.get(field.get("type", ""), field.get("type", "any")), *low, *high])


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (
        NESTED if any(isinstance(one, dict) for one in nested) or (isinstance(value, dict) and value) else _yaml(value)
    )


def _yaml(value: Any) -> str:
    """A value on one line, as it is written after KEY=."""
    return value if isinstance(value, str) and value else json.dumps(value)


def explained(cfg: BaseModel, only: Sequence[str] = ()) -> Iterator[str]:
    """Every field of a config with its value, type, default and description, in lines of 80 columns.

    A star marks a value that is not the default. only: paths; what is neither one of them nor inside one is left out.
    """
    known = {section.title: section for section in sections(type(cfg))}
    yield "* marks a value that differs from the default, [I] one that no paper states."
    yield from _explained(cfg, known, "", only)


def _explained(cfg: BaseModel, known: Mapping[str, Section], path: str, only: Sequence[str]) -> Iterator[str]:
    section = known[type(cfg).__name__]
    inner: list[tuple[str, BaseModel]] = []
    lines: list[str] = []
    for row in section.rows:
        own, value = f"{path}.{row.name}" if path else row.name, getattr(cfg, row.name)
        parts = _sections_in(own, value)
        inner += parts
        if not parts and _selected(own, only):
            lines += _field(own, row, cfg.model_dump(mode="json")[row.name])
    if lines:
        about = " ".join(section.description.replace("``", "").split())
        yield from ["", *(textwrap.wrap(f"{path}: {about}", WIDTH) if path else ()), *lines]
    for own, value in inner:
        yield from _explained(value, known, own, only)


def _sections_in(path: str, value: Any) -> list[tuple[str, BaseModel]]:
    """The configs that are the value, or elements of it, with their paths."""
    if isinstance(value, BaseModel):
        return [(path, value)]
    values = value if isinstance(value, tuple) else ()
    return [(f"{path}.{k}", one) for k, one in enumerate(values) if isinstance(one, BaseModel)]


def _selected(path: str, only: Sequence[str]) -> bool:
    return not only or any(f"{path}.".startswith(f"{one}.") for one in only)


def _field(path: str, row: FieldRow, value: Any) -> Iterator[str]:
    shown = _yaml(value)
    star = " " if shown == row.default else "*"
    yield from _wrapped(f"{star} {path}={shown}", 4)
    default = f"; default {row.default}" if row.default not in ("", REQUIRED) else ""
    yield from _wrapped(f"    {row.type}{default or '; required'}", 4)
    if row.description:
        yield from _wrapped(f"    {' '.join(row.description.split())}", 4)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
