"""Detect a student that stays the teacher, from the logged rows of a run. No torch here.

student/moved    distance of the student's samples from the teacher's, from the same prompts and noise, relative to the
                 spread of the teacher's (training.displacement): 0 = the teacher, sqrt(2) = unrelated samples
"""

from __future__ import annotations

from collections.abc import Mapping

from gdmd.config.training import LoopConfig
from gdmd.runs import reward_signal

MOVED = "student/moved"
STUCK = 0.25
SHARE = 0.1
"""Of the steps of a run, after which it is judged."""
UPDATES = 20
"""Of the student, before which nothing is judged; and at least twice the warm-up, whose small steps say little."""


def hardly_moves(step: int, values: Mapping[str, float], loop: LoopConfig) -> str:
    """A warning if the student, moving on at its mean pace so far, ends its run closer to the teacher than STUCK; else ""."""
    updates, moved = values["updates/student"], values.get(MOVED)
    if moved is None or updates < max(UPDATES, 2 * loop.warmup) or step < SHARE * loop.steps:
        return ""
    end = moved * loop.steps / step
    if not end < STUCK:
        return ""
    rewards = " Check the rewards, too." if reward_signal.names(values) else ""
    return (
        f"warning: the student hardly moves: after {updates:.0f} updates its samples differ from the teacher's by "
        f"{moved:.2g} of their spread, at this pace by {end:.2g} at the end; healthy runs end at 1 or more. Raise "
        f"loop.lr_student = {loop.lr_student:g}: LoRA needs about 10 times the rate of full weights.{rewards}"
    )
