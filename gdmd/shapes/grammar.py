"""The language of the Shapes world: six tasks that mirror GenEval (arXiv 2310.11513), their captions and splits.

A caption fixes some attributes of a scene and leaves the others free. Every caption is a row of a ``Catalog``
of integer tensors, so that scenes, checks and embeddings are all index arithmetic.

Splits are by combination: for two_object, position and color_attr the classes below are divided into train, dev and
eval, and a caption never shares its class with a caption of another split.
  two_object   the unordered pair of shapes                              15 classes
  position     relation and pair, with "a left of b" = "b right of a"    60 classes
  color_attr   the unordered pair of (color, shape)                      840 classes
The other three tasks have no combinations to hold out: all splits share their captions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations, product
from typing import Literal

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLURALS = ("circles", "squares", "triangles", "diamonds", "crosses", "rings")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = (1, 0, 3, 2)
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

MAX_COUNT = 4
"""Largest number in the counting task. The vocabulary has larger ones, which no caption uses."""

PAD, NULL = 0, 1
WORDS = (
    "<pad>",
    "<null>",
    "a",
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
    *NUMBERS[2:],
    *COLORS,
    *SHAPES,
    *PLURALS,
)
CAPTION_TOKENS = 8

Split = Literal["train", "dev", "eval"]
SPLITS: tuple[Split, ...] = ("train", "dev", "eval")
_SHARES = {"two_object": (9, 2, 4), "position": (39, 6, 15), "color_attr": (588, 84, 168)}
_SPLIT_SEED = 20260438
ANY = -1


@dataclass(frozen=True)
class Caption:
    """One caption and what it asks for: up to two (shape, color or ANY, count), and a relation of first to second."""

    text: str
    task: int
    shape: tuple[int, ...]
    color: tuple[int, ...]
    count: tuple[int, ...]
    relation: int = ANY

    @property
    def key(self) -> tuple[object, ...]:
        """The combination class: equal for captions that describe the same scene in other words."""
        if self.task == TASKS.index("position"):
            a, b = self.shape
            return (a, b, self.relation) if a < b else (b, a, INVERSE[self.relation])
        return tuple(sorted(zip(self.shape, self.color, self.count, strict=True)))


def _all_captions() -> list[Caption]:
    """Every caption of the language, by task, in a fixed order."""
    found: list[Caption] = []
    shapes, colors = range(len(SHAPES)), range(len(COLORS))
    found += [Caption(f"a {SHAPES[s]}", 0, (s,), (ANY,), (1,)) for s in shapes]
    for a, b in permutations(shapes, 2):
        found.append(Caption(f"a {SHAPES[a]} and a {SHAPES[b]}", 1, (a, b), (ANY, ANY), (1, 1)))
    for n, s in product(range(2, MAX_COUNT + 1), shapes):
        found.append(Caption(f"{NUMBERS[n]} {PLURALS[s]}", 2, (s,), (ANY,), (n,)))
    found += [Caption(f"a {COLORS[c]} {SHAPES[s]}", 3, (s,), (c,), (1,)) for c, s in product(colors, shapes)]
    for (a, b), r in product(permutations(shapes, 2), range(len(RELATIONS))):
        found.append(Caption(f"a {SHAPES[a]} {RELATIONS[r]} a {SHAPES[b]}", 4, (a, b), (ANY, ANY), (1, 1), r))
    for (a, b), (c, d) in product(permutations(shapes, 2), permutations(colors, 2)):
        text = f"a {COLORS[c]} {SHAPES[a]} and a {COLORS[d]} {SHAPES[b]}"
        found.append(Caption(text, 5, (a, b), (c, d), (1, 1)))
    return found


def _divide(captions: Sequence[Caption]) -> dict[tuple[int, tuple[object, ...]], int]:
    """(task, class) -> split index, by a fixed shuffle of the classes."""
    split: dict[tuple[int, tuple[object, ...]], int] = {}
    for name, (train, dev, _) in _SHARES.items():
        task = TASKS.index(name)
        keys = sorted({c.key for c in captions if c.task == task}, key=repr)
        random.Random(f"{_SPLIT_SEED}/{name}").shuffle(keys)
        for place, key in enumerate(keys):
            split[task, key] = 0 if place < train else 1 if place < train + dev else 2
    return split


@dataclass(frozen=True)
class Catalog:
    """All captions as tensors, one row each; ANY (and count 0) for a missing second object."""

    captions: tuple[Caption, ...]
    task: Tensor  # [P]
    shape: Tensor  # [P, 2]
    color: Tensor  # [P, 2]
    count: Tensor  # [P, 2]
    relation: Tensor  # [P]
    tokens: Tensor  # [P, 8]
    split: Tensor  # [P] index into SPLITS, ANY where the caption belongs to all

    def __len__(self) -> int:
        return len(self.captions)

    def row(self, text: str) -> int:
        """The row of a caption. ValueError for text outside the language, with the nearest caption."""
        index, given = self._index, normalized(text)
        if given in index:
            return index[given]
        import difflib

        near = difflib.get_close_matches(text, index, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"not a caption of the Shapes language: {text!r}{hint} (see docs/concepts/shapes.md)")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {caption.text: row for row, caption in enumerate(self.captions)}

    def texts(self, rows: Tensor) -> tuple[str, ...]:
        """The captions of some rows."""
        return tuple(self.captions[row].text for row in rows.tolist())

    def rows(self, split: Split, task: int) -> Tensor:
        """The rows of one task that belong to a split, [n]."""
        mine = (self.split == SPLITS.index(split)) | (self.split == ANY)
        return torch.nonzero(mine & (self.task == task))[:, 0]


def _pair(captions: Sequence[Caption], pick: Callable[[Caption], tuple[int, ...]], missing: int) -> Tensor:
    return torch.tensor([(*pick(c), missing)[:2] for c in captions])


def normalized(text: str) -> str:
    """Normalized as captions are: "an" becomes "a", words are one space apart."""
    return " ".join("a" if word == "an" else word for word in text.split())


def tokenize(text: str) -> list[int]:
    """Word ids of a caption (normalized), padded to CAPTION_TOKENS. ValueError for an unknown word or a longer text."""
    ids = []
    for word in normalized(text).split():
        if word not in WORDS[2:]:
            raise ValueError(f"unknown word {word!r} in caption {text!r}; the vocabulary is {', '.join(WORDS[2:])}")
        ids.append(WORDS.index(word))
    if not 1 <= len(ids) <= CAPTION_TOKENS:
        raise ValueError(f"caption {text!r} has {len(ids)} words; a caption has 1 to {CAPTION_TOKENS}")
    return ids + [PAD] * (CAPTION_TOKENS - len(ids))


@cache
def catalog() -> Catalog:
    """Every caption of the language."""
    captions = _all_captions()
    split = _divide(captions)
    return Catalog(
        captions=tuple(captions),
        task=torch.tensor([c.task for c in captions]),
        shape=_pair(captions, lambda c: c.shape, ANY),
        color=_pair(captions, lambda c: c.color, ANY),
        count=_pair(captions, lambda c: c.count, 0),
        relation=torch.tensor([c.relation for c in captions]),
        tokens=torch.tensor([tokenize(c.text) for c in captions]),
        split=torch.tensor([split.get((c.task, c.key), ANY) for c in captions]),
    )


def training_captions() -> list[list[str]]:
    """Captions of the train split, one list per task."""
    table = catalog()
    return [list(table.texts(table.rows("train", task))) for task in range(len(TASKS))]


def draw_rows(count: int, generator: torch.Generator) -> Tensor:
    """``count`` random catalog rows of the train split: the task uniform, then the caption uniform within it. [count]"""
    table = catalog()
    task = torch.randint(len(TASKS), (count,), generator=generator)
    unit = torch.rand(count, generator=generator)
    rows = torch.empty(count, dtype=torch.int64)
    for index in range(len(TASKS)):
        own = table.rows("train", index)
        mine = task == index
        rows[mine] = own[(unit[mine] * len(own)).long()]
    return rows


def fixed_rows(split: Split, per_task: int) -> Tensor:
    """The fixed prompt set of a split: ``per_task`` rows of each task, tasks in order. [6 * per_task]

    Each task's captions are shuffled once and then taken in turn, so every caption occurs equally often (+-1); tasks
    with fewer captions than ``per_task`` (single_object has 6) repeat them, each time with other noise.
    """
    table = catalog()
    chosen = []
    for task in range(len(TASKS)):
        own = table.rows(split, task).tolist()
        random.Random(f"{_SPLIT_SEED}/{split}/{task}").shuffle(own)
        chosen += [own[i % len(own)] for i in range(per_task)]
    return torch.tensor(chosen)
