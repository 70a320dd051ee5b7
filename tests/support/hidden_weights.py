"""Offloaded weights on a machine without a GPU: on the host they are NaN, and only copies have their values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gdmd.diffusion import offload


class Hidden(offload.Offloaded):
    """A computation with weights that are not on the device gives NaN."""

    copied: list[str] = []  # the classes of the modules, one entry per copy

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        super().__init__(module, device)
        self.kind, self.values = type(module).__name__, dict[int, Tensor]()
        for table, name in self._places:
            host = table[name]
            self.values.setdefault(id(host), host.detach().clone())
            if host.is_floating_point():
                host.data = torch.full_like(host.data, torch.nan)

    def __enter__(self) -> None:
        Hidden.copied.append(self.kind)
        super().__enter__()

    def _copy(self, host: Tensor) -> Tensor:
        value = self.values[id(host)].clone()
        return nn.Parameter(value, requires_grad=False) if isinstance(host, nn.Parameter) else value


def hide(patch: pytest.MonkeyPatch) -> list[str]:
    """From now on every ``Offloaded`` is hidden; returns the list of the classes whose weights are copied."""
    hooks = {name: getattr(offload._PerCall, name) for name in ("before", "after")}
    patch.setattr(Hidden, "copied", [])
    patch.setattr(offload, "_PerCall", type("HiddenPerCall", (Hidden,), hooks))
    for module in ("gdmd.models.families.base", "gdmd.rewards.base"):
        patch.setattr(f"{module}.Offloaded", Hidden)
    return Hidden.copied
