"""YAML and ``a.b=c`` overrides -> a validated config; every mistake is listed at once, with its place and a suggestion.

Nothing here imports torch: a misspelt key is reported in a blink.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gdmd.config.places import Key, default_at, place_of, takes_text
from gdmd.config.strict_yaml import YamlError, parse_yaml

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)

_LONGEST_LIST = 12  # of known keys in an error; more would hide the error itself


def _unsecret(text: str) -> str:
    """The text without what stands before the @ of an address: an error may be kept in a log."""
    return re.sub(r"://[^/\s]*@", "://...@", text)


class _Shorten(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(_unsecret(x), level)  # before it is cut: a cut may take the @ away

    def repr_int(self, x: int, level: int) -> str:
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 200 else repr(x)


_SHORTEN = _Shorten()
_SHORTEN.maxstring = _SHORTEN.maxother = 60


class ConfigError(ValueError):
    """All that is wrong with a config; ``str`` has one line for each error, which ``errors`` holds too."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(_unsecret(" ".join(error.split())) for error in errors)
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
        details = error.errors(include_url=False)
        raise ConfigError(errors + [_describe(cls, detail, name, paths) for detail in details]) from error
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
        raise ConfigError([f"{name}: got {_show(tree)}, expected 'key: value' lines (a mapping)"])
    return tree


def _apply(cls: type[BaseModel], tree: dict[Key, Any], override: str) -> tuple[str, ...]:
    """Set one "a.b=c" in the tree and return its path; ``ValueError`` says why it cannot be set."""
    left, equals, right = override.partition("=")
    path = tuple(part.strip() for part in left.split("."))
    if not equals or not all(path):
        raise ValueError("is not KEY=VALUE; write it like method.gamma=0 or rewards.0.weight=2")
    parent: Any = tree
    walked: list[Key] = []
    for part in path[:-1]:
        key = _key(parent, part, walked)
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = default_at(cls, tree, (*walked, key))
        parent = parent[key]
        walked.append(key)
    key = _key(parent, path[-1], walked)
    parent[key] = right if takes_text(cls, tree, (*walked, key)) and _is_path(right) else parse_yaml(right)
    return path


def _is_path(text: str) -> bool:
    """Whether a text names an existing path, which YAML might read as a number, or cut at a #."""
    return text not in ("null", "~") and os.path.exists(text)


def _key(parent: Any, part: str, walked: list[Key]) -> Key:
    """One part of an override's path as a key of ``parent``: a name in a mapping, an index in a list."""
    place = ".".join(map(str, walked))
    if isinstance(parent, dict):
        return part
    if not isinstance(parent, list):
        raise ValueError(f"'{place}' is {_show(parent)}, so nothing can be set inside it; set '{place}' itself")
    if not (part.isascii() and part.isdigit() and int(part[:9]) < len(parent)):
        hint = f"use an index from 0 to {len(parent) - 1}" if parent else f"set the whole list: {place}=[...]"
        raise ValueError(f"'{place}' is a list of {len(parent)}, got '{part}'; {hint}")
    return int(part)


def _describe(cls: type[BaseModel], detail: ErrorDetails, name: str, paths: dict[tuple[str, ...], str]) -> str:
    """One line: source, dotted path, the value got, the reason, a suggestion."""
    place, value, context = place_of(cls, detail["loc"]), detail["input"], detail.get("ctx", {})
    path, got = place.path, f"got {_show(value)}: "
    match detail["type"]:
        case "extra_forbidden":
            reason = f"unknown key{_suggest(str(path[-1]), place.sibling_names())}"
        case "missing":
            got, reason = "", "is missing; this key is required"
        case "union_tag_not_found":
            tag = context["discriminator"].strip("'()")
            reason = f"the key '{tag}' is missing; it says which kind of '{path[-1]}' this is"
        case "union_tag_invalid":
            tag = context["discriminator"].strip("'()")
            path, got = (*path, tag), f"got {_show(context['tag'])}: "
            reason = f"unknown {tag}{_suggest(context['tag'], _quoted(context['expected_tags']))}"
        case "literal_error":
            reason = f"unknown value{_suggest(_plain(value), _quoted(context['expected']))}"
        case _:
            message = detail["msg"].removeprefix("Value error, ")
            reason = message[:1].lower() + message[1:]
    override = _override_of(tuple(map(str, path)), paths, detail["type"] == "extra_forbidden")
    source = f"{name} (override '{override}')" if override else name
    return f"{source}: {'.'.join(map(_show_key, path)) or '(the whole config)'}: {got}{reason}"


def _override_of(path: tuple[str, ...], paths: dict[tuple[str, ...], str], made: bool) -> str | None:
    """The last override that set this path or something around it; if the path was ``made`` by it, something within."""
    around = [override for given, override in paths.items() if path[: len(given)] == given]
    within = [override for given, override in paths.items() if made and given[: len(path)] == path]
    fitting = around or within
    return fitting[-1] if fitting else None


def _suggest(got: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' where a known name is near, else the list of known names."""
    near = difflib.get_close_matches(got[:100], known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    if not known:
        return "; nothing can be set here"
    more = ", ..." if len(known) > _LONGEST_LIST else ""
    return f"; known are: {', '.join(known[:_LONGEST_LIST])}{more}"


def _quoted(expected: str) -> list[str]:
    """The names in pydantic's "'a', 'b' or 'c'"; numbers of a Literal stand without quotes."""
    return re.findall(r"'([^']*)'", expected) or re.split(r", | or ", expected)


def _show(value: Any) -> str:
    """A value on one short line, with its type where that is the likely surprise."""
    if value is None:
        return "nothing (null)"
    return _SHORTEN.repr(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _show(value)


def _show_key(key: Key) -> str:
    return (
        key
        if isinstance(key, str) and re.fullmatch(r"[\w-]+", key)
        else str(key)
        if isinstance(key, int)
        else repr(key)
    )
