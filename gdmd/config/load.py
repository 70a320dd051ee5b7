"""YAML and ``a.b=c`` overrides -> a validated config; every mistake is listed at once, with its path and a suggestion.

Imports no torch, so that a misspelled key is reported at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from gdmd.config.explain import explain, redacted, show
from gdmd.config.fields import Key, field_at

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)

MAX_YAML_CHARS = 1_000_000
"""A longer file is not a configuration."""


class ConfigError(ValueError):
    """All mistakes in a config: ``str`` has one line for each error, which ``errors`` holds too."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(redacted(" ".join(error.split())) for error in errors)
        super().__init__("\n".join(self.errors))


def load_config(
    cls: type[AnyConfig],
    source: str | Path | Mapping[Key, Any],
    overrides: Sequence[str] = (),
    where: str | None = None,
) -> AnyConfig:
    """Read a config of class ``cls`` and apply the overrides in order.

    source: a ``Path`` is a file to read, a ``str`` is YAML text, a mapping is taken as parsed. overrides: "a.b=c",
    where c is YAML and a whole number in the path is the index of a list; a section that the source leaves out starts
    from its default. An existing path given to a text field is taken literally, not as YAML.
    where: the name of the source in errors (default: the path). Raises ``ConfigError``.
    """
    name = where or (str(source) if isinstance(source, Path) else "config")
    tree = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else read_yaml(source, name)
    errors: list[str] = []
    paths: dict[tuple[str, ...], str] = {}
    for override in overrides:
        try:
            paths[_apply(cls, tree, override)] = override
        except ValueError as error:
            errors.append(f"override '{override}': {error}")
    try:
        config = cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(errors + explain(cls, error, name, paths, tree)) from error
    if errors:
        raise ConfigError(errors)
    return config


def validated(annotation: Any, value: Any, name: str) -> Any:
    """A value as a config class or a union of them. ConfigError, each line beginning with ``name``, lists all mistakes."""
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise ConfigError(explain(annotation, error, name, tree=value)) from None


def dump_config(config: BaseModel) -> str:
    """YAML text that ``load_config`` reads back as an equal config; defaults are written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads dates as text: no field is a date, but a folder's name may be."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                problem = f"duplicate key {key.value!r} (first on line {lines[key.value]}): keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def parse_yaml(text: str) -> Any:
    """The value of one YAML document (None for an empty text). ValueError with the line and column of the mistake."""
    if len(text) > MAX_YAML_CHARS:
        raise ValueError(f"has {len(text)} characters, at most {MAX_YAML_CHARS}; give a configuration file")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem}{f' ({error.context})' if error.context else ''}") from error
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"cannot be read as YAML: {' '.join(str(error).split())}") from error


def read_yaml(source: str | Path, name: str | None = None) -> dict[Key, Any]:
    """The mapping in a file or a text. ConfigError that begins with ``name`` for anything else."""
    name = name or str(source)
    try:
        tree = parse_yaml(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read ({error.strerror}); give the path of a YAML file"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})"]) from error
    except ValueError as error:
        raise ConfigError([f"{name}: {error}"]) from error
    if not isinstance(tree, dict):
        got = "is empty" if tree is None else f"got {show(tree)}"
        raise ConfigError([f"{name}: {got}; expected 'key: value' lines (a mapping)"])
    return tree


def _apply(cls: type[BaseModel], tree: dict[Key, Any], override: str) -> tuple[str, ...]:
    """Set one "a.b=c" in the tree and return its path; ``ValueError`` says why it cannot be set."""
    left, equals, right = override.partition("=")
    path = tuple(part.strip() for part in left.split("."))
    if not equals or not all(path):
        raise ValueError("is not KEY=VALUE; write it like method.gamma=0 or loop.steps=100")
    parent: Any = tree
    walked: list[Key] = []
    for part in path[:-1]:
        key = _key(parent, part, walked)
        walked.append(key)
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = _default(cls, tree, walked)
        parent[key] = copy.copy(parent[key])  # a YAML alias is the same object as its anchor
        parent = parent[key]
    key = _key(parent, path[-1], walked)
    parent[key] = _override_value(left, right, _takes_text(cls, tree, [*walked, key]))
    return path


def _default(cls: type[BaseModel], tree: Any, path: Sequence[Key]) -> Any:
    """The default of a field as plain YAML values; an empty mapping if it is None or missing."""
    field = field_at(cls, tree, path)
    if field is None or field.is_required():
        return {}
    return _plain(field.get_default(call_default_factory=True))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, tuple) else {} if value is None else value


def _takes_text(cls: type[BaseModel], tree: Any, path: Sequence[Key]) -> bool:
    field = field_at(cls, tree, path)
    return field is not None and (field.annotation is str or str in get_args(field.annotation))


def _override_value(left: str, right: str, text: bool) -> Any:
    """The YAML after the equals sign; for a text field an existing path, which YAML might read as a number or cut at #."""
    if text and right not in ("null", "~") and os.path.exists(right):
        return right
    try:
        return parse_yaml(right)
    except ValueError as error:
        cut = right.count("[") > right.count("]") or right.count("{") > right.count("}")
        hint = f"; the shell splits at spaces: put the whole argument in quotes, like '{left}=[...]'" if cut else ""
        raise ValueError(f"{error}{hint}") from error


def _key(parent: Any, part: str, walked: Sequence[Key]) -> Key:
    """One part of an override's path as a key of ``parent``: a name in a mapping, an index in a list."""
    place = ".".join(map(str, walked))
    if isinstance(parent, dict):
        return part
    if not isinstance(parent, list):
        raise ValueError(f"'{place}' is {show(parent)}, so nothing can be set inside it; set '{place}' itself")
    if not (part.isascii() and part.isdigit() and int(part[:9]) < len(parent)):
        hint = f"use an index from 0 to {len(parent) - 1}" if parent else f"set the whole list: {place}=[...]"
        raise ValueError(f"'{place}' is a list of {len(parent)}, got '{part}'; {hint}")
    return int(part)
