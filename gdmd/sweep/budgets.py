"""How many outer iterations a budget allows, from a dry run of the method (``recipes.call_counts``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gdmd.config.run import RunConfig
from gdmd.methods.pass_counter import BACKWARD
from gdmd.recipes.call_counts import count_calls

COUNTED = 48
"""Iterations of a dry run, spread over the training: rollout lengths are random, and methods have stages."""


@dataclass(frozen=True)
class Pace:
    """Means per outer iteration: network passes (a backward counts two forwards) and student updates."""

    passes: float
    updates: float

    def steps_for_updates(self, updates: int) -> int:
        """The fewest outer iterations with at least this many student updates."""
        return max(1, -int(-updates // self.updates))

    def steps_for_passes(self, passes: float) -> int:
        """The number of outer iterations that comes closest to this many passes."""
        return max(1, round(passes / self.passes))


def iterations(job: Mapping[str, Any]) -> int:
    """The number of outer iterations of a student's run.

    Budget ``updates``: the fewest with at least the given number of student updates. Budget ``passes``: the number
    whose passes come closest to those of the reference row under the budget ``updates``. The pace of a method with a
    first stage of fixed length depends on the number of iterations, so it is counted again over the number found.
    """
    steps = _steps_for_updates(job["recipe"], job["student_updates"])
    if job["passes_of"] is None:
        return steps
    reference = _steps_for_updates(job["passes_of"], job["student_updates"])
    passes = reference * pace(job["passes_of"], reference).passes
    for _ in range(2):
        steps = pace(job["recipe"], steps).steps_for_passes(passes)
    return steps


def _steps_for_updates(recipe: Mapping[str, Any], updates: int) -> int:
    """Student updates per iteration do not depend on the length of the training."""
    return pace(recipe, updates, 1).steps_for_updates(updates)


def pace(recipe: Mapping[str, Any], steps: int, count: int = COUNTED) -> Pace:
    """The pace of a recipe over a training of ``steps`` iterations, from ``count`` of them."""
    tree = {key: recipe[key] for key in ("model", "method", "rewards", "prompts", "loop")}
    cfg = RunConfig.model_validate(tree | {"name": "pace", "loop": {**tree["loop"], "steps": steps}})
    calls = count_calls(cfg, count)
    passes = sum(calls.passes[role] + (1 + BACKWARD) * calls.with_grad[role] for role in calls.passes)
    return Pace(cfg.loop.batch_size * passes, calls.updates["student"])
