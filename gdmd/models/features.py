"""Network calls that return hidden features, for a GAN head on them.

The features are the return value of the network's own call, so that everything that hooks into the call (FSDP2, pass
counters) sees them; our hooks exist during the call only. Both capture points lie outside of activation checkpointing:
the recomputation in the backward pass does not reach them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def capture_features(net: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Inside, a call of ``net`` returns (the input of ``layer``,); the rest of the call is computed and dropped."""
    captured: list[Any] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured.append(inputs[0])

    def replace(net: nn.Module, inputs: Any, output: Any) -> tuple[Any]:
        return (captured.pop(),)

    handles = [layer.register_forward_pre_hook(keep), net.register_forward_hook(replace, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_after_mid_block(unet: Any) -> Iterator[None]:
    """Inside, a call of a diffusers UNet stops after its mid block and returns (its output [B, C, h, w],)."""
    names = ("up_blocks", "conv_norm_out", "conv_out")
    removed = {name: getattr(unet, name) for name in names}
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, nn.Identity()
    try:
        yield
    finally:
        for name, module in removed.items():
            setattr(unet, name, module)
