"""A role that trains all weights: a full copy of the network, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from gdmd.models.activation_checkpointing import checkpointed


class FullCopy:
    """A trained fp32 copy of a network, without adapters. Its parameter names are those of the network."""

    def __init__(self, net: Any, *, checkpointing: bool) -> None:
        self.net = _copy_without_adapters(net).float().requires_grad_(True).eval()
        if checkpointing:
            self.set_checkpointing(on=True)

    def ready(self) -> Any:
        return self.net

    def set_checkpointing(self, *, on: bool) -> None:
        """Switch activation checkpointing."""
        if on:
            self.net.enable_gradient_checkpointing(lambda block, *inputs: checkpointed(block, inputs, self._trained))
        else:
            self.net.disable_gradient_checkpointing()

    def _trained(self) -> bool:
        return bool(next(self.net.parameters()).requires_grad)

    def weights(self) -> dict[str, Parameter]:
        """All parameters by name."""
        return dict(self.net.named_parameters())

    @torch.no_grad()
    def blended(self, base: Any, share: float) -> FullCopy:
        """A frozen third network: base + share (this - base)."""
        mixed = FullCopy(self.net, checkpointing=False)
        mixed.net.requires_grad_(False)
        base_weights = _base_state(base)
        for name, weights in mixed.net.named_parameters():
            weights.copy_(torch.lerp(base_weights[name].to(weights.dtype), weights, share))
        return mixed


def _copy_without_adapters(net: Any) -> Any:
    """A copy built from the network's config and base weights, whatever adapters are injected in ``net``."""
    copy = type(net).from_config(net.config).to(next(net.parameters()).device)
    copy.load_state_dict({k: v.float() for k, v in _base_state(net).items()}, strict=True)
    return copy


def _base_state(net: Any) -> dict[str, torch.Tensor]:
    """The state of the network without adapters, under the names from before their injection."""
    return {name.replace(".base_layer.", "."): v for name, v in net.state_dict().items() if ".lora_" not in name}
