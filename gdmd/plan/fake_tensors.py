"""FLOP and peak memory of a computation without running it: fake tensors have shapes but no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper


@dataclass(frozen=True)
class Measured:
    """The cost of a computation."""

    flop: int  # of matrix products, convolutions and attention; a multiply-add counts 2
    bytes: int  # largest sum of storages alive at once, without those from before
    kept: int = 0  # the same at its end, while its result is held


def fake_mode() -> AbstractContextManager[Any]:
    """Inside, tensors have a shape but no memory and no values."""
    return _FakeMode(allow_non_fake_inputs=True)


class _FakeMode(FakeTensorMode):
    """Keeps the values of integers and masks made from lists: Qwen-Image-2.1's network computes shapes from them."""

    def may_turn_const(self, t: Tensor) -> bool:
        whole = t.dtype in (torch.int64, torch.bool) and not self.is_our_fake(t) and t.device.type != "meta"
        return whole or super().may_turn_const(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scalar_tensor.default and type(args[0]) is int:  # of where(mask, 4, 1)
            with self:
                return torch.tensor(args[0], dtype=(kwargs or {}).get("dtype"))
        return super().__torch_dispatch__(func, types, args, kwargs)


def fake_weights(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake tensors that report device 'cpu'."""
    for part in module.modules():
        for name, weights in part._parameters.items():
            if weights is not None:
                part._parameters[name] = nn.Parameter(_like(weights), requires_grad=weights.requires_grad)
        for name, values in part._buffers.items():
            if values is not None:
                part._buffers[name] = _like(values)


def _like(given: Tensor) -> Tensor:
    return torch.empty(given.shape, dtype=given.dtype, device="cpu")


def attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    """Two products per head: 2 N M (D + D_v). q [B, H, N, D], k [B, H, M, D], v [B, H, M, D_v]."""
    batch, heads, rows, width = q
    return int(2 * batch * heads * rows * k[2] * (width + v[3]))


def attention_backward(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    """Five products where the forward has two: the scores are recomputed."""
    return 5 * attention(q, k, v) // 2


_aten: Any = torch.ops.aten
CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""CPU attention, which torch's counter does not know (2.13)."""
_FLOP = {**flop_registry, **{packet: shape_wrapper(formula) for packet, formula in CPU_ATTENTION.items()}}


def measure(work: Callable[[], object], held: Iterable[Tensor] = ()) -> Measured:
    """Run ``work`` and measure it. ``held``: weights and inputs, allocated before."""
    live = _Live(held)
    with live:
        result = work()
    kept = live.now
    del result
    return Measured(live.flop, live.peak, kept)


class _Live(TorchDispatchMode):
    """Follows every storage from its allocation to its release, and counts FLOP by torch's formulas.

    Not torch's FlopCounterMode: its module hooks would keep alive what activation checkpointing recomputes.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self._held = [tensor.untyped_storage() for tensor in held]
        self._known: Any = weakref.WeakSet(self._held)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        formula = _FLOP.get(operation._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size
