"""What the validation scores of a run say, from its logged rows. No torch here.

A score rises or falls if a t-test finds the means of the first and the last third of the validations different (two-sided
p below LEVEL). Consecutive validations are not independent, so this is a rule of thumb. Step 0 does not count, because
every score rises from the untrained student. Trained scores that rise while a held-out one or the diversity of a prompt's
images falls are a sign of reward hacking: the student exploits a weakness of its rewards instead of making better images.
Every distilled student loses some diversity, so only a fall by more than a quarter counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from gdmd.config.validation import DIVERSITY, PREFIX, TEACHER, split_size

FEW = 9
"""Fewest validations after step 0 that show a trend: three per third."""
LEVEL = 0.01
KEPT = 0.75
"""Share of the diversity of the first third below which that of the last third counts as lost."""
LITTLE = 0.5
"""Share of the teacher's diversity below which a student has little. The shipped DMD student has 0.66 of it."""


class Trend(NamedTuple):
    """Means of the first and the last third, and whether the score rises (1), falls (-1) or does neither (0)."""

    first: float
    last: float
    sign: int


def only_validation(row: Mapping[str, float]) -> bool:
    """Whether a row holds no training statistics."""
    return all(key == "step" or key.startswith(PREFIX) for key in row)


def labels(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The rewards and scorers that scored validation images of the student."""
    return [label for label in _all_labels(rows) if label != DIVERSITY and not split_size(label)[1]]


def sizes_of(rows: Sequence[Mapping[str, float]], label: str) -> list[str]:
    """The image sizes, HEIGHTxWIDTH, for which this score was logged separately."""
    return [size for name, size in map(split_size, _all_labels(rows)) if size and name == label]


def _all_labels(rows: Sequence[Mapping[str, float]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX) and not key.startswith(TEACHER)]


def teacher_score(rows: Sequence[Mapping[str, float]], label: str) -> float | None:
    """The newest score of the teacher; None without one."""
    found = [row[TEACHER + label] for row in rows if math.isfinite(row.get(TEACHER + label, math.nan))]
    return found[-1] if found else None


def trend(rows: Sequence[Mapping[str, float]], label: str) -> Trend | None:
    """The trend of the student's score; None with fewer than FEW values."""
    from scipy.stats import ttest_ind  # on first use, because it takes a second

    key = PREFIX + label
    values = [row[key] for row in rows if row["step"] > 0 and math.isfinite(row.get(key, math.nan))]
    if len(values) < FEW:
        return None
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    change = fmean(last) - fmean(first)
    constant = len(set(first)) == len(set(last)) == 1  # then the test has no variance to compare with
    differ = change != 0 if constant else bool(ttest_ind(first, last).pvalue < LEVEL)
    return Trend(fmean(first), fmean(last), int(math.copysign(1, change)) if differ else 0)


def diversity_share(rows: Sequence[Mapping[str, float]]) -> float | None:
    """The student's last diversity relative to the teacher's; None if either was not measured."""
    values = [row[PREFIX + DIVERSITY] for row in rows if math.isfinite(row.get(PREFIX + DIVERSITY, math.nan))]
    teacher = teacher_score(rows, DIVERSITY)
    return values[-1] / teacher if values and teacher else None


def reward_hacking(rows: Sequence[Mapping[str, float]], trained: Collection[str]) -> str:
    """A sentence that names trained scores that rise, and held-out scores or a diversity that fall; "" unless both."""
    trends = {label: found for label in (*labels(rows), DIVERSITY) if (found := trend(rows, label))}
    if DIVERSITY in trends and trends[DIVERSITY].last >= KEPT * trends[DIVERSITY].first:
        del trends[DIVERSITY]
    risen = [_shown(label, one) for label, one in trends.items() if label in trained and one.sign > 0]
    fallen = [_shown(label, one) for label, one in trends.items() if label not in trained and one.sign < 0]
    if not (risen and fallen):
        return ""
    return (
        f"Possible reward hacking: trained scores rise ({', '.join(risen)}) while {', '.join(fallen)} fall"
        f"{'s' * (len(fallen) == 1)}, from the first to the last third of the run."
    )


def _shown(label: str, found: Trend) -> str:
    return f"{label.removeprefix('images/')} {found.first:.3g} to {found.last:.3g}"
