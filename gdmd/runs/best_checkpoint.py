"""The best checkpoint of a run, by the highest (or lowest) mean of a logged metric; named in checkpoints/best.json."""

from __future__ import annotations

import difflib
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gdmd.config.validation import PREFIX, TEACHER
from gdmd.io import RunError, write_atomic

Direction = Literal["max", "min"]
FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """Checkpoint ``step`` and the mean of the metric that it was chosen by; ``since``: the first step to compare it with."""

    step: int
    metric: str
    direction: Direction
    value: float
    since: int = 0

    def improves_on(self, other: Best | None) -> bool:
        """Whether it replaces the other: a strictly better value, or one of another metric, direction or validation."""
        if other is None or (other.metric, other.direction) != (self.metric, self.direction) or other.step < self.since:
            return True
        return self.value > other.value if self.direction == "max" else self.value < other.value


class BestCheckpointTracker:
    """Scores checkpoints by the mean of one metric over the last ``window`` steps, so one lucky batch does not decide.

    Validation scores have fixed prompts and noise, so only that of the checkpoint's own step counts; checkpoints that
    are not validated have none. A resumed run may have other validation prompts: the row of their first step has scores of
    the teacher, and earlier scores are not comparable; nor is any metric from before an input changed, such as a reward.
    """

    def __init__(self, metric: str, direction: Direction, window: int) -> None:
        self.metric, self.direction = metric, direction
        self.window = 1 if metric.startswith(PREFIX) else window
        self._rows: deque[tuple[int, float]] = deque()
        self._keys: tuple[str, ...] = ()
        self._since = 0  # the first step with the inputs and validation prompts of now

    def resume(self, rows: Iterable[Mapping[str, float]], changed: int = -1) -> None:
        """Start from the rows that a resumed run has logged; those up to step ``changed`` had other inputs."""
        self._rows.clear()
        self._since = changed + 1
        for row in rows:
            if row["step"] > changed:
                self.add(int(row["step"]), row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a logged row."""
        self._keys = tuple(values)
        if self.metric.startswith(PREFIX) and any(key.startswith(TEACHER) for key in values):
            self._since = step
        self._rows.append((step, values.get(self.metric, math.nan)))
        while self._rows[0][0] <= step - self.window:
            self._rows.popleft()

    def score(self, step: int) -> Best | None:
        """The score of checkpoint ``step``: the mean over the scored rows of its window; None without one."""
        values = [value for row, value in self._rows if step - self.window < row <= step and math.isfinite(value)]
        return Best(step, self.metric, self.direction, sum(values) / len(values), self._since) if values else None

    def why_unscored(self, step: int) -> str:
        """The message for the user if ``score`` is None; "" for a checkpoint that is not validated."""
        if self.metric.startswith(PREFIX) and not any(key.startswith(PREFIX) for key in self._keys):
            return ""
        near = difflib.get_close_matches(self.metric, self._keys, 1)
        advice = f"did you mean {near[0]}?" if near else f"the last row has {', '.join(self._keys) or 'nothing'}"
        last = f"steps {max(step - self.window, 0) + 1} ... {step}"
        return f"loop.best_metric = {self.metric} has no value in {last}: no best checkpoint is chosen; {advice}"


def named_best(folder: Path) -> Best | None:
    """The checkpoint that best.json in ``folder`` (checkpoints/) names, even if it is gone; None without the file."""
    file = Path(folder) / FILE
    if not file.exists():
        return None
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        return Best(int(body["step"]), str(body["metric"]), body["direction"], float(body["value"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise RunError(
            f"cannot read {file}: {error}. Delete it; the next checkpoints are scored from scratch."
        ) from error


def write_best(folder: Path, best: Best) -> None:
    """Name ``best`` in best.json, atomically."""
    write_atomic(Path(folder) / FILE, json.dumps(asdict(best), indent=2) + "\n", "the name of the best checkpoint")
