"""Random prompts of GenEval's six tasks, for training and for testing on prompts other than the official 553.

The same grammar and metadata format (arXiv 2310.11513, table 1). Plurals are English ("three sheep"), people get no
color, and the two objects of a prompt and their colors differ. No two prompts ask for the same image: "a dog and a cat"
is "a cat and a dog", and "a dog left of a cat" is "a cat right of a dog".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable

from gdmd.rewards.geneval.detector import CLASSES
from gdmd.rewards.geneval.rules import COLORS, RELATIONS, TASKS, Requirement, Task

NUMBERS = ("two", "three", "four")
_OPPOSITE = {"right of": "left of", "below": "above"}
_COLORED = CLASSES[1:]  # without "person"
_PLURALS = {
    "person": "people", "sheep": "sheep", "skis": "pairs of skis", "scissors": "pairs of scissors", "knife": "knives",
    "toothbrush": "toothbrushes", "wine glass": "wine glasses", "computer mouse": "computer mice", "bus": "buses",
    "couch": "couches", "bench": "benches", "sandwich": "sandwiches", "broccoli": "heads of broccoli",
}  # fmt: skip


def draw_tasks(per_task: int, seed: int, without: Collection[Task] = ()) -> tuple[Task, ...]:
    """``per_task`` prompts of every task (at most 80 of single objects) that ask for no image ``without`` asks for.

    ValueError if another task has fewer prompts.
    """
    taken, drawn = set(map(_asked, without)), list[Task]()
    for tag in TASKS:
        rng = random.Random(f"{seed} {tag}")
        if tag == "single_object":
            single = map(_single, rng.sample(CLASSES, len(CLASSES)))
            kind = [task for task in single if _asked(task) not in taken][:per_task]
        else:
            kind = _fresh(_DRAW[tag], rng, per_task, taken)
        drawn += kind
        if len(kind) < per_task and tag != "single_object":
            raise ValueError(f"there are not {per_task} different prompts of task {tag}; ask for fewer")
    return tuple(drawn)


def _fresh(
    draw: Callable[[random.Random], Task], rng: random.Random, count: int, taken: Collection[Hashable]
) -> list[Task]:
    found: dict[Hashable, Task] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        task = draw(rng)
        if (asked := _asked(task)) not in taken:
            found.setdefault(asked, task)
    return list(found.values())


def _asked(task: Task) -> Hashable:
    """The objects and relations that a prompt asks for, whatever their order."""
    asked: set[Hashable] = {(one.name, one.count, one.color) for one in task.include}
    for one in task.include:
        if one.relation is not None:
            names = (one.name, task.include[one.target].name)
            opposite = _OPPOSITE.get(one.relation)
            asked.add((*names, one.relation) if opposite is None else (*names[::-1], opposite))
    return frozenset(asked)


def _single(name: str) -> Task:
    return Task("single_object", f"a photo of {_a(name)}", (Requirement(name, 1),))


def _two(rng: random.Random) -> Task:
    first, second = rng.sample(CLASSES, 2)
    return Task(
        "two_object", f"a photo of {_a(first)} and {_a(second)}", (Requirement(first, 1), Requirement(second, 1))
    )


def _counting(rng: random.Random) -> Task:
    name, count = rng.choice(CLASSES), rng.randint(2, 4)
    plural = _PLURALS.get(name, f"{name}s")
    prompt = f"a photo of {NUMBERS[count - 2]} {plural}"
    return Task("counting", prompt, (Requirement(name, count),), (Requirement(name, count + 1),))


def _colors(rng: random.Random) -> Task:
    name, color = rng.choice(_COLORED), rng.choice(COLORS)
    return Task("colors", f"a photo of {_a(color)} {name}", (Requirement(name, 1, color),))


def _position(rng: random.Random) -> Task:
    first, second = rng.sample(CLASSES, 2)
    relation = rng.choice(RELATIONS)
    prompt = f"a photo of {_a(first)} {relation} {_a(second)}"
    return Task("position", prompt, (Requirement(second, 1), Requirement(first, 1, relation=relation, target=0)))


def _color_attr(rng: random.Random) -> Task:
    (first, second), (one, other) = rng.sample(_COLORED, 2), rng.sample(COLORS, 2)
    prompt = f"a photo of {_a(one)} {first} and {_a(other)} {second}"
    return Task("color_attr", prompt, (Requirement(first, 1, one), Requirement(second, 1, other)))


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


_DRAW = {"two_object": _two, "counting": _counting, "colors": _colors, "position": _position, "color_attr": _color_attr}
