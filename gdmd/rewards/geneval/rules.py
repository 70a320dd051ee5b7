"""GenEval's rules (arXiv 2310.11513, section 3 and the released evaluation): are the prompt's objects among the detections?

Pure functions of detections and of a color classifier; no network, no image, no torch. Two different scores:

  ``judge``           the metric: correct if all ``include`` requirements hold and no ``exclude`` one does.
  ``partial_credit``  fraction of the elementary requirements that hold, in [0, 1]: a reward for training, not GenEval.

Objects of a class are kept above a confidence of 0.3 (0.9 for the counting task), at most 16, most confident first. A
color or a position must hold for each of the ``count`` best objects. Position: with centers c and sizes s,

    offset = c_a - c_b,  rev = max(|offset| - 0.1 (s_a + s_b), 0) sign(offset),  (dx, dy) = rev / |offset|

no relation if both parts of rev are below 0.001; left of: dx < -0.5, right of: dx > 0.5, above: dy < -0.5,
below: dy > 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
KEEP, KEEP_COUNTING, MAX_OBJECTS = 0.3, 0.9, 16
SLACK, MIN_OFFSET, DIRECTION = 0.1, 1e-3, 0.5
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image; y grows downwards."""


@dataclass(frozen=True)
class DetectedObject:
    """One detected object; ``key``: the index of its mask."""

    box: Box
    confidence: float
    key: int = 0


Detected = Mapping[str, Sequence[DetectedObject]]
"""Class name -> objects of that class, in any order and of any confidence."""
ColorOf = Callable[[str, Sequence[DetectedObject]], Sequence[str]]
"""(class name, objects) -> the color of each object, one of ``COLORS``."""


@dataclass(frozen=True)
class Requirement:
    """At least ``count`` objects of a class, optionally with a color and a relation to those of an earlier requirement."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """One line of GenEval's metadata."""

    tag: str
    prompt: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether the image is correct, and the reasons if not, worded as in the official script."""

    correct: bool
    reasons: tuple[str, ...]


def kept(detected: Detected, tag: str) -> dict[str, tuple[DetectedObject, ...]]:
    """The objects that count: confident enough for the task, best first, at most 16 of a class."""
    least = KEEP_COUNTING if tag == "counting" else KEEP
    order = {name: sorted(objects, key=lambda one: -one.confidence) for name, objects in detected.items()}
    best = {
        name: tuple(one for one in objects if one.confidence > least)[:MAX_OBJECTS] for name, objects in order.items()
    }
    return {name: objects for name, objects in best.items() if objects}


def judge(task: Task, detected: Detected, color_of: ColorOf) -> Verdict:
    """The metric for one image. ``color_of`` is called only for tasks that name a color."""
    objects = kept(detected, task.tag)
    reasons: list[str] = []
    groups: list[tuple[DetectedObject, ...] | None] = []
    for need in task.include:
        best = objects.get(need.name, ())[: need.count]
        reason = _missing(need, best) or _wrong_color(need, best, color_of) or _wrong_place(need, best, groups)
        groups.append(None if reason else best)
        if reason:
            reasons.append(reason)
    for need in task.exclude:
        number = len(objects.get(need.name, ()))
        if number >= need.count:
            reasons.append(f"expected {need.name}<{need.count}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def partial_credit(task: Task, detected: Detected, color_of: ColorOf) -> float:
    """Mean of the elementary requirements, each in [0, 1]; 1 exactly if ``judge`` says correct.

    For each class: the number of objects, 1 - (missing or surplus) / count, at least 0; the color, the fraction of the
    ``count`` objects that have it; the relation, the fraction of the required (object, target) pairs that satisfy it.
    Missing objects have no color and no relation. An ``exclude`` of another class is a requirement, too.
    """
    objects = kept(detected, task.tag)
    limit = {need.name: need.count for need in task.exclude}
    groups = [objects.get(need.name, ())[: need.count] for need in task.include]
    met: list[float] = []
    for need, best in zip(task.include, groups, strict=True):
        number = len(objects.get(need.name, ()))
        surplus = max(0, number - limit[need.name] + 1) if need.name in limit else 0
        met.append(max(0.0, 1 - (max(0, need.count - number) + surplus) / need.count))
        if need.color is not None:
            colors = color_of(need.name, best) if best else ()
            met.append(sum(color == need.color for color in colors) / need.count)
        if need.relation is not None:
            others = groups[need.target]
            right = sum(need.relation in relations(a.box, b.box) for a in best for b in others)
            met.append(right / (need.count * task.include[need.target].count))
    for name in limit.keys() - {need.name for need in task.include}:
        met.append(max(0.0, 1 - max(0, len(objects.get(name, ())) - limit[name] + 1) / limit[name]))
    return sum(met) / len(met)


def relations(a: Box, b: Box) -> frozenset[str]:
    """The position of box a relative to box b: up to two of ``RELATIONS``."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    rev = [math.copysign(max(abs(o) - SLACK * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if all(abs(part) < MIN_OFFSET for part in rev):
        return frozenset()
    dx, dy = (part / math.hypot(*offset) for part in rev)
    holds = (dx < -DIRECTION, dx > DIRECTION, dy < -DIRECTION, dy > DIRECTION)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def read_task(row: Any, where: str) -> Task:
    """One JSON object of the official evaluation_metadata.jsonl. ValueError that starts with ``where``."""
    try:
        task = Task(
            _checked(row["tag"], TASKS, "tag"),
            str(row["prompt"]),
            tuple(_requirement(one, number) for number, one in enumerate(row["include"])),
            tuple(_requirement(one, 0) for one in row.get("exclude", ())),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f'{where}: not GenEval metadata ({said}); expected {{"tag", "include": [...], "prompt"}}'
        ) from error
    if not task.include:
        raise ValueError(f"{where}: asks for nothing; GenEval metadata needs at least one object under include")
    return task


def as_row(task: Task) -> dict[str, Any]:
    """The task in the official format."""
    row: dict[str, Any] = {"tag": task.tag, "include": [_as_row(one) for one in task.include]}
    if task.exclude:
        row["exclude"] = [_as_row(one) for one in task.exclude]
    return row | {"prompt": task.prompt}


def _missing(need: Requirement, best: Sequence[DetectedObject]) -> str:
    return "" if len(best) >= need.count else f"expected {need.name}>={need.count}, found {len(best)}"


def _wrong_color(need: Requirement, best: Sequence[DetectedObject], color_of: ColorOf) -> str:
    if need.color is None:
        return ""
    colors = list(color_of(need.name, best))
    right = colors.count(need.color)
    if right >= need.count:
        return ""
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return f"expected {need.color} {need.name}>={need.count}, found {right} {need.color}; and {seen}"


def _wrong_place(
    need: Requirement, best: Sequence[DetectedObject], groups: Sequence[Sequence[DetectedObject] | None]
) -> str:
    if need.relation is None:
        return ""
    targets = groups[need.target]
    if targets is None:
        return f"no target for {need.name} to be {need.relation}"
    for one in best:
        for target in targets:
            true = relations(one.box, target.box)
            if need.relation not in true:
                found = " and ".join(name for name in RELATIONS if name in true)
                return f"expected {need.name} {need.relation} target, found {found} target"
    return ""


def _requirement(row: Mapping[str, Any], number: int) -> Requirement:
    count = row["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count should be 1 or more, got {count!r}")
    color = _checked(row["color"], COLORS, "color") if "color" in row else None
    if "position" not in row:
        return Requirement(str(row["class"]), count, color)
    relation, target = row["position"]
    if not isinstance(target, int) or not 0 <= target < number:
        raise ValueError(f"position refers to requirement {target!r}, and only {number} come before it")
    return Requirement(str(row["class"]), count, color, _checked(relation, RELATIONS, "position"), target)


def _as_row(need: Requirement) -> dict[str, Any]:
    row: dict[str, Any] = {"class": need.name, "count": need.count}
    if need.color is not None:
        row["color"] = need.color
    if need.relation is not None:
        row["position"] = [need.relation, need.target]
    return row


def _checked(value: Any, known: Sequence[str], what: Literal["tag", "color", "position"]) -> str:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    return str(value)
