"""AdamW for one role: learning-rate factor, gradient norm, clipping, and a state that is plain named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.training.adamw8bit import EightBit, adamw_8bit
from gdmd.training.distributed import SINGLE, World

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Kind = Literal["adamw", "adamw8bit"]


class Layout(Protocol):
    """How the optimizer's state of one parameter is written as plain tensors."""

    def shapes(self, parameter: Parameter) -> Mapping[str, tuple[int, ...]]: ...

    def flat(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]: ...

    def restored(self, named: Mapping[str, Tensor], parameter: Parameter) -> dict[str, Any]: ...


class Whole:
    """Two moments like the parameter, sharded as it is, and a step counter."""

    def __init__(self, world: World) -> None:
        self._world = world

    def shapes(self, parameter: Parameter) -> Mapping[str, tuple[int, ...]]:
        return {"exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape), "step": ()}

    def flat(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return {moment: state[moment] for moment in MOMENTS}

    def restored(self, named: Mapping[str, Tensor], parameter: Parameter) -> dict[str, Any]:
        # the fused kernel wants its step counter beside the parameter, as fp32
        moved = {key: named[key].to(parameter.device, copy=True) for key in MOMENTS}
        return {key: moved[key] if key == "step" else self._world.placed(moved[key], parameter) for key in MOMENTS}


def lr_factor(
    schedule: Literal["constant", "cosine", "linear"], progress: float, student_updates: int, warmup: int
) -> float:
    """What both learning rates are multiplied by.

    progress: finished share of the steps, in [0, 1); cosine is (1 + cos(pi progress)) / 2, linear 1 - progress.
    The warm-up factor is (n + 1) / warmup while n = student updates made so far is below warmup.
    """
    rise = min(1.0, (student_updates + 1) / warmup) if warmup else 1.0
    course = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
    return rise * course[schedule]


class RoleOptimizer:
    """AdamW (arXiv 1711.05101) over the named parameters of one role, fused where the device has it, or with 8 bits.

    ``clip`` is the largest global gradient norm, 0 = none. Parameters must be fp32 or wider: an update of relative
    size 1e-5 is lost in half precision.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float = 0.0,
        world: World = SINGLE,
        kind: Kind = "adamw",
    ) -> None:
        self.parameters, self.lr, self.clip, self._world = dict(parameters), lr, clip, world
        _check_parameters(self.parameters)
        self._layout: Layout = EightBit() if kind == "adamw8bit" else Whole(world)
        own = list(self.parameters.values())
        if kind == "adamw8bit":
            self._adamw = adamw_8bit(own, lr, betas, weight_decay)
        else:
            fused = all(parameter.device.type in ("cpu", "cuda") for parameter in own)
            self._adamw = torch.optim.AdamW(own, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)

    def zero_grad(self) -> None:
        """Drop all gradients (also those that another role's loss may have left here)."""
        self._adamw.zero_grad(set_to_none=True)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients before clipping, 0-d, on the parameters' device."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return self._world.whole(torch.nn.utils.get_total_norm(gradients))

    def average(self) -> None:
        """The gradients of the global batch: their mean over ranks. Called once, after the last backward pass."""
        self._world.average(list(self.parameters.values()))

    def step(self, norm: Tensor, factor: float = 1.0) -> None:
        """Clip by the known ``norm`` and make one update with learning rate ``factor`` x lr."""
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):  # an input of a compiled step: the same tensor for ever
                group["lr"].fill_(factor * self.lr)
            else:
                group["lr"] = factor * self.lr
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"; only parameters that were updated have one.

        A moment of 8 bits is two tensors, "exp_avg.codes/NAME" and "exp_avg.scale/NAME".
        """
        state = self._adamw.state
        return {
            f"{part}/{name}": tensor
            for name, parameter in self.parameters.items()
            if parameter in state
            for part, tensor in self._layout.flat(state[parameter]).items()
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore ``tensors()`` exactly. ValueError when it belongs to other parameters, or to another optimizer."""
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in saved.items():
            part, _, name = key.partition("/")
            self._check(key, part, name, tensor)
            state.setdefault(name, {})[part] = tensor
        self._adamw.state.clear()
        for name, parts in state.items():
            parameter = self.parameters[name]
            needed = self._layout.shapes(parameter)
            if parts.keys() != needed.keys():
                raise ValueError(f"the saved optimizer state of {name} has {sorted(parts)}, needs {sorted(needed)}.")
            self._adamw.state[parameter] = self._layout.restored(parts, parameter)

    def _check(self, key: str, part: str, name: str, tensor: Tensor) -> None:
        shapes = self._layout.shapes(self.parameters[name]) if name in self.parameters else {}
        if part in shapes and (part == "step" or tuple(tensor.shape) == shapes[part]):
            return
        what = "an unknown name" if part not in shapes else f"shape {tuple(tensor.shape)}"
        raise ValueError(
            f"the saved optimizer state does not fit: {key} has {what}. Use the checkpoint of this configuration "
            "(loop.optimizer as it was)."
        )


def _check_parameters(parameters: Mapping[str, Parameter]) -> None:
    if not parameters:
        raise ValueError("a trained role has no parameters: nothing can be optimized. Check the roles of the recipe.")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {parameter.dtype}, but trained weights must be fp32 (small updates are lost in "
                "half precision). Load it in fp32; loop.precision = bf16 makes the networks compute in bf16."
            )
