"""AdamW with moments of 8 bits (arXiv 2110.02861) through torchao: a quarter of the optimizer's memory.

A moment of a parameter with at least SMALLEST numbers in whole blocks is held as one code of 8 bits per number and an
fp32 scale per BLOCK numbers; those of other parameters, all weights and the arithmetic of a step are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.config.extras import install

BLOCK = 256
SMALLEST = 4096
TABLE = 4 * 256
"""Bytes of the table from codes to fp32 values; every moment has its own."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class EightBit:
    """The optimizer's state of a parameter as plain named tensors, codes and scales apart, and back."""

    def shapes(self, parameter: Parameter) -> dict[str, tuple[int, ...]]:
        """Name of each tensor of the state -> its shape."""
        whole = tuple(parameter.shape)
        if not quantized(parameter.numel()):
            return {**dict.fromkeys(SIGNED, whole), "step": ()}
        codes = {f"{moment}.codes": whole for moment in SIGNED}
        return codes | {f"{moment}.scale": (parameter.numel() // BLOCK,) for moment in SIGNED} | {"step": ()}

    def flat(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"step": state["step"]}
        for moment in SIGNED:
            held = state[moment]
            named |= {moment: held} if type(held) is Tensor else _inner(moment, held)
        return named

    def restored(self, named: Mapping[str, Tensor], parameter: Parameter) -> dict[str, Any]:
        """The state that ``flat`` took apart, exactly, as a copy on the parameter's device."""
        from torchao.optim.subclass_8bit import OptimState8bit

        state: dict[str, Any] = {"step": named["step"].to("cpu", copy=True)}
        for moment, signed in SIGNED.items():
            if moment in named:
                state[moment] = named[moment].to(parameter.device, copy=True)
                continue
            held = OptimState8bit.zeros(parameter.shape, signed, BLOCK, parameter.device, parameter.dtype)
            for part, tensor in _inner(moment, held).items():
                tensor.copy_(named[part])
            state[moment] = held
        return state


def adamw_8bit(
    parameters: Sequence[Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """torchao's AdamW8bit. Its step is compiled on first use: Triton on a GPU, a C++ compiler on a CPU."""
    require_torchao()
    from torchao.optim import AdamW8bit

    kind: Any = AdamW8bit
    made: torch.optim.Optimizer = kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay, block_size=BLOCK)
    return made


def require_torchao() -> None:
    """ValueError with the install command when torchao is not there."""
    if find_spec("torchao") is None:
        raise ValueError(
            f"loop.optimizer = adamw8bit needs torchao, which is not installed; do: {install('8bit')}, "
            "or set loop.optimizer = adamw"
        )


def quantized(numbers: int) -> bool:
    """Whether a parameter of that many numbers has moments of 8 bits."""
    return numbers >= SMALLEST and numbers % BLOCK == 0


def moment_bytes(numbers: int) -> int:
    """Bytes of both moments of a parameter."""
    return 2 * (numbers + 4 * numbers // BLOCK + TABLE) if quantized(numbers) else 8 * numbers


def _inner(moment: str, held: Any) -> dict[str, Tensor]:
    return {f"{moment}.codes": held.codes, f"{moment}.scale": held.scale}
