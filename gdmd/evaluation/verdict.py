"""The answer of a Shapes run: is the student better than its teacher? Differences are paired by caption and noise.

A row of evaluation.json holds, under "per_image", which images the checker found right:

    {"split": "eval", "seed": 777, "images": 2, "right": {"colors": ["11", "01", ...], ...},   one text per caption
     "captions": {"colors": ["a red ring", ...], ...}}

Two rows of the same split, seed and sizes show the same captions from the same noise, so that their difference is
measured image by image. Its interval resamples whole captions within their task, as that of ShapesEval does: a task with
few captions repeats them, and the images of one caption succeed or fail together wherever they stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from gdmd.reporting.pages import Number, Verdict
from gdmd.reporting.plots import method_in
from gdmd.reporting.statistics import REPLICATES, bootstrap_means, percentile_interval
from gdmd.reporting.tables import difference, estimate
from gdmd.shapes.grammar import TASKS, Split, catalog, fixed_rows

PER_IMAGE = "per_image"
FEW = 5
"""Fewest different captions per task for which an interval is given: fewer say nothing about their spread."""
SHAPES_SET = "the Shapes evaluation set"
"""The prompt set of an evaluation of Shapes sources without a prompt file."""
_FIXED: Mapping[str, Split] = {"dev": "dev", "eval": "eval", SHAPES_SET: "eval"}
Row = Mapping[str, Any]
Scores = Mapping[str, np.ndarray]
"""Task -> the share of right images of each caption (or a difference of shares)."""
Captions = Mapping[str, Sequence[Any]]
"""Task -> the caption of each of these shares."""


@dataclass(frozen=True)
class Estimate:
    """A mean of task means and its 95 % interval; NaN where there are too few captions for one."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def sign(self) -> int:
        """+1 or -1 where the whole interval is above or below 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def per_image(
    correct: Sequence[bool], tasks: Sequence[str], captions: Sequence[str], images: int, split: str, seed: int
) -> dict[str, Any]:
    """What ``PER_IMAGE`` holds. correct [N]: image by image, ``images`` of each caption; tasks: one per caption."""
    right: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for k, (task, caption) in enumerate(zip(tasks, captions, strict=True)):
        own = correct[k * images : (k + 1) * images]
        right.setdefault(task, []).append("".join("1" if one else "0" for one in own))
        names.setdefault(task, []).append(caption)
    return {"split": split, "seed": seed, "images": images, "right": right, "captions": names}


def scores_of(row: Row) -> Scores:
    """The share of right images by caption; empty where the row does not hold it."""
    right = row.get(PER_IMAGE, {}).get("right", {})
    return {task: np.array([own.count("1") / len(own) for own in captions]) for task, captions in right.items()}


def captions_of(row: Row) -> Captions:
    """The caption of every share of ``scores_of``. Rows of earlier versions hold none: those of a fixed set are known."""
    own = row[PER_IMAGE]
    if "captions" in own:
        return cast(Captions, own["captions"])
    right, split = own["right"], _FIXED.get(own["split"])
    if split is None:
        return {task: range(len(found)) for task, found in right.items()}
    rows = fixed_rows(split, max(map(len, right.values()))).reshape(len(TASKS), -1)
    return {task: list(catalog().texts(rows[TASKS.index(task), : len(found)])) for task, found in right.items()}


def paired(a: Row, b: Row) -> Estimate | None:
    """ShapesEval of a minus that of b; None where their images do not pair (another seed, other captions)."""
    same = ("split", "seed", "images")
    if not all(PER_IMAGE in row for row in (a, b)) or any(a[PER_IMAGE][k] != b[PER_IMAGE][k] for k in same):
        return None
    own, other, captions = scores_of(a), scores_of(b), captions_of(a)
    if captions != captions_of(b):
        return None
    return task_mean({task: found - other[task] for task, found in own.items()}, captions)


def task_mean(scores: Scores, captions: Captions) -> Estimate:
    """Mean of task means, and its interval from resampling whole captions within their task."""
    mean = float(np.mean([found.mean() for found in scores.values()]))
    if min(len(set(captions[task])) for task in scores) < FEW:
        return Estimate(mean)
    rng = np.random.default_rng(0)
    drawn = [bootstrap_means(found, captions[task], REPLICATES, rng) for task, found in scores.items()]
    return Estimate(mean, *percentile_interval(np.mean(drawn, axis=0)))


def is_teacher(name: str) -> bool:
    """Whether a row of evaluation.json is one of the teacher's."""
    return method_in(name) == "teacher"


def shapes_verdict(rows: Mapping[str, Row]) -> Verdict:
    """Student against teacher (the row with most NFE), and against the other students; the last row is the student."""
    students = [name for name in rows if not is_teacher(name)]
    teacher = max((name for name in rows if is_teacher(name)), key=lambda name: rows[name]["nfe"], default=None)
    if not students:
        return Verdict("The student has not been measured yet.")
    name = students[-1]
    own = rows[name]
    numbers = [Number(f"ShapesEval of {name}", _overall(own))]
    if teacher is None:
        sentence = f"The teacher of {_short(name)} has not been measured yet; gdmd report RUN measures it."
        return Verdict(sentence, numbers)
    found = _difference(own, rows[teacher])
    sentence = (
        f"On ShapesEval, {_short(name)} with {own['nfe']:,} network calls per image {_words(found)} its teacher with "
        f"{rows[teacher]['nfe']:,} calls."
    )
    for other in students[:-1]:
        against = _difference(own, rows[other])
        sentence += (
            f" It {_words(against)} {_short(other)} with {rows[other]['nfe']:,} calls: {_unbroken(_signed(against))}."
        )
    numbers += [
        Number(f"ShapesEval of {teacher}", _overall(rows[teacher])),
        Number("difference, paired by caption and noise", _signed(found)),
    ]
    return Verdict(sentence, numbers, [_note(found, own)])


def _note(found: Estimate, row: Row) -> str:
    if math.isnan(found.low):
        why = (
            f"there are fewer than {FEW} captions per task"
            if PER_IMAGE in row
            else "the images of the two rows cannot be paired"
        )
        return f"The difference has no interval, because {why}; so nothing is claimed."
    return (
        f"ShapesEval: share of {row['images']:,} images in which the checker finds everything the caption asks for, mean "
        "of six tasks. Brackets: 95\u00a0% interval over captions. It does not cover another training seed; gdmd "
        "sweep does."
    )


def _words(found: Estimate) -> str:
    if math.isnan(found.low):
        return "cannot be told apart yet from"
    return {1: "is better than", -1: "is worse than", 0: "is not distinguishable from"}[found.sign]


def _overall(row: Row) -> str:
    return estimate(_value(row), *(row.get("interval") or (None, None)))


def _value(row: Row) -> float:
    found = row["shapeseval"].get("overall")
    return math.nan if found is None else float(found)


def _difference(a: Row, b: Row) -> Estimate:
    return paired(a, b) or Estimate(_value(a) - _value(b))


def _signed(found: Estimate) -> str:
    return difference(found.mean, found.low, found.high)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _short(name: str) -> str:
    """The method of a row: "GDMD, 4 steps" -> GDMD."""
    return name.split(",")[0]
