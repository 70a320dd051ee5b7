"""YAML and ``a.b=c`` overrides -> a validated config; every mistake is listed at once, with its place and a suggestion.

Nothing here imports torch: a misspelt key is reported in a blink.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gdmd.config.explain import explain, show, unsecret
from gdmd.config.places import Key, default_at, takes_text
from gdmd.config.strict_yaml import YamlError, parse_yaml

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class ConfigError(ValueError):
    """All that is wrong with a config; ``str`` has one line for each error, which ``errors`` holds too."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(unsecret(" ".join(error.split())) for error in errors)
        super().__init__("\n".join(self.errors))


def load_config(
    cls: type[AnyConfig], source: str | Path, overrides: Sequence[str] = (), where: str | None = None
) -> AnyConfig:
    """Read a config of class ``cls`` and apply the overrides in order.

    source: a ``Path`` is a file to read, a ``str`` is YAML text. overrides: "a.b=c", where c is YAML and a whole number
    in the path is the index of a list; a part left out of the file is filled from its default first. An existing path
    given to a field of text is taken as it is.
    where: the name of the source in errors (default: the path). Raises ``ConfigError``.
    """
    name = where or (str(source) if isinstance(source, Path) else "config")
    tree = _read_tree(source, name)
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


def dump_config(config: BaseModel) -> str:
    """YAML text that ``load_config`` reads back as an equal config; defaults are written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def _read_tree(source: str | Path, name: str) -> dict[Key, Any]:
    """The mapping that the source holds."""
    try:
        text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        tree = parse_yaml(text)
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read ({error.strerror}); give the path of a YAML file"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})"]) from error
    except YamlError as error:
        raise ConfigError([f"{name}: {error}"]) from error
    except ValueError as error:  # a path with a null character
        raise ConfigError([f"{name!r}: is not a path ({error})"]) from error
    if tree is None:
        raise ConfigError([f"{name}: is empty; expected 'key: value' lines"])
    if not isinstance(tree, dict):
        raise ConfigError([f"{name}: got {show(tree)}, expected 'key: value' lines (a mapping)"])
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
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = default_at(cls, tree, (*walked, key))
        parent = parent[key]
        walked.append(key)
    key = _key(parent, path[-1], walked)
    parent[key] = right if takes_text(cls, tree, (*walked, key)) and _is_path(right) else _override_value(left, right)
    return path


def _is_path(text: str) -> bool:
    """Whether a text names an existing path, which YAML might read as a number, or cut at a #."""
    return text not in ("null", "~") and os.path.exists(text)


def _override_value(left: str, right: str) -> Any:
    """The YAML after the equals sign. An open bracket at its end is nearly always a shell that cut the word at a space."""
    try:
        return parse_yaml(right)
    except YamlError as error:
        cut = right.count("[") > right.count("]") or right.count("{") > right.count("}")
        hint = f"; the shell cuts words at spaces: put the whole word into quotes, like '{left}=[...]'" if cut else ""
        raise YamlError(f"{error}{hint}") from error


def _key(parent: Any, part: str, walked: list[Key]) -> Key:
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
