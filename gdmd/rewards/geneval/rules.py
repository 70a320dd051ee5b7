"""GenEval's rules (arXiv 2310.11513, section 3 and the released evaluation): is what a prompt asks for among the detections?

Pure functions of detections and of a color classifier; no network, no image, no torch. Two answers, never mixed up:

  ``judge``           correct or not: the metric. All ``include`` requirements hold and no ``exclude`` one is reached.
  ``partial_credit``  share of the elementary demands that are met, in [0, 1]: a reward for training, not GenEval.

Objects of a class are kept above a confidence of .3 (.9 where the task is counting), at most 16, best first. A color or
a position is asked of the ``count`` best objects; all of them must answer. Position: with centers c and sizes s,

    offset = c_a - c_b,  rev = max(|offset| - 0.1 (s_a + s_b), 0) sign(offset),  (dx, dy) = rev / |offset|

nothing holds where both parts of rev are below .001; left of dx < -.5, right of dx > .5, above dy < -.5, below dy > .5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
KEEP, KEEP_COUNTING, MOST = 0.3, 0.9, 16
SLACK, NOWHERE, DIRECTION = 0.1, 1e-3, 0.5
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image; y grows downwards."""


@dataclass(frozen=True)
class Found:
    """One detected object; ``key`` finds its mask again (a position in the detector's list)."""

    box: Box
    confidence: float
    key: int = 0


Detected = Mapping[str, Sequence[Found]]
"""Class name -> objects of that class, in any order and of any confidence."""
ColorOf = Callable[[str, Sequence[Found]], Sequence[str]]
"""(class name, objects) -> the color of each object, one of ``COLORS``."""


@dataclass(frozen=True)
class Wanted:
    """At least ``count`` objects of a class; with a color, a relation to the objects of an earlier requirement."""

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
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether the image is right, and every reason why it is not, as the official script words them."""

    correct: bool
    reasons: tuple[str, ...]


def kept(detected: Detected, tag: str) -> dict[str, tuple[Found, ...]]:
    """The objects that count: confident enough for the task, best first, at most 16 of a class."""
    least = KEEP_COUNTING if tag == "counting" else KEEP
    order = {name: sorted(objects, key=lambda one: -one.confidence) for name, objects in detected.items()}
    best = {name: tuple(one for one in objects if one.confidence > least)[:MOST] for name, objects in order.items()}
    return {name: objects for name, objects in best.items() if objects}


def judge(task: Task, detected: Detected, color_of: ColorOf) -> Verdict:
    """The metric for one image. ``color_of`` is asked only where the task names a color."""
    objects = kept(detected, task.tag)
    reasons: list[str] = []
    groups: list[tuple[Found, ...] | None] = []
    for wanted in task.include:
        best = objects.get(wanted.name, ())[: wanted.count]
        reason = _missing(wanted, best) or _wrong_color(wanted, best, color_of) or _wrong_place(wanted, best, groups)
        groups.append(None if reason else best)
        if reason:
            reasons.append(reason)
    for wanted in task.exclude:
        number = len(objects.get(wanted.name, ()))
        if number >= wanted.count:
            reasons.append(f"expected {wanted.name}<{wanted.count}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def partial_credit(task: Task, detected: Detected, color_of: ColorOf) -> float:
    """Mean over the elementary demands of how far each is met, in [0, 1]; 1 exactly where ``judge`` says correct.

    With n found objects of the class of a requirement: number 1 - (missing or surplus) / count, at least 0; color the
    share of the wanted objects that have it; relation the share of the wanted (object, target) pairs that satisfy it.
    Missing objects meet no color and no relation. An ``exclude`` of a class that is not asked for is a demand too.
    """
    objects = kept(detected, task.tag)
    limit = {wanted.name: wanted.count for wanted in task.exclude}
    groups = [objects.get(wanted.name, ())[: wanted.count] for wanted in task.include]
    met: list[float] = []
    for wanted, best in zip(task.include, groups, strict=True):
        number = len(objects.get(wanted.name, ()))
        surplus = max(0, number - limit[wanted.name] + 1) if wanted.name in limit else 0
        met.append(max(0.0, 1 - (max(0, wanted.count - number) + surplus) / wanted.count))
        if wanted.color is not None:
            colors = color_of(wanted.name, best) if best else ()
            met.append(sum(color == wanted.color for color in colors) / wanted.count)
        if wanted.relation is not None:
            others = groups[wanted.target]
            right = sum(wanted.relation in relations(a.box, b.box) for a in best for b in others)
            met.append(right / (wanted.count * task.include[wanted.target].count))
    for name in limit.keys() - {wanted.name for wanted in task.include}:
        met.append(max(0.0, 1 - max(0, len(objects.get(name, ())) - limit[name] + 1) / limit[name]))
    return sum(met) / len(met)


def relations(a: Box, b: Box) -> frozenset[str]:
    """Where box a is relative to box b: up to two of ``RELATIONS``."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    rev = [math.copysign(max(abs(o) - SLACK * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if all(abs(part) < NOWHERE for part in rev):
        return frozenset()
    dx, dy = (part / math.hypot(*offset) for part in rev)
    holds = (dx < -DIRECTION, dx > DIRECTION, dy < -DIRECTION, dy > DIRECTION)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def read_task(row: Any, where: str) -> Task:
    """One JSON object of the official evaluation_metadata.jsonl. ValueError that names the place and the mistake."""
    try:
        task = Task(
            _checked(row["tag"], TASKS, "tag"),
            str(row["prompt"]),
            tuple(_wanted(one, number) for number, one in enumerate(row["include"])),
            tuple(_wanted(one, 0) for one in row.get("exclude", ())),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f'{where}: not GenEval metadata ({said}); expected {{"tag", "include": [...], "prompt"}}'
        ) from error
    if not task.include:
        raise ValueError(f"{where}: asks for nothing; GenEval metadata need at least one object under include")
    return task


def as_row(task: Task) -> dict[str, Any]:
    """The task in the official format."""
    row: dict[str, Any] = {"tag": task.tag, "include": [_as_row(one) for one in task.include]}
    if task.exclude:
        row["exclude"] = [_as_row(one) for one in task.exclude]
    return row | {"prompt": task.prompt}


def _missing(wanted: Wanted, best: Sequence[Found]) -> str:
    return "" if len(best) >= wanted.count else f"expected {wanted.name}>={wanted.count}, found {len(best)}"


def _wrong_color(wanted: Wanted, best: Sequence[Found], color_of: ColorOf) -> str:
    if wanted.color is None:
        return ""
    colors = list(color_of(wanted.name, best))
    right = colors.count(wanted.color)
    if right >= wanted.count:
        return ""
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return f"expected {wanted.color} {wanted.name}>={wanted.count}, found {right} {wanted.color}; and {seen}"


def _wrong_place(wanted: Wanted, best: Sequence[Found], groups: Sequence[Sequence[Found] | None]) -> str:
    if wanted.relation is None:
        return ""
    targets = groups[wanted.target]
    if targets is None:
        return f"no target for {wanted.name} to be {wanted.relation}"
    for one in best:
        for target in targets:
            true = relations(one.box, target.box)
            if wanted.relation not in true:
                found = " and ".join(name for name in RELATIONS if name in true)
                return f"expected {wanted.name} {wanted.relation} target, found {found} target"
    return ""


def _wanted(row: Mapping[str, Any], number: int) -> Wanted:
    count = row["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count should be 1 or more, got {count!r}")
    color = _checked(row["color"], COLORS, "color") if "color" in row else None
    if "position" not in row:
        return Wanted(str(row["class"]), count, color)
    relation, target = row["position"]
    if not isinstance(target, int) or not 0 <= target < number:
        raise ValueError(f"position refers to requirement {target!r}, and only {number} come before it")
    return Wanted(str(row["class"]), count, color, _checked(relation, RELATIONS, "position"), target)


def _as_row(wanted: Wanted) -> dict[str, Any]:
    row: dict[str, Any] = {"class": wanted.name, "count": wanted.count}
    if wanted.color is not None:
        row["color"] = wanted.color
    if wanted.relation is not None:
        row["position"] = [wanted.relation, wanted.target]
    return row


def _checked(value: Any, known: Sequence[str], what: Literal["tag", "color", "position"]) -> str:
    if value not in known:
        raise ValueError(f"{what} {value!r} is none of {', '.join(known)}")
    return str(value)
