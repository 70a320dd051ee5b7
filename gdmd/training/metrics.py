"""Means of statistics between two log lines, kept on their device so that the loop never waits for it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext


class Means:
    """Collects tensors by key ("group/name") and gives the mean over all their elements once per log line.

    NaN elements mean "not scored": they are left out of the mean; a key without any scored element reads NaN.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Keep detached references: [B] or 0-d tensors, no copy, no host synchronization."""
        for key, value in stats.items():
            self._parts.setdefault(key, []).append(value.detach().reshape(-1))

    def read(self, context: DistributedContext = SINGLE_PROCESS) -> dict[str, float]:
        """Mean of each key over all ranks since the last read, in one transfer per device; then start over."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for key, parts in self._parts.items():
            values = torch.cat([part.double() for part in parts])
            total = torch.stack([values.nansum(), (~values.isnan()).sum().double()])
            by_device.setdefault(total.device, {})[key] = total
        self._parts = {}
        own: dict[str, list[float]] = {}
        for totals in by_device.values():
            own |= dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        every = context.all_gather_object(own)
        keys = dict.fromkeys(key for totals in every for key in totals)
        return {key: _mean([totals[key] for totals in every if key in totals]) for key in keys}


def _mean(parts: list[list[float]]) -> float:
    """Sums and counts -> the mean; NaN of nothing."""
    count = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / count if count else math.nan
