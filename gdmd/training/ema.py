"""Exponential moving average of named parameters, in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.training.distributed import SINGLE, World


class Ema:
    """shadow <- d shadow + (1 - d) parameter after each update, shadow = the initial parameters before the first.

    d = decay, or min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ... when ``warmup`` is on.
    The shadow is fp32 (float64 for float64 parameters): at decay .999 half precision would not move at all.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], decay: float, warmup: bool = False, world: World = SINGLE
    ) -> None:
        self.decay, self.warmup, self.updates, self._world = decay, warmup, 0, world
        self._parameters = dict(parameters)
        self.shadow = {name: _wide(parameter) for name, parameter in parameters.items()}

    def decay_at(self, update: int) -> float:
        """The decay of update n."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the parameters as they are now."""
        shadows = list(self.shadow.values())
        now = [self._parameters[name].to(shadow.dtype) for name, shadow in self.shadow.items()]
        torch._foreach_lerp_(shadows, now, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters hold the averaged values; afterwards, also after an error, exactly the old ones."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(before)

    def load(self, shadow: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved average. ValueError when the names or shapes are of another network."""
        load_named(self.shadow, shadow, "the EMA", self._world)
        self.updates = updates

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


@torch.no_grad()
def load_named(into: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str, world: World = SINGLE) -> None:
    """Copy saved (whole) tensors in place by name; a ValueError names the tensors that do not fit."""
    missing, unknown = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unknown:
        raise ValueError(
            f"the saved tensors do not fit {what}: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}. "
            "They are of another network: use the checkpoint of this configuration."
        )
    for name, target in into.items():
        own = saved[name]
        if target.shape != own.shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(target.shape)}, the saved one {tuple(own.shape)}. "
                "It is of another network: use the checkpoint of this configuration."
            )
        target.copy_(world.placed(own, target))


def _wide(parameter: Parameter) -> Tensor:
    narrow = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().to(torch.float32 if narrow else parameter.dtype, copy=True)
