"""A role with all its weights: a full copy of the network, in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from gdmd.models.activation_checkpointing import recomputed


class Copy:
    """A trained copy of a network without adapters. Its names are those of the network."""

    def __init__(self, net: Any, *, checkpointing: bool) -> None:
        self.net = _bare_copy(net).float().requires_grad_(True).eval()
        if checkpointing:
            self.recompute(on=True)

    def ready(self) -> Any:
        return self.net

    def recompute(self, *, on: bool) -> None:
        """Switch activation checkpointing."""
        if on:
            self.net.enable_gradient_checkpointing(lambda block, *inputs: recomputed(block, inputs, self._trained))
        else:
            self.net.disable_gradient_checkpointing()

    def _trained(self) -> bool:
        return bool(next(self.net.parameters()).requires_grad)

    def weights(self) -> dict[str, Parameter]:
        """All parameters by name."""
        return dict(self.net.named_parameters())

    @torch.no_grad()
    def blended(self, base: Any, share: float) -> Copy:
        """A third network base + share (this - base), frozen."""
        mixed = Copy(self.net, checkpointing=False)
        mixed.net.requires_grad_(False)
        own = _bare_names(base)
        for name, weights in mixed.net.named_parameters():
            weights.copy_(torch.lerp(own[name].to(weights.dtype), weights, share))
        return mixed


def _bare_copy(net: Any) -> Any:
    """A copy without the adapters, whatever is injected in ``net``: built from its config and its base weights."""
    own = type(net).from_config(net.config).to(next(net.parameters()).device)
    own.load_state_dict({k: v.float() for k, v in _bare_names(net).items()}, strict=True)
    return own


def _bare_names(net: Any) -> dict[str, torch.Tensor]:
    """The state of the network without its adapters, under the names that it had before they were injected."""
    return {name.replace(".base_layer.", "."): v for name, v in net.state_dict().items() if ".lora_" not in name}
