"""Linear layers that hold and allocate what quantized ones do, for ``gdmd plan``; their values mean nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import Quantization

NF4_BLOCK = 64
"""Weights that share one fp32 scale in bitsandbytes' nf4."""


def quantize_layers(net: nn.Module, how: Quantization) -> None:
    """Replace every linear layer of ``net``, as ``models.quantization`` does when it loads weights."""
    kind = PackedLinear if how == "nf4" else ByteLinear
    for parent in list(net.modules()) if how != "none" else []:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, kind(layer))


def numbers(weights: Tensor) -> int:
    """Number of weights that a parameter stands for: two in a byte of nf4."""
    return weights.numel() * (2 if weights.dtype == torch.uint8 else 1)


class ByteLinear(nn.Linear):
    """int8 and fp8 of torchao: a byte per weight, an fp32 scale per row.

    A call casts all weights to the dtype of its input, and autograd keeps the cast ones for the backward pass.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias = layer.bias
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", layer.weight.new_empty(layer.out_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.mm(x.reshape(-1, self.in_features), self.weight.t().to(x.dtype)) * self.scale.to(x.dtype)
        return _biased(y.reshape(*x.shape[:-1], self.out_features), self.bias)


class PackedLinear(nn.Linear):
    """nf4 of bitsandbytes: half a byte per weight, an fp32 scale per block. Both passes unpack the weights of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias, count = layer.bias, layer.weight.numel()
        packed = layer.weight.new_empty((count + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", layer.weight.new_empty(-(-count // NF4_BLOCK), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Unpacked.apply(x, self.weight, (self.out_features, self.in_features))
        return _biased(y, self.bias)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)


class _Unpacked(torch.autograd.Function):
    """A product with weights that exist only during the pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ packed.new_empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.shape, dtype=gradient.dtype), None, None
