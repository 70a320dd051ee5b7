"""The checker's partial credit as a black-box reward: what a GenEval-style reward is to a real model."""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.shapes.check import partial_credit
from gdmd.shapes.grammar import catalogue
from gdmd.types import PromptBatch


class PartialCredit:
    """Share of the caption's requirements that the picture satisfies, in [0, 1]. Not differentiable."""

    name = "shapes_partial_credit"
    differentiable = False

    @torch.no_grad()
    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> [B]. ValueError for text that is not a caption of the Shapes language."""
        table = catalogue()
        rows = torch.tensor([table.row(text) for text in prompts.text], device=images.device)
        return partial_credit(images, rows).float()
