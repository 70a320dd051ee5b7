"""Exponential moving average of named parameters, in fp32."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext

_BLOCK = re.compile(r"^((\w*(blocks|attentions|resnets|layers|refiner)\.\d+|mid_block)\.)+")
"""The name of a layer's block, which precedes the layer's name inside the block."""


class Ema:
    """shadow <- d shadow + (1 - d) parameter after each update, shadow = the initial parameters before the first.

    d = decay, or min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ... when ``warmup`` is on.
    The shadow is fp32 (float64 for float64 parameters): at decay 0.999 half precision would not move at all.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        decay: float,
        warmup: bool = False,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.decay, self.warmup, self.updates, self._context = decay, warmup, 0, context
        self._parameters = dict(parameters)
        self.shadow = {name: _at_least_fp32(parameter) for name, parameter in parameters.items()}

    def decay_at(self, update: int) -> float:
        """The decay of update n."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow toward the current parameters."""
        shadows = list(self.shadow.values())
        now = [self._parameters[name].to(shadow.dtype) for name, shadow in self.shadow.items()]
        torch._foreach_lerp_(shadows, now, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters hold the averaged values; afterwards, also after an error, their former ones."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(before)

    def load(self, shadow: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved average. ValueError if its names or shapes belong to another network."""
        load_named(self.shadow, shadow, "the EMA", self._context)
        self.updates = updates

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


@torch.no_grad()
def load_named(
    into: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str, context: DistributedContext = SINGLE_PROCESS
) -> None:
    """Copy saved tensors in place by name, sharded as the target is; a ValueError names those that do not fit."""
    missing, unknown = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    if missing or unknown:
        raise ValueError(
            f"the saved tensors do not fit {what}: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}. "
            + (
                _other_adapters(into, saved)
                or "They belong to another network: use the checkpoint of this configuration."
            )
        )
    for name, target in into.items():
        full = saved[name]
        if target.shape != full.shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(target.shape)}, the saved one {tuple(full.shape)}. "
                "It belongs to another network: use the checkpoint of this configuration."
            )
        target.copy_(context.distribute_like(full, target))


def _other_adapters(into: Container[str], saved: Mapping[str, Tensor]) -> str:
    """What to do if the same network had its adapters on other layers; "" for another network."""
    layers = {name.partition(".lora_")[0] for name in saved if ".lora_" in name}
    if not any(name in into for name in saved) or not layers:
        return ""
    ends = sorted({_BLOCK.sub("", layer) for layer in layers})
    return (
        f"The run had adapters on other layers. Continue it with them, which writes them to its config.yaml: gdmd train "
        f"--resume RUN 'model.lora_targets=[{','.join(ends)}]'"
    )


def _at_least_fp32(parameter: Parameter) -> Tensor:
    narrow = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.detach().to(torch.float32 if narrow else parameter.dtype, copy=True)
