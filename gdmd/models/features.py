"""Calls of a network that answer with hidden features, for a GAN head on them.

The features are what the network's own call answers, so that what watches the call from outside (FSDP2, counts of
passes) sees them, and hooks are there during the call only. Both places lie outside of activation checkpointing: what
is computed again in the backward pass does not come by here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def answering_before(net: nn.Module, layer: nn.Module) -> Iterator[None]:
    """Inside, a call of ``net`` answers (what ``layer`` is given first,); the rest of it is computed and dropped."""
    given: list[Any] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0])

    def answer(net: nn.Module, inputs: Any, own: Any) -> tuple[Any]:
        return (given.pop(),)

    handles = [layer.register_forward_pre_hook(keep), net.register_forward_hook(answer, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ending_in_the_middle(unet: Any) -> Iterator[None]:
    """Inside, a call of a UNet of diffusers ends after its mid block and answers (what that gave, [B, C, h, w],)."""
    names = ("up_blocks", "conv_norm_out", "conv_out")
    own = {name: getattr(unet, name) for name in names}
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, nn.Identity()
    try:
        yield
    finally:
        for name, module in own.items():
            setattr(unet, name, module)
