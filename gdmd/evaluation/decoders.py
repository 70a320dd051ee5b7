"""How far the scores of a rough decoder are from those of the model's own, on the same latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.methods.scoring import Scorer
from gdmd.types import Codec, PromptBatch, Reward


@dataclass(frozen=True)
class DecoderGap:
    """One reward, in its own units, over the images that both decoders' pictures got a score for.

    difference: mean of rough - full; error: standard deviation of rough - full; spread: that of the full scores;
    agreement: share of the pairs of images, unequal by the full decoder, that the rough one puts in the same order.
    None where there are too few images to say.
    """

    reward: str
    images: int
    full: float | None
    rough: float | None
    difference: float | None
    error: float | None
    spread: float | None
    agreement: float | None

    def line(self) -> str:
        """For people."""
        if self.difference is None:
            return f"{self.reward}: no image was scored through both decoders"
        said = f"{self.reward}: {self.difference:+.4g} on {self.images} images (full decoder {self.full:.4g}"
        if self.error is None or self.agreement is None:
            return f"{said})"
        return f"{said}, spread {self.spread:.3g}; error {self.error:.3g}; {self.agreement:.0%} of pairs in the same order)"


def decoder_gaps(
    full: Codec, rough: Codec, rewards: Sequence[Reward], latents: Tensor, prompts: PromptBatch
) -> tuple[DecoderGap, ...]:
    """Every reward on ``latents`` [B, C, H, W] through both decoders."""
    through = [Scorer(codec, rewards)(latents, prompts).double().cpu() for codec in (full, rough)]
    return tuple(_gap(reward.name, *pair) for reward, *pair in zip(rewards, *through, strict=True))


def _gap(name: str, full: Tensor, rough: Tensor) -> DecoderGap:
    """full, rough: [B]"""
    scored = ~(full.isnan() | rough.isnan())
    full, rough = full[scored], rough[scored]
    count, difference = len(full), rough - full
    if count == 0:
        return DecoderGap(name, 0, None, None, None, None, None, None)
    means = [float(values.mean()) for values in (full, rough, difference)]
    if count == 1:
        return DecoderGap(name, 1, *means, None, None, None)
    first, second = torch.triu_indices(count, count, 1)
    order, found = (full[first] - full[second]).sign(), (rough[first] - rough[second]).sign()
    unequal = order != 0
    agreement = float((order == found)[unequal].double().mean()) if unequal.any() else None
    return DecoderGap(name, count, *means, float(difference.std()), float(full.std()), agreement)
