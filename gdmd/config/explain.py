"""Turn pydantic's errors into one line each: source, dotted path, value, reason, what to write."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gdmd.config.fields import Key, Models, all_paths, children, kinds, models_in
from gdmd.config.names import argument_named, near, similar_fields

MOST_KEYS = 16
"""Known keys listed in an error; a longer list would hide the error itself."""

_MESSAGES = {
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text",
}
_MAPPINGS = {"model_type", "model_attributes_type", "dict_type", "dataclass_type", "mapping_type"}


def redacted(text: str) -> str:
    """The text without the user:password part of URLs, since errors may be logged."""
    return re.sub(r"://[^/\s]*@", "://...@", text)


class _Shorten(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redacted(x), level)  # before it is shortened: that may remove the @

    def repr_int(self, x: int, level: int) -> str:
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 200 else repr(x)


_SHORTEN = _Shorten()
_SHORTEN.maxstring = _SHORTEN.maxother = 60


def show(value: Any) -> str:
    """A value on one short line."""
    return "nothing (null)" if value is None else _SHORTEN.repr(value)


FIELDS_ONLY = "fields only"
"""A validation context: no config checks its fields together."""


class Mistakes(ValueError):
    """Several mistakes of one config; pydantic keeps only the first error of a validator."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("; ".join(self.messages))


class _Location(NamedTuple):
    """Where an error is: its path without pydantic's labels for union members, and the config classes around it."""

    path: tuple[Key, ...]
    models: Models  # that the value may be
    owners: Models  # in which the last key of the path was looked up
    union: Models  # from which the owner was chosen
    label: str  # by this kind

    @property
    def dotted(self) -> str:
        return ".".join(str(key) if re.fullmatch(r"[\w-]+", str(key)) else repr(key) for key in self.path)


def explain(
    annotation: Any,
    error: ValidationError,
    name: str,
    overrides: Mapping[tuple[str, ...], str] | None = None,
    tree: Any = None,
) -> list[str]:
    """One line per mistake: ``name``, dotted path, the value, the reason, what to write.

    annotation: the config class or union that was validated. overrides: path -> the override that set it. tree: what
    was validated, which tells the fields of a chosen kind from those of another.
    """
    details = error.errors(include_url=False)
    shown = [one for one in details if one["type"] != "too_short" or not _has_bad_element(one, details)]
    single = (one for detail in shown for one in _separate(detail))
    lines = [_line(annotation, one, name, overrides or {}, tree) for one in single]
    return [redacted(line) for line in (*lines, *(f"{name}: {one}" for one in _between(annotation, details, tree)))]


def _between(annotation: Any, details: Sequence[ErrorDetails], tree: Any) -> list[str]:
    """Mistakes between sections; pydantic looks for them only if no section has one. None unless all fields are valid."""
    within = all(one["loc"] and isinstance(one.get("ctx", {}).get("error"), Mistakes) for one in details)
    if not within or not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return []
    config: Any = annotation.model_validate(tree, context=FIELDS_ONLY)
    return list(config._mistakes())


def _separate(detail: ErrorDetails) -> list[ErrorDetails]:
    """One error for each of several ``Mistakes``."""
    error = detail.get("ctx", {}).get("error")
    messages = error.messages if isinstance(error, Mistakes) else (detail["msg"],)
    return [{**detail, "msg": message} for message in messages]


def _has_bad_element(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Pydantic also counts an element of a list that has an error as missing."""
    path = detail["loc"]
    return any(len(one["loc"]) > len(path) and one["loc"][: len(path)] == path for one in details)


def _locate(annotation: Any, location: Sequence[Key]) -> _Location:
    """What a pydantic location means: after a field or index with a union, its first text is the chosen kind."""
    models, owners, union = models_in(annotation), Models(), Models()
    path, label, chosen = tuple[Key, ...](), "", False
    for item in location:
        if len(models) > 1 and not chosen and item in kinds(models):
            label, chosen, union = str(item), True, models
            models = [model for model in models if item in kinds([model])]
        else:
            union = union if chosen else []
            path, owners, models, chosen = (*path, item), models, children(models, item), False
    return _Location(path, models, owners, union, label)


def _line(annotation: Any, detail: ErrorDetails, name: str, overrides: Mapping[tuple[str, ...], str], tree: Any) -> str:
    at, value, context = _locate(annotation, detail["loc"]), detail["input"], detail.get("ctx", {})
    if detail["type"] == "union_tag_invalid":
        at = at._replace(path=(*at.path, "kind"))
    override = _override_of(at.path, overrides, created=detail["type"] == "extra_forbidden")
    match detail["type"]:
        case "extra_forbidden":
            reason = _unknown_key(at, list(all_paths(annotation, tree)), overrides)
        case "missing":
            value, reason = {}, "is missing; this key is required"
        case "union_tag_not_found":
            reason = _without_kind(at, value, override)
        case "union_tag_invalid":
            value = context["tag"]
            reason = f"unknown kind{_other_value(value, kinds(at.models))}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"]) or re.split(r", | or ", context["expected"])
            reason = f"unknown value{_other_value(value if isinstance(value, str) else show(value), known)}"
        case "tuple_type" | "list_type":
            reason = f"should be a list{_as_list(at, value, override)}"
        case wrong if wrong in _MAPPINGS and kinds(at.models):
            reason = f"should be {{kind: ...}}{_as_kind(value, kinds(at.models))}"
        case wrong if wrong in _MAPPINGS:
            reason = f"should be a mapping{_as_mapping(at, value, override)}"
        case "too_short" | "too_long":
            reason = re.sub(r"^\w+ (.*?) after validation", r"\1", detail["msg"])
        case other:
            message = _MESSAGES.get(other, detail["msg"].removeprefix("Value error, "))
            reason = message[:1].lower() + message[1:]
    got = "" if isinstance(value, Mapping) else f"got {show(value)}: "  # a mapping would hide the reason
    source = f"{name} (override '{override}')" if override else name
    return f"{source}: {at.dotted}: {got}{reason}" if at.path else f"{source}: {reason}"


def _override_of(path: tuple[Key, ...], overrides: Mapping[tuple[str, ...], str], created: bool) -> str | None:
    """The last override that set this path or a section around it; if it ``created`` the path, something inside it."""
    own = tuple(map(str, path))
    around = [override for given, override in overrides.items() if own[: len(given)] == given]
    inside = [override for given, override in overrides.items() if created and given[: len(own)] == own]
    return next(reversed(around or inside), None)


def _unknown_key(at: _Location, fields: Sequence[str], overrides: Mapping[tuple[str, ...], str]) -> str:
    """What may have been meant, else the known keys if they are few."""
    key, known = str(at.path[-1]), sorted({name for model in at.owners for name in model.model_fields})
    if others := [model for model in at.union if key in model.model_fields]:
        section = at.path[:-1]
        shell = any(given[: len(section)] == tuple(map(str, section)) for given in overrides)
        whole = _assignment(section, f"{{kind: {at.label}, ...}}", shell)
        having = ", ".join(kinds(others))
        cure = f"; replace the whole section: {whole}" if section else ""
        return f"kind '{at.label}' has no such key, only {having}{cure}"
    if key == "weight" and "kind" in known and at.path[0] == "rewards":
        parts = "{kind: composite, parts: [{reward: {kind: ...}, weight: ...}]}"
        return f"unknown key; weights belong to the parts of a composite: {parts}"
    setters = {extra["sets"]: name for model in at.owners for name, extra in _extras(model) if "sets" in extra}
    if meant := (argument_named(key, setters, known) if setters else "") or similar_fields(key, known, fields):
        return f"unknown key{meant}"
    if len(known) <= MOST_KEYS:
        return f"unknown key; known keys are: {', '.join(known)}"
    return "unknown key; `gdmd recipes RECIPE` prints every key of a recipe"


def _extras(model: type[BaseModel]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The fields of a model with their json_schema_extra."""
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, Mapping):
            yield name, field.json_schema_extra


def _other_value(got: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' if a known value is near, else all of them."""
    meant = near(got, known)
    return f"; did you mean '{meant[0]}'?" if meant else f"; known values are: {', '.join(known)}"


def _without_kind(at: _Location, value: Any, override: str | None) -> str:
    if override and isinstance(value, str) and any("path" in model.model_fields for model in at.models):
        return f"should be a mapping; write {_assignment((*at.path, 'path'), value, True)}"
    return f"the key 'kind' is missing; write {{kind: ..., ...}}; known kinds are: {', '.join(kinds(at.models))}"


def _as_list(at: _Location, value: Any, override: str | None) -> str:
    """How the value is written as a list: rewards are often given as words, such as clip or my_rewards:warm."""
    known = kinds(at.models)
    if not known:
        return f"; write {_assignment(at.path, f'[{value}]', bool(override))}" if isinstance(value, str | float) else ""
    words = re.split(r"[,+ ]+", value.strip()) if isinstance(value, str) and value.strip() else []
    meant = [_section(word, known) for word in words]
    if isinstance(value, Mapping) and value.get("kind") in known:
        meant = [f"{{kind: {value['kind']}{', ...' if len(value) > 1 else ''}}}"]
    inner = ", ".join(filter(None, meant)) if meant and None not in meant else "{kind: ...}"
    return f" of {{kind: ...}}; write {_assignment(at.path, f'[{inner}]', bool(override))}"


def _as_kind(value: Any, known: Sequence[str]) -> str:
    meant = _section(value, known) if isinstance(value, str) else None
    return f"; write {meant}" if meant else f"; known kinds are: {', '.join(known)}"


def _as_mapping(at: _Location, value: Any, override: str | None) -> str:
    """How a section is written for which text was given: nearly always a file, or the word for a reward."""
    keys = sorted({name for model in at.models for name in model.model_fields})
    files = [key for key in ("file", "path", "source") if key in keys]
    if override and files and isinstance(value, str):
        return f"; write {_assignment((*at.path, files[0]), value, True)}"
    if isinstance(value, str) and (meant := _section(value, kinds(children(at.models, "reward")))):
        return f"; write {{reward: {meant}}}"
    return f", like {{{keys[0]}: ...}}; known keys are: {', '.join(keys)}" if 0 < len(keys) <= MOST_KEYS else ""


def _section(word: str, known: Sequence[str]) -> str | None:
    """clip -> {kind: clip}; module:function -> {kind: callable, target: module:function}; None for neither."""
    if "callable" in known and (":" in word or word.endswith(".py")):
        return f"{{kind: callable, target: {word}{'' if ':' in word else ':FUNCTION'}}}"
    meant = near(word, known)
    return f"{{kind: {meant[0]}}}" if meant else None


def _assignment(path: Sequence[Key], value: str, shell: bool) -> str:
    """KEY=VALUE as one word of a shell, or the line of a file."""
    return f"'{'.'.join(map(str, path))}={value}'" if shell else f"{path[-1] if path else ''}: {value}"
