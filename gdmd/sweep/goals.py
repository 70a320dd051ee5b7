"""What the students of diffusers pipelines should reach (GOALS), and whether they do, from the images of each run.

Intervals come from resampling captions within their tasks, the same ones on both sides of a comparison. They hold for
these trainings only; the values of the seeds show how much a training depends on its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdmd.reporting.statistics import REPLICATES, Interval, cluster_counts, percentile_interval
from gdmd.shapes.grammar import Split, catalog, fixed_rows

Floats = NDArray[np.float64]
Line = Mapping[str, Any]
"""A line of a sweep's table whose run has a ``pipeline``."""
Statistic = Callable[[Any, Any], Any]
"""A function of the scores of both sides; elementwise on the bootstrap replicates."""

OF_TEACHER, LONGER_OF_TEACHER = 0.90, 1.0
"""Share of the guided many-step teacher's ShapesEval that a four-step LoRA should reach, and after more updates."""
OVER_FEW_STEPS, OVER_DMD = 0.10, 0.02
"""Gain over the teacher's guided sampler with as many steps, and over other methods after as many updates or passes."""
_BASELINES = {"dmd": "DMD", "algorithm_1": "Algorithm 1", "dmd_refl": "DMD + ReFL"}
"""Methods with which GDMD LoRAs are compared after as many updates or passes; the names are those of ``pipeline_facts``."""
SAME_PASSES = 0.01
"""Largest relative difference of passes that count as equal."""
LAB_STUDENT, LAB_TEACHER = 0.553, 0.590
"""ShapesEval of GDMD after 200 updates and of its teacher (docs/results/shapes.jsonl, means over five seeds)."""


@dataclass(frozen=True)
class Estimate:
    """A number from all seeds that both sides have, its 95 % interval over captions, and the number of each seed."""

    value: float
    interval: Interval
    seeds: Sequence[float]


@dataclass(frozen=True)
class Goal:
    """A number and what it should be. target: its lower bound; None: its interval should contain 0."""

    text: str
    found: Estimate
    target: float | None
    share: bool = False  # a ratio, not a difference

    @property
    def met(self) -> bool:
        """Whether the number reaches its target; without a target, whether its interval contains 0."""
        low, high = self.found.interval
        return low <= 0 <= high if self.target is None else self.found.value >= self.target


class Captions:
    """The captions of an evaluation with ``images`` images of each, and bootstrap weights over them."""

    def __init__(self, per_task: int, images: int, split: Split = "eval", replicates: int = REPLICATES) -> None:
        rows, self.images = fixed_rows(split, per_task), images
        tasks = catalog().task[rows].numpy()
        self.mean = _weights(rows.numpy(), tasks, None)[0]  # [C]
        self.drawn = _weights(rows.numpy(), tasks, replicates)  # [R, C]

    def of(self, line: Line) -> Floats:
        """[C]: the share of correct images of each caption. ValueError for a line of another evaluation."""
        right = np.array([int(mark) for mark in line["correct"]], dtype=np.float64)
        if len(right) != len(self.mean) * self.images:
            raise ValueError(
                f"the line of {line['method']}, seed {line['seed']}, has {len(right)} images, but this sweep's evaluation "
                f"has {len(self.mean)} captions with {self.images} images each; restore its evaluation, or measure the run "
                "again without --pages-only"
            )
        return right.reshape(len(self.mean), -1).mean(1)

    def interval(self, lines: Mapping[int, Line]) -> Interval:
        """The bootstrap interval of the mean over the runs of a row (seed -> line)."""
        scores = np.mean([self.of(line) for line in lines.values()], 0)
        return percentile_interval(self.drawn @ scores)

    def compare(self, statistic: Statistic, a: Mapping[int, Line], b: Mapping[int, Line]) -> Estimate | None:
        """statistic(score of a, score of b), paired by seed and caption; None without a common seed."""
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        own, other = ([self.of(side[seed]) for seed in seeds] for side in (a, b))
        each = [float(statistic(self.mean @ x, self.mean @ y)) for x, y in zip(own, other, strict=True)]
        x, y = np.mean(own, 0), np.mean(other, 0)
        drawn = statistic(self.drawn @ x, self.drawn @ y)
        return Estimate(float(statistic(self.mean @ x, self.mean @ y)), percentile_interval(drawn), each)


def goals(lines: Sequence[Line], captions: Captions) -> list[Goal]:
    """The goals of one family that can be measured from the finished runs."""
    student, full = _runs(lines, "gdmd", "lora"), _runs(lines, "gdmd", "full")
    steps = {line["pipeline"]["steps"] for line in (*student.values(), *full.values())}
    teachers = [line for line in lines if line["pipeline"]["mode"] == "teacher"]
    guided = [line for line in teachers if line["nfe"] == 2 * line["pipeline"]["steps"]]
    most = max((line["nfe"] for line in guided), default=0)
    teacher = {line["seed"]: line for line in guided if line["nfe"] == most}
    few = {line["seed"]: line for line in guided if line["pipeline"]["steps"] in steps}
    exported = _runs(lines, "gdmd", "exported")
    lab = LAB_STUDENT / LAB_TEACHER
    wanted: list[tuple[str, Statistic, Mapping[int, Line], Mapping[int, Line], float | None]] = [
        (f"GDMD LoRA / teacher with {most} NFE", _share, student, teacher, OF_TEACHER),
        (f"GDMD LoRA - teacher with {_nfe(few)} NFE", np.subtract, student, few, OVER_FEW_STEPS),
        ("GDMD LoRA - DMD LoRA", np.subtract, student, _runs(lines, "dmd", "lora"), OVER_DMD),
        ("GDMD full - DMD full", np.subtract, full, _runs(lines, "dmd", "full"), OVER_DMD),
        (f"GDMD full / teacher with {most} NFE", _share, full, teacher, lab),
        ("exported LoRA in diffusers - the same LoRA in gdmd", np.subtract, exported, student, None),
    ]
    trained_longer = _rows(lines, "gdmd", "lora")[1:]
    for longer in trained_longer:
        updates = _updates(longer)
        name = f"LoRA, {updates} updates"
        first = next(row for row in trained_longer if _updates(row) == updates)
        gdmd = f"GDMD {name}" if longer is first else f"GDMD {name} ({_any(longer)['method']})"
        wanted.append((f"{gdmd} / teacher with {most} NFE", _share, longer, teacher, LONGER_OF_TEACHER))
        for method, title in _BASELINES.items():
            rows = _rows(lines, method, "lora")
            same = [row for row in rows if _updates(row) == updates]
            for row in same:
                which = f" ({_any(row)['method']})" if len(same) > 1 else ""
                wanted.append((f"{gdmd} - {title} {name}{which}", np.subtract, longer, row, OVER_DMD))
            passes = _any(longer)["passes"]
            for row in (row for row in rows if _updates(row) != updates):
                if math.isclose(_any(row)["passes"], passes, rel_tol=SAME_PASSES):
                    other = f"{title} LoRA, as many passes ({_updates(row):,} updates)"
                    wanted.append((f"{gdmd} - {other}", np.subtract, longer, row, OVER_DMD))
    found = [(text, captions.compare(how, a, b), target, how) for text, how, a, b, target in wanted]
    return [Goal(text, one, target, how is _share) for text, one, target, how in found if one]


def _rows(lines: Sequence[Line], method: str, mode: str) -> list[dict[int, Line]]:
    """seed -> line, of each row with this method and mode."""
    rows: dict[str, dict[int, Line]] = {}
    for line in lines:
        if (line["pipeline"]["method"], line["pipeline"]["mode"]) == (method, mode):
            rows.setdefault(line["method"], {})[line["seed"]] = line
    return list(rows.values())


def _runs(lines: Sequence[Line], method: str, mode: str) -> Mapping[int, Line]:
    """The first of ``_rows``; empty if there is none."""
    return next(iter(_rows(lines, method, mode)), {})


def _any(row: Mapping[int, Line]) -> Line:
    return next(iter(row.values()))


def _updates(row: Mapping[int, Line]) -> int:
    return int(_any(row)["student_updates"])


def _share(a: Any, b: Any) -> Any:
    """a / b; NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _nfe(runs: Mapping[int, Line]) -> int:
    return max((line["nfe"] for line in runs.values()), default=0)


def _weights(rows: NDArray[Any], tasks: NDArray[Any], replicates: int | None) -> Floats:
    """[R, C]: weight of each caption in the mean of the means of the tasks; whole captions are drawn, within a task.

    replicates None: nothing is drawn, one row. A task may have the same caption several times.
    """
    rng, kinds = np.random.default_rng(0), np.unique(tasks)
    weights = np.zeros((replicates or 1, len(rows)))
    for kind in kinds:
        own = np.flatnonzero(tasks == kind)
        unique, place = np.unique(rows[own], return_inverse=True)
        count = np.ones((1, len(unique)))
        if replicates is not None:
            count = np.concatenate(list(cluster_counts(len(unique), replicates, rng)))
        drawn = count[:, place]
        weights[:, own] = drawn / drawn.sum(1, keepdims=True) / len(kinds)
    return weights
