"""Frozen weights that are in host memory, and on the device only while their module computes.

A layer's weights are replaced by copies and put back; no tensor is changed. Autograd saves the copies for the backward
pass, so gradients are right with and without activation checkpointing. With checkpointing the copies of a block live
until its backward pass is done, without it those of all blocks do. diffusers' group offloading moves the data of
the weights instead: a backward pass reads weights that have left, a recomputation that stops early (as torch's does)
leaves its block on the device, and adapters move too, away from their gradients and optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Offloaded:
    """The frozen weights and buffers that a module has now: on the host, and inside ``with`` as copies on ``device``.

    Adapters that are added to it later stay where they are created. For a GPU the host's weights are pinned, so that the
    program does not wait for a copy.
    """

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._places = _places(module.to("cpu").modules())
        self._hosts: list[Tensor] = []
        if self.device.type == "cuda":
            for table, name in self._places:
                _pin(table[name])

    def __enter__(self) -> None:
        self._hosts = [table[name] for table, name in self._places]
        copies: dict[int, Tensor] = {}  # tied weights are copied once
        for (table, name), host in zip(self._places, self._hosts, strict=True):
            if id(host) not in copies:
                copies[id(host)] = self._copy(host)
            table[name] = copies[id(host)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for (table, name), host in zip(self._places, self._hosts, strict=True):
            table[name] = host
        self._hosts = []

    def _copy(self, host: Tensor) -> Tensor:
        return copy_on(host, self.device)


def offload_parts(net: nn.Module, parts: Sequence[nn.Module], device: torch.device | str) -> None:
    """Offload these parts of a frozen network, each on the device for its own calls, and move the rest to the device."""
    inside = {id(layer) for part in parts for layer in part.modules()}
    for table, name in _places(layer for layer in net.modules() if id(layer) not in inside):
        table[name] = copy_on(table[name], torch.device(device))
    for part in parts:
        own = _PerCall(part, device)
        part.register_forward_pre_hook(own.before)
        part.register_forward_hook(own.after, always_call=True)  # a recomputation ends by an exception


def copy_on(weights: Tensor, device: torch.device) -> Tensor:
    """A parameter without gradient, or a buffer, on ``device``."""
    there = weights.to(device, non_blocking=True)
    return nn.Parameter(there, requires_grad=False) if isinstance(weights, nn.Parameter) else there


def _places(layers: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """(dictionary, name) of the parameters and buffers of these layers."""
    tables = [table for layer in layers for table in (layer._parameters, layer._buffers)]
    return [(table, name) for table in tables for name, value in table.items() if value is not None]


def called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module that are called: a ModuleList is not, so its own children take its place."""
    for child in module.children():
        yield from called_children(child) if isinstance(child, nn.ModuleList) else (child,)


class _PerCall(Offloaded):
    """The forward hooks of an offloaded module. They are methods, so that a copied network gets its own."""

    def before(self, module: nn.Module, inputs: Any) -> None:
        self.__enter__()

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.__exit__(None, None, None)


def _pin(host: Tensor) -> None:
    """Pin a plain tensor in place; a quantized weight stays in pageable memory."""
    if type(host) in (Tensor, nn.Parameter):
        host.data = host.data.pin_memory()
