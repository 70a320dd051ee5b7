"""Which fields a config class has at a path, found from its annotations: also for values that failed to validate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Key = str | int
Models = list[type[BaseModel]]


def models_in(annotation: Any, in_lists: bool = True) -> Models:
    """The config classes that an annotation names: the members of a union and, with ``in_lists``, list elements."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is tuple and not in_lists:
        return []
    return [model for part in get_args(annotation) for model in models_in(part, in_lists)]


def kinds(models: Iterable[type[BaseModel]]) -> list[str]:
    """The values that ``kind`` can have in these classes."""
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return [kind for field in fields for kind in get_args(field.annotation)]


def fitting(models: Models, value: Any) -> Models:
    """The classes that have the ``kind`` of ``value``; all of them if it has none."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return [model for model in models if kind in kinds([model])] or models


def children(models: Models, key: Key) -> Models:
    """The classes under a field, or of a list's elements."""
    if isinstance(key, int):
        return models
    return [
        inner
        for model in models
        if key in model.model_fields
        for inner in models_in(model.model_fields[key].annotation)
    ]


def field_at(root: type[BaseModel], tree: Any, path: Sequence[Key]) -> FieldInfo | None:
    """The field that a path of ``tree`` sets; None for an element of a list and for an unknown key."""
    models = [root]
    for key in path[:-1]:
        models = children(fitting(models, tree), key)
        tree = tree[key]
    fields = [model.model_fields.get(str(path[-1])) for model in fitting(models, tree)]
    return next((field for field in fields if field is not None), None)


def all_paths(annotation: Any, tree: Any) -> Iterator[str]:
    """Dotted paths of all fields outside of lists, of the classes whose ``kind`` is that of ``tree``."""
    for model in fitting(models_in(annotation, in_lists=False), tree):
        for name, field in model.model_fields.items():
            yield name
            inner = tree.get(name) if isinstance(tree, Mapping) else None
            yield from (f"{name}.{path}" for path in all_paths(field.annotation, inner))
