"""Detect rewards that score nothing or give no signal, from the logged rows of a run. No torch here.

The rows hold, for each reward and log window,
    scores/NAME/unscored   share of images without a score (NaN)
    scores/NAME/spread     mean |score - a score of the first scored batch|; 0 = all scores are the same
Rules: a reward that scored no image in WINDOW iterations in a row with IMAGES samples, or in a whole finished run,
scores nothing. One whose scores were all equal for as long gives no signal. One that left out more than half of the
images causes a warning. Methods compare the images of one prompt: if no reward told them apart in a whole finished run,
the run was trained by distillation alone. A single batch is never enough: rare NaN and discrete scores are legitimate,
and so is a reward without scores at first, such as OCR of a student that cannot draw text yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gdmd.runs.validation_scores import only_validation

WINDOW = 20
"""Fewest iterations in a row after which a reward is reported."""
IMAGES = 256
"""Fewest samples in these iterations."""
FEW = 32
"""A finished run has failed if no reward told two images apart in this many samples."""
ROUNDING = 1e-6
"""Scores whose relative difference is smaller are equal in fp32."""
UNSCORED, SPREAD = "unscored", "spread"


def key(name: str, what: str) -> str:
    """The key of a reward in metrics.jsonl."""
    return f"scores/{name}/{what}"


@dataclass
class RewardCounts:
    """Iterations of one reward: all, consecutive ones without a score, consecutive ones with equal scores."""

    iterations: int = 0
    unscored: float = 0.0  # share times iterations
    silent: int = 0
    constant: int = 0

    def add(self, iterations: int, unscored: float, spread: float) -> None:
        """Add a log window."""
        self.iterations += iterations
        self.unscored += unscored * iterations
        self.silent = self.silent + iterations if unscored == 1 else 0
        if not math.isnan(spread):  # NaN: nothing was scored, so the spread is unknown
            self.constant = self.constant + iterations if spread == 0 else 0


@dataclass
class RewardSignal:
    """The counts of all rewards. ``finished``: the run is at its last step, and all of it counts as a window.

    scored: iterations with a score; flat: consecutive ones in which no reward told the images of a prompt apart.
    """

    batch_size: int
    counts: dict[str, RewardCounts] = field(default_factory=dict)
    step: int = 0
    scored: int = 0
    flat: int = 0

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> RewardSignal:
        """Restore the counts from ``dataclasses.asdict``."""
        counts = {name: RewardCounts(**own) for name, own in plain["counts"].items()}
        return cls(plain["batch_size"], counts, plain["step"], plain["scored"], plain["flat"])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row of metrics.jsonl."""
        if only_validation(values):
            return
        iterations, self.step = step - self.step, step
        for name in names(values):
            own = self.counts.setdefault(name, RewardCounts())
            own.add(iterations, values[key(name, UNSCORED)], spread(values, name))
        if any(not math.isnan(spread(values, name)) for name in names(values)):
            self.scored += iterations
            self.flat = self.flat + iterations if _flat(values) else 0

    def silent(self, finished: bool) -> list[str]:
        """Rewards that score nothing."""
        return [name for name, own in self.counts.items() if self._enough(own.silent, own, finished)]

    def constant(self, finished: bool) -> list[str]:
        """Rewards whose scores are all equal."""
        return [name for name, own in self.counts.items() if self._enough(own.constant, own, finished)]

    def no_signal(self, finished: bool) -> bool:
        """Whether no reward told the images of a prompt apart for long enough."""
        return self.failed(finished) or (self.flat >= WINDOW and self.flat * self.batch_size >= IMAGES)

    def failed(self, finished: bool) -> bool:
        """Whether no reward told the images of a prompt apart in a whole finished run with enough samples."""
        return finished and 1 < self.scored == self.flat and self.flat * self.batch_size >= FEW

    def sparse(self, finished: bool) -> dict[str, float]:
        """The share of images without a score, for rewards that left out more than half of the images."""
        shares = {name: own.unscored / own.iterations for name, own in self.counts.items() if own.iterations}
        enough = {name for name, own in self.counts.items() if self._enough(own.iterations, own, finished)}
        return {name: share for name, share in shares.items() if name in enough and share > 0.5}

    def _enough(self, iterations: int, own: RewardCounts, finished: bool) -> bool:
        window = iterations >= WINDOW and iterations * self.batch_size >= IMAGES
        return window or (finished and iterations > 1 and iterations == own.iterations)


def spread(values: Mapping[str, float], name: str) -> float:
    """The spread of a reward's scores in a row: 0 if it is only rounding, NaN if nothing was scored."""
    found = values.get(key(name, SPREAD), math.nan)
    mean = values.get(f"reward/{name}/sample", values.get(f"reward/{name}/target", 0.0))
    return 0.0 if found <= ROUNDING * abs(mean) else found


def _flat(values: Mapping[str, float]) -> bool:
    """Whether no reward told the images of a prompt apart: all scores equal, all r = 1/2, all advantages 0, or all
    softmax weights equal (their effective number is an integer)."""
    if all(spread(values, name) == 0 or math.isnan(spread(values, name)) for name in names(values)):
        return True
    if "weight/r_std" in values and values.get("weight/r_mean") == 0.5:
        return values["weight/r_std"] == 0
    effective = values.get("weight/effective", math.nan)
    if effective > 1.5:
        return abs(effective - round(effective)) <= ROUNDING * effective
    return values.get("advantage/share_zero", 0) == 1


def names(values: Mapping[str, float]) -> list[str]:
    """The rewards of a row."""
    head, tail = "scores/", f"/{UNSCORED}"
    return [one[len(head) : -len(tail)] for one in values if one.startswith(head) and one.endswith(tail)]


def findings(rows: list[dict[str, float]], batch_size: int, steps: int) -> list[str]:
    """Sentences for a report about the rewards of a run, from its metrics."""
    signal = RewardSignal(batch_size)
    for row in rows:
        signal.add(int(row["step"]), row)
    finished = signal.step >= steps
    silent = signal.silent(finished)
    found = [f"Reward {name} scored no image: its samples were trained by distillation alone." for name in silent]
    sparse = {name: share for name, share in signal.sparse(finished).items() if name not in silent}
    found += [f"Reward {name} left {share:.0%} of the images without a score." for name, share in sparse.items()]
    found += [f"Reward {name} gave every image the same score: no signal." for name in signal.constant(finished)]
    if signal.no_signal(finished):
        found.append("No reward told the images of a prompt apart: they were trained by distillation alone.")
    return found
