"""Turn pydantic's errors into sentences: location, value, what it should be, what to write."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gdmd.config.names import listed, near, similar_fields
from gdmd.config.places import Key, Place, every_path, place_of

_LONGEST_LIST = 16  # of known keys in an error; more would hide the error itself
_MAPPINGS = {"model_type", "model_attributes_type", "dict_type", "dataclass_type", "mapping_type"}
_PLAIN = {
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text",
}


def unsecret(text: str) -> str:
    """Redact the user:password part of URLs, since errors may be logged."""
    return re.sub(r"://[^/\s]*@", "://...@", text)


class _Shorten(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(unsecret(x), level)  # before it is cut: a cut may take the @ away

    def repr_int(self, x: int, level: int) -> str:
        return f"a whole number of {x.bit_length()} bits" if x.bit_length() > 200 else repr(x)


_SHORTEN = _Shorten()
_SHORTEN.maxstring = _SHORTEN.maxother = 60


def explain(
    kind: Any, error: ValidationError, name: str, paths: Mapping[tuple[str, ...], str] | None = None, tree: Any = None
) -> list[str]:
    """One line per mistake: ``name``, dotted path, the value, the reason, what to write.

    kind: the config class or annotation that was validated. paths: which override set which path. tree: what was
    validated, which tells the fields of a chosen kind from those of another.
    """
    details = error.errors(include_url=False)
    return [
        unsecret(_line(kind, detail, name, paths or {}, tree))
        for detail in details
        if detail["type"] != "too_short" or not _has_bad_element(detail["loc"], details)
    ]


def _has_bad_element(path: Sequence[Key], details: Sequence[ErrorDetails]) -> bool:
    """Pydantic counts an element of a list that has an error as missing, too."""
    return any(len(one["loc"]) > len(path) and one["loc"][: len(path)] == tuple(path) for one in details)


def show(value: Any) -> str:
    """A value on one short line, with its type where that is the likely surprise."""
    return "nothing (null)" if value is None else _SHORTEN.repr(value)


def _line(kind: Any, detail: ErrorDetails, name: str, paths: Mapping[tuple[str, ...], str], tree: Any) -> str:
    place, value, context = place_of(kind, detail["loc"]), detail["input"], detail.get("ctx", {})
    path = place.path
    made = detail["type"] == "extra_forbidden"
    shell = _override_of(tuple(map(str, path)), paths, made) is not None
    match detail["type"]:
        case "extra_forbidden":
            reason = f"unknown key{_other_key(str(path[-1]), place, every_path(kind, tree))}"
            if kinds := place.kinds_with(str(path[-1])):
                reason = f"kind '{place.chosen}' has no such key ({listed(kinds)} has); replace the whole section: "
                section = tuple(map(str, path[:-1]))
                chosen_here = any(given[: len(section)] == section for given in paths)
                reason += _assigned(section, f"{{kind: {place.chosen}, ...}}", chosen_here)
        case "missing":
            value, reason = {}, "is missing; this key is required"
        case "union_tag_not_found":
            place_key = f"{'.'.join(map(str, path))}.path"
            if shell and isinstance(value, str) and place_key in every_path(kind, tree):
                reason = f"should be a mapping; write '{place_key}={value}'"
            else:
                reason = _untagged(place, context["discriminator"].strip("'()"))
        case "union_tag_invalid":
            tag, value = context["discriminator"].strip("'()"), context["tag"]
            path, reason = (*path, tag), f"unknown {tag}{_other_value(value, _names(context['expected_tags']))}"
        case "literal_error":
            given = value if isinstance(value, str) else show(value)
            reason = f"unknown value{_other_value(given, _names(context['expected']))}"
        case "tuple_type" | "list_type":
            reason = f"should be a list{_as_list(place, value, shell)}"
        case wrong if wrong in _MAPPINGS and (kinds := place.tags("kind")):
            reason = f"should be {{kind: ...}}{_as_kind(value, kinds)}"
        case wrong if wrong in _MAPPINGS:
            reason = f"should be a mapping{_example(place, value, shell)}"
        case "too_short" | "too_long":
            reason = re.sub(r"^\w+ (.*?) after validation", r"\1", detail["msg"])
        case other:
            message = _PLAIN.get(other, detail["msg"].removeprefix("Value error, "))
            reason = message[:1].lower() + message[1:]
    got = "" if isinstance(value, Mapping) else f"got {show(value)}: "  # a mapping would hide the sentence that counts
    override = _override_of(tuple(map(str, path)), paths, made)
    source = f"{name} (override '{override}')" if override else name
    dotted = ".".join(map(_show_key, path))
    return f"{source}: {dotted}: {got}{reason}" if dotted else f"{source}: {reason}"


def _override_of(path: tuple[str, ...], paths: Mapping[tuple[str, ...], str], made: bool) -> str | None:
    """The last override that set this path or something around it; if the path was ``made`` by it, something within."""
    around = [override for given, override in paths.items() if path[: len(given)] == given]
    within = [override for given, override in paths.items() if made and given[: len(path)] == path]
    fitting = around or within
    return fitting[-1] if fitting else None


def _other_key(got: str, place: Place, fields: Sequence[str]) -> str:
    """What may have been meant, else the known keys where they are few."""
    known = place.sibling_names()
    if got == "weight" and {"kind"} < set(known) and place.path[0] == "rewards":
        return "; weights belong to the parts of a composite: {kind: composite, parts: [{reward: {kind: ...}, weight: ...}]}"
    if meant := similar_fields(got, known, fields):
        return meant
    if not known:
        return "; nothing can be set here"
    few = len(known) <= _LONGEST_LIST
    return f"; known are: {', '.join(known)}" if few else "; `gdmd recipes RECIPE` prints every key of a recipe"


def _other_value(got: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' where a known value is near, else all of them."""
    meant = near(got, known)
    return f"; did you mean '{meant[0]}'?" if meant else f"; known are: {', '.join(known)}"


def _untagged(place: Place, tag: str) -> str:
    return f"the key '{tag}' is missing; write {{{tag}: ..., ...}}{_of(place.tags(tag))}"


def _of(known: Sequence[str]) -> str:
    return f"; known are: {', '.join(known)}" if len(known) > 1 else ""


def _as_list(place: Place, value: Any, shell: bool) -> str:
    """How the value is written as a list; rewards are named by people as words: clip, my_rewards:warm."""
    element = place.under(0)
    kinds = element.tags("kind")
    if kinds:
        words = re.split(r"[,+ ]+", value.strip()) if isinstance(value, str) and value.strip() else []
        meant = [_tagged(word, kinds) for word in words]
        if isinstance(value, Mapping) and value.get("kind") in kinds:
            words, meant = [value["kind"]], [f"{{kind: {value['kind']}{', ...' if len(value) > 1 else ''}}}"]
        inner = "{kind: ...}" if not words or None in meant else ", ".join(filter(None, meant))
        return f" of {{kind: ...}}; write {_assigned(place.path, f'[{inner}]', shell)}"
    if isinstance(value, (str, int, float)):
        return f"; write {_assigned(place.path, f'[{value}]', shell)}"
    return ""


def _as_kind(value: Any, kinds: Sequence[str]) -> str:
    meant = _tagged(value, kinds) if isinstance(value, str) else None
    return f"; write {meant}" if meant else _of(kinds)


def _tagged(word: str, kinds: Sequence[str]) -> str | None:
    """clip -> {kind: clip}; module:function -> {kind: callable, target: module:function}; None for neither."""
    if ":" in word and "callable" in kinds:
        return f"{{kind: callable, target: {word}}}"
    if word.endswith(".py") and "callable" in kinds:
        return f"{{kind: callable, target: {word}:FUNCTION}}"
    meant = near(word, kinds)
    return f"{{kind: {meant[0]}}}" if meant else None


def _assigned(path: Sequence[Key], value: str, shell: bool) -> str:
    """KEY=VALUE as one word of a shell, or the line of a file."""
    return f"'{'.'.join(map(str, path))}={value}'" if shell else f"{path[-1] if path else ''}: {value}"


def _example(place: Place, value: Any, shell: bool) -> str:
    keys = place.field_names()
    files = [
        key for key in ("file", "path", "source") if key in keys
    ]  # a text in place of a section is nearly always one
    if shell and files and isinstance(value, str):
        return f"; write {_assigned((*place.path, files[0]), value, shell)}"
    if isinstance(value, str) and (meant := _tagged(value, place.under("reward").tags("kind"))):
        return f"; write {{reward: {meant}}}"
    return f", like {{{keys[0]}: ...}}; known keys are: {', '.join(keys)}" if 0 < len(keys) <= _LONGEST_LIST else ""


def _names(expected: str) -> list[str]:
    """The names in pydantic's "'a', 'b' or 'c'"; numbers of a Literal have no quotes."""
    return re.findall(r"'([^']*)'", expected) or re.split(r", | or ", expected)


def _show_key(key: Key) -> str:
    if isinstance(key, int):
        return str(key)
    return key if re.fullmatch(r"[\w-]+", key) else repr(key)
