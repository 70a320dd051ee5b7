"""AdamW for one role: learning-rate factor, gradient norm, clipping, and a state that is plain named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.training.distributed import SINGLE, World

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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
    """AdamW (arXiv 1711.05101) over the named parameters of one role, fused where the device has it.

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
    ) -> None:
        self.parameters, self.lr, self.clip, self._world = dict(parameters), lr, clip, world
        _check_parameters(self.parameters)
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in self.parameters.values())
        self._adamw = torch.optim.AdamW(
            list(self.parameters.values()), lr=lr, betas=betas, weight_decay=weight_decay, fused=fused
        )

    def zero_grad(self) -> None:
        """Drop all gradients (also those that another role's loss may have left here)."""
        self._adamw.zero_grad(set_to_none=True)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients before clipping, 0-d, on the parameters' device."""
        return self._world.whole(torch.nn.utils.get_total_norm(self._gradients()))

    def average(self) -> None:
        """The gradients of the global batch: their mean over ranks. Called once, after the last backward pass."""
        self._world.average(self._gradients())

    def step(self, norm: Tensor, factor: float = 1.0) -> None:
        """Clip by the known ``norm`` and make one update with learning rate ``factor`` x lr."""
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        for group in self._adamw.param_groups:
            group["lr"] = factor * self.lr
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"; only parameters that were updated have one."""
        state = self._adamw.state
        return {
            f"{moment}/{name}": state[parameter][moment]
            for name, parameter in self.parameters.items()
            if parameter in state
            for moment in MOMENTS
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore ``tensors()`` exactly. ValueError when it belongs to other parameters."""
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in saved.items():
            moment, _, name = key.partition("/")
            self._check(key, moment, name, tensor)
            state.setdefault(name, {})[moment] = tensor
        self._adamw.state.clear()
        for name, moments in state.items():
            parameter = self.parameters[name]
            if moments.keys() != set(MOMENTS):
                raise ValueError(f"the saved optimiser state of {name} has {sorted(moments)}, needs {sorted(MOMENTS)}.")
            # the fused kernel wants its step counter beside the parameter, as fp32; the moments are like the parameter
            moved = {key: tensor.to(parameter.device, copy=True) for key, tensor in moments.items()}
            own = {key: moved[key] if key == "step" else self._world.placed(moved[key], parameter) for key in MOMENTS}
            self._adamw.state[parameter] = own

    def _check(self, key: str, moment: str, name: str, tensor: Tensor) -> None:
        known = moment in MOMENTS and name in self.parameters
        if known and (moment == "step" or tensor.shape == self.parameters[name].shape):
            return
        what = "an unknown name" if not known else f"shape {tuple(tensor.shape)}"
        raise ValueError(
            f"the saved optimiser state does not fit: {key} has {what}. Use the checkpoint of this configuration."
        )

    def _gradients(self) -> Sequence[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]


def _check_parameters(parameters: Mapping[str, Parameter]) -> None:
    if not parameters:
        raise ValueError("a trained role has no parameters: nothing can be optimised. Check the roles of the recipe.")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {parameter.dtype}, but trained weights must be fp32 (small updates are lost in "
                "half precision). Load it in fp32; loop.precision = bf16 makes the networks compute in bf16."
            )
