"""AdamW for one role: learning-rate factor, gradient norm, clipping, and a state of plain named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.training.adamw8bit import QuantizedState, adamw_8bit
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext

Kind = Literal["adamw", "adamw8bit"]


class DenseState:
    """The optimizer state of a parameter as plain named tensors: two moments, sharded as it is, and a step."""

    def __init__(self, context: DistributedContext) -> None:
        self._context = context

    def shapes(self, parameter: Parameter) -> Mapping[str, tuple[int, ...]]:
        """Name of each tensor -> its full shape."""
        return {"exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape), "step": ()}

    def to_tensors(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of torch.optim.AdamW as named tensors."""
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")}

    def from_tensors(self, named: Mapping[str, Tensor], parameter: Parameter) -> dict[str, Any]:
        """The inverse of ``to_tensors``, as copies on the parameter's device; the fused kernel wants its step there."""
        moved = {key: named[key].to(parameter.device, copy=True) for key in ("exp_avg", "exp_avg_sq", "step")}
        place = self._context.distribute_like
        return {key: tensor if key == "step" else place(tensor, parameter) for key, tensor in moved.items()}


def lr_factor(
    schedule: Literal["constant", "cosine", "linear"], progress: float, student_updates: int, warmup: int
) -> float:
    """The factor of both learning rates.

    progress: share of the steps that is done, in [0, 1); cosine is (1 + cos(pi progress)) / 2, linear 1 - progress.
    The warm-up factor is (n + 1) / warmup while n = student updates so far is below warmup.
    """
    rise = min(1.0, (student_updates + 1) / warmup) if warmup else 1.0
    decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
    return rise * decay[schedule]


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
        context: DistributedContext = SINGLE_PROCESS,
        kind: Kind = "adamw",
    ) -> None:
        self.parameters, self.lr, self.clip, self._context = dict(parameters), lr, clip, context
        _check_parameters(self.parameters)
        trained = list(self.parameters.values())
        if kind == "adamw8bit":
            self._state: DenseState | QuantizedState = QuantizedState()
            self._adamw = adamw_8bit(trained, lr, betas, weight_decay)
        else:
            self._state = DenseState(context)
            fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
            self._adamw = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)

    def zero_grad(self) -> None:
        """Drop all gradients (also those that another role's loss may have left here)."""
        self._adamw.zero_grad(set_to_none=True)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients before clipping, 0-d, on the parameters' device."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        return self._context.full_tensor(torch.nn.utils.get_total_norm(gradients))

    def average_gradients(self) -> None:
        """Replace the gradients by their mean over ranks. Called once, after the last backward pass."""
        self._context.average_gradients(list(self.parameters.values()))

    def step(self, norm: Tensor, factor: float = 1.0) -> None:
        """Clip by the known ``norm`` and update once with learning rate ``factor`` x lr."""
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):  # an input of the compiled step: keep the tensor
                group["lr"].fill_(factor * self.lr)
            else:
                group["lr"] = factor * self.lr
        self._adamw.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as "exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME"; only parameters that were updated have one.

        An 8-bit moment is two tensors, "exp_avg.codes/NAME" and "exp_avg.scale/NAME".
        """
        state = self._adamw.state
        return {
            f"{key}/{name}": tensor
            for name, parameter in self.parameters.items()
            if parameter in state
            for key, tensor in self._state.to_tensors(state[parameter]).items()
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore ``tensors()`` exactly. ValueError if it belongs to other parameters, or to another optimizer."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for entry, tensor in saved.items():
            key, _, name = entry.partition("/")
            shapes = self._state.shapes(self.parameters[name]) if name in self.parameters else {}
            if key not in shapes or (key != "step" and tuple(tensor.shape) != shapes[key]):
                what = f"shape {tuple(tensor.shape)}" if key in shapes else "an unknown name"
                raise ValueError(
                    f"the saved optimizer state does not fit: {entry} has {what}. Use the checkpoint of this "
                    "configuration (loop.optimizer as it was)."
                )
            by_name.setdefault(name, {})[key] = tensor
        self._adamw.state.clear()
        for name, tensors in by_name.items():
            parameter = self.parameters[name]
            needed = self._state.shapes(parameter)
            if tensors.keys() != needed.keys():
                raise ValueError(f"the saved optimizer state of {name} has {sorted(tensors)}, needs {sorted(needed)}.")
            self._adamw.state[parameter] = self._state.from_tensors(tensors, parameter)


def _check_parameters(parameters: Mapping[str, Parameter]) -> None:
    if not parameters:
        raise ValueError("a trained role has no parameters: nothing can be optimized. Check the roles of the recipe.")
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {parameter.dtype}, but trained weights must be fp32 (small updates are lost in "
                "half precision). Load it in fp32; loop.precision = bf16 makes the networks compute in bf16."
            )
