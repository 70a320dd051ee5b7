"""What the families of UNets share: where a GAN head reads them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gdmd.backbones.base import Family
from gdmd.backbones.features import ending_in_the_middle


class UnetFamily(Family):
    """A UNet, read where DMD2 reads it (arXiv 2405.14867, section 4.3): after its mid block. The rest is not computed."""

    def reads(self, net: Any) -> AbstractContextManager[None]:
        return ending_in_the_middle(net)

    def image_tokens(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, h w, C]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Every level of the UNet but the last halves the latent, rounding up."""
        net: Any = self.net
        widths, (_, height, width) = net.config.block_out_channels, self.latent_shape
        unit = 2 ** (len(widths) - 1)
        return widths[-1], -(-height // unit), -(-width // unit)
