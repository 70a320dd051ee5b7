"""Stop a training whose reward scores nothing, and warn about rewards that score little or give no signal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from gdmd.runs.reward_signal import RewardSignal

Reason = Callable[[str], str]
"""Why the reward of this name left images without a score; "" if unknown."""


class RewardMonitor:
    """Follows the logged rows of a run; the same on all ranks. ``steps``: of the whole run."""

    def __init__(self, batch_size: int, steps: int, reason: Reason) -> None:
        self._signal, self._steps, self._reason = RewardSignal(batch_size), steps, reason
        self._warned: set[str] = set()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A row was logged."""
        self._signal.add(step, values)

    def state_of(self, rows: Iterable[Mapping[str, float]]) -> dict[str, Any]:
        """The plain state after the rows of a resumed run, for ``load`` on every rank."""
        signal = RewardSignal(self._signal.batch_size)
        for row in rows:
            signal.add(int(row["step"]), row)
        return asdict(signal)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_of``."""
        self._signal = RewardSignal.load(state)

    def failure(self, step: int, *, ended: bool = False) -> str:
        """Why the run must stop: a reward scored nothing, or (once ``ended``) none gave a signal. "" if all is well."""
        finished = step == self._steps
        if silent := self._signal.silent(finished):
            return " ".join(self._scores_nothing(name) for name in silent)
        if ended and self._signal.failed(finished):
            return (
                f"no reward told two images of a prompt apart in {self._signal.flat} iterations: distillation alone "
                "has trained this run."
            )
        return ""

    def cure(self, step: int) -> str:
        """What to do about a ``failure``."""
        if step == self._steps:
            return "Fix the reward and train again, or train without rewards (a dmd recipe)."
        return (
            "Fix the reward and resume (a changed one needs --accept-changes, in Python accept_changes=True), or train "
            "without it."
        )

    def warnings(self, step: int) -> list[str]:
        """New warnings; each is given once."""
        finished, found = step == self._steps, {}
        for name, share in self._signal.sparse(finished).items():
            found[f"sparse {name}"] = (
                f"reward {name} left {share:.0%} of the images without a score{self._because(name)}"
            )
        constant = self._signal.constant(finished)
        for name in constant:
            iterations = self._signal.counts[name].constant
            found[f"constant {name}"] = (
                f"reward {name} gave every image of {iterations} iterations the same score: it gives no signal"
            )
        if self._signal.no_signal(finished) and len(constant) < len(self._signal.counts):
            found["flat"] = (
                f"no reward told the images of a prompt apart in {self._signal.flat} iterations: they give no signal"
            )
        new = [f"warning: {text}" for kind, text in found.items() if kind not in self._warned]
        self._warned |= found.keys()
        return new

    def _scores_nothing(self, name: str) -> str:
        iterations = self._signal.counts[name].silent
        return f"reward {name} scored no image in {iterations} iterations (all NaN){self._because(name)}."

    def _because(self, name: str) -> str:
        reason = self._reason(name)
        return f": {reason}" if reason else ""
