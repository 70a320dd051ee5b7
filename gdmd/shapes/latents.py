"""Latents of rendered scenes, the real data of the Shapes world."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.shapes.grammar import catalog
from gdmd.shapes.render import draw_scenes, render
from gdmd.types import Codec, PromptBatch


@dataclass(frozen=True)
class RenderedLatents:
    """Encoded renders of the prompts' captions, one scene per sample and step."""

    codec: Codec

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """[B, C, H, W]; the scene of a sample depends on (seed, step, sample) only."""
        table = catalog()
        images = []
        words = rng.on_host().integer("scene", 2**31)
        for text, word in zip(prompts.text, words.tolist(), strict=True):
            generator = torch.Generator().manual_seed(word)
            images.append(render(draw_scenes(torch.tensor([table.row(text)]), generator)))
        return self.codec.encode(to_device_async(torch.cat(images), prompts.index.device))
