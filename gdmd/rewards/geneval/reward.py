"""GenEval's partial credit as a reward: detector and color classifier on each image, requirements from the metadata.

It is not the metric: it is graded where the metric is 0 or 1. Training on the metric's own detector can exploit that
detector's errors, so report GenEval of such a student with care.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdmd.rewards.geneval.colors import ColorClassifier
from gdmd.rewards.geneval.detector import Detector
from gdmd.rewards.geneval.rules import partial_credit, read_task
from gdmd.rewards.preprocessing import check_finite_images, check_images, to_pil

if TYPE_CHECKING:
    from gdmd.types import PromptBatch


class GenEvalCredit:
    """Partial credit in [0, 1], not differentiable. Each prompt's ``meta`` is a line of GenEval's metadata."""

    name = "geneval"
    differentiable = False

    def __init__(self, detector: Detector, colors: ColorClassifier) -> None:
        self.detector, self.colors = detector, colors

    @torch.no_grad()
    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B]. ValueError that names a prompt without GenEval metadata."""
        check_images(self.name, images, len(prompts))
        if len(prompts.meta) != len(prompts):
            raise ValueError(
                f"geneval needs GenEval metadata with every prompt, got {len(prompts.meta)} for {len(prompts)} prompts; "
                "give a jsonl prompt file in the format of evaluation_metadata.jsonl"
            )
        tasks = [read_task(meta, f"prompt {place}") for place, meta in enumerate(prompts.meta)]
        check_finite_images(self.name, images)
        scores = []
        for image, task in zip(to_pil(images), tasks, strict=True):
            found = self.detector(image)
            scores.append(partial_credit(task, found.objects, self.colors.of(image, found.masks)))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
