"""An old policy that follows the student as its EMA (DiffusionNFT, arXiv 2509.16117)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gdmd.types import Roles


class EmaPolicy:
    """``roles.old`` after n student updates: old <- d old + (1 - d) student with d = min(1e-3 n, limit)."""

    def __init__(self, roles: Roles, limit: float) -> None:
        self.roles, self.limit, self.updates = roles, limit, 0

    def start(self) -> None:
        """Before the first update: make the old policy equal to the student."""
        if self.updates == 0:
            self.roles.follow(0.0)

    def follow(self) -> None:
        """After each student update: move the old policy toward the student."""
        self.updates += 1
        self.roles.follow(min(1e-3 * self.updates, self.limit))

    def state(self) -> dict[str, Tensor]:
        """The number of updates; the weights are saved with the roles."""
        return {"student_updates": torch.tensor([self.updates], dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.updates = int(state["student_updates"])
