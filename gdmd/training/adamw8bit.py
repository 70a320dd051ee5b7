"""AdamW with 8-bit moments (arXiv 2110.02861) through torchao: a quarter of the optimizer's memory.

A moment of a parameter with at least SMALLEST elements in complete blocks is stored as one 8-bit code per element and
an fp32 scale per BLOCK elements; other moments, all weights and the arithmetic of a step are fp32.
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
"""Bytes of the table from codes to fp32 values, one per moment."""
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class QuantizedState:
    """The optimizer state of a parameter as plain named tensors, with codes and scales separate."""

    def shapes(self, parameter: Parameter) -> dict[str, tuple[int, ...]]:
        """Name of each tensor -> its shape."""
        full = tuple(parameter.shape)
        if not quantized(parameter.numel()):
            return {**dict.fromkeys(SIGNED, full), "step": ()}
        codes = {f"{moment}.codes": full for moment in SIGNED}
        return codes | {f"{moment}.scale": (parameter.numel() // BLOCK,) for moment in SIGNED} | {"step": ()}

    def to_tensors(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of torchao's optimizer as named tensors."""
        named: dict[str, Tensor] = {"step": state["step"]}
        for moment in SIGNED:
            value = state[moment]
            named |= {moment: value} if type(value) is Tensor else _codes_and_scale(moment, value)
        return named

    def from_tensors(self, named: Mapping[str, Tensor], parameter: Parameter) -> dict[str, Any]:
        """The inverse of ``to_tensors``, exact, as a copy on the parameter's device."""
        from torchao.optim.subclass_8bit import OptimState8bit

        state: dict[str, Any] = {"step": named["step"].to("cpu", copy=True)}
        for moment, signed in SIGNED.items():
            if moment in named:
                state[moment] = named[moment].to(parameter.device, copy=True)
                continue
            value = OptimState8bit.zeros(parameter.shape, signed, BLOCK, parameter.device, parameter.dtype)
            for key, tensor in _codes_and_scale(moment, value).items():
                tensor.copy_(named[key])
            state[moment] = value
        return state


def adamw_8bit(
    parameters: Sequence[Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """torchao's AdamW8bit. Its step is compiled on first use: Triton on a GPU, a C++ compiler on a CPU."""
    require_torchao()
    from torchao.optim import AdamW8bit

    kind: Any = AdamW8bit
    adamw: torch.optim.Optimizer = kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay, block_size=BLOCK)
    return adamw


def require_torchao() -> None:
    """ValueError with the install command unless torchao is installed."""
    if find_spec("torchao") is None:
        raise ValueError(
            f"loop.optimizer = adamw8bit needs torchao, which is not installed; do: {install('8bit')}, "
            "or set loop.optimizer = adamw"
        )


def quantized(elements: int) -> bool:
    """Whether a parameter of that many elements has 8-bit moments."""
    return elements >= SMALLEST and elements % BLOCK == 0


def moment_bytes(elements: int) -> int:
    """Bytes of both moments of a parameter."""
    return 2 * (elements + 4 * elements // BLOCK + TABLE) if quantized(elements) else 8 * elements


def _codes_and_scale(moment: str, value: Any) -> dict[str, Tensor]:
    return {f"{moment}.codes": value.codes, f"{moment}.scale": value.scale}
