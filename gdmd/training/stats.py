"""Means of statistics between two log lines, kept on their device so that the hot loop never waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Collects tensors by key ("place/name") and gives the mean over all their elements once per log line.

    NaN elements mean "not scored": they are left out of the mean; a key without any scored element reads NaN.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Keep detached references: [B] or 0-d tensors, no copy, no host synchronisation."""
        for key, value in stats.items():
            self._parts.setdefault(key, []).append(value.detach().reshape(-1))

    def read(self) -> dict[str, float]:
        """Mean of each key since the last read, in one transfer per device; then start anew."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for key, parts in self._parts.items():
            mean = torch.cat([part.double() for part in parts]).nanmean()
            by_device.setdefault(mean.device, {})[key] = mean
        self._parts = {}
        read: dict[str, float] = {}
        for means in by_device.values():
            read |= dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        return read
