"""Places in a tree of configs: which fields exist there, and what a pydantic error location means to a person.

A location of pydantic holds the chosen member of a union (a tag or a type name) between two keys; a person's path,
``method.gamma``, does not. Annotations are walked, not values, so that this also works on what failed to validate.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Key = str | int
Path = tuple[Key, ...]


@dataclass(frozen=True)
class Place:
    """A path, the annotations that may hold there, those of its parent, and the union its parent was chosen from."""

    path: Path
    annotations: tuple[Any, ...]
    parents: tuple[Any, ...] = ()
    chosen: str = ""
    union: tuple[Any, ...] = ()

    def field_names(self) -> list[str]:
        """The keys that are known at this place."""
        return _field_names(self.annotations)

    def sibling_names(self) -> list[str]:
        """The keys that are known where the last key of the path was looked up."""
        return _field_names(self.parents)

    def tags(self, name: str) -> list[str]:
        """The values that the literal field ``name`` (a tag) may have at this place."""
        fields = [_fields(member).get(name) for member in _members(self.annotations)]
        return [str(value) for field in fields if field is not None for value in _literals(field.annotation)]

    def kinds_with(self, key: str) -> list[str]:
        """Kinds that the parent could have been and that know the last key of the path."""
        having = [member for member in self.union if key in _fields(member)]
        return Place((), tuple(having)).tags("kind")

    def under(self, key: Key) -> Place:
        """The place of a key, or of an element of a list."""
        return Place((*self.path, key), _children(_members(self.annotations), key))


def every_path(kind: Any, tree: Any) -> list[str]:
    """Dotted paths of all fields, inside of lists excepted; of a union, the members that ``tree`` does not rule out."""
    found: list[str] = []
    for member in _matching(_members((kind,)), tree):
        for name, field in _fields(member).items():
            inner = tree.get(name) if isinstance(tree, Mapping) else None
            found += [name, *(f"{name}.{path}" for path in every_path(field.annotation, inner))]
    return list(dict.fromkeys(found))


def place_of(cls: Any, location: Sequence[Key]) -> Place:
    """What a pydantic error location stands for: union labels are left out of the path."""
    place = Place((), (cls,))
    label, union = "", tuple[Any, ...]()
    for item in location:
        members = _members(place.annotations)
        if _is_labeled(place.annotations, item):
            chosen = [member for member in members if _has_label(member, str(item))]
            label, union = str(item), tuple(members)
            place = Place(place.path, tuple(chosen or members), place.parents)
        else:
            place = Place((*place.path, item), _children(members, item), tuple(members), label, union)
            label, union = "", ()
    return place


def default_at(cls: type[BaseModel], tree: Any, path: Sequence[Key]) -> Any:
    """The default at a path that ``tree`` leaves out, as plain YAML values; an empty mapping where there is none."""
    annotations: tuple[Any, ...] = (cls,)
    for key in path[:-1]:
        annotations = _children(_matching(_members(annotations), tree), key)
        tree = tree[key]
    for member in _matching(_members(annotations), tree):
        field = _fields(member).get(str(path[-1]))
        if field is None or field.is_required() or field.default_factory_takes_validated_data:
            continue
        return _plain(field.get_default(call_default_factory=True))
    return {}


def takes_text(cls: type[BaseModel], tree: Any, path: Sequence[Key]) -> bool:
    """Whether the field at a path of ``tree`` may be a plain text."""
    annotations: tuple[Any, ...] = (cls,)
    for key in path:
        annotations = _children(_matching(_members(annotations), tree), key)
        there = isinstance(tree, Mapping) and key in tree or isinstance(tree, list) and isinstance(key, int)
        tree = tree[key] if there else None
    return str in _members(annotations)


def _plain(value: Any) -> Any:
    """A default as YAML would give it: configs become mappings, tuples become lists, nothing becomes a mapping."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {} if value is None else value


def _members(annotations: Iterable[Any]) -> list[Any]:
    """The annotations without Annotated, unions and None."""
    members: list[Any] = []
    for annotation in annotations:
        origin = get_origin(annotation)
        if origin is Annotated:
            members += _members(get_args(annotation)[:1])
        elif origin is Union or origin is types.UnionType:
            members += _members(get_args(annotation))
        elif annotation is not type(None):
            members.append(annotation)
    return members


def _is_labeled(annotations: tuple[Any, ...], item: Key) -> bool:
    """Whether pydantic puts the member's label here: only below a union of two or more, and once."""
    return len(annotations) == 1 and len(_members(annotations)) > 1 and isinstance(item, str)


def _has_label(member: Any, label: str) -> bool:
    """Whether a union member is the one that a label names: by class name or by the value of its tag."""
    tags = {str(tag) for field in _fields(member).values() for tag in _literals(field.annotation)}
    return label in tags or label == getattr(member, "__name__", None)


def _matching(members: list[Any], tree: Any) -> list[Any]:
    """The members whose literal fields (the tags) do not contradict the values given."""
    given = tree if isinstance(tree, Mapping) else {}

    def contradicts(member: Any) -> bool:
        fields = _fields(member).items()
        tags = [(given[name], _literals(field.annotation)) for name, field in fields if name in given]
        return any(literals and value not in literals for value, literals in tags)

    return [member for member in members if not contradicts(member)]


def _children(members: Iterable[Any], key: Key) -> tuple[Any, ...]:
    """The annotations found under a key or an index."""
    children: list[Any] = []
    for member in members:
        arguments = get_args(member)
        if str(key) in _fields(member):
            children.append(_fields(member)[str(key)].annotation)
        elif arguments and get_origin(member) in (dict, Mapping):
            children.append(arguments[-1])
        elif arguments and get_origin(member) is tuple and arguments[-1] is not ...:
            children += arguments[key : key + 1] if isinstance(key, int) else ()
        elif arguments and isinstance(key, int) and get_origin(member) is not Literal:
            children.append(arguments[0])
    return tuple(children)


def _fields(member: Any) -> dict[str, FieldInfo]:
    """The fields of a config class; none for any other annotation."""
    return dict(member.model_fields) if isinstance(member, type) and issubclass(member, BaseModel) else {}


def _field_names(annotations: Iterable[Any]) -> list[str]:
    return sorted({name for member in _members(annotations) for name in _fields(member)})


def _literals(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal annotation; none for any other."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()
