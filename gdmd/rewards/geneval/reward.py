"""GenEval's partial credit as a reward: detector and color classifier on each image, requirements from the metadata.

It is not the metric: it is graded where the metric is 0 or 1. Training on the metric's own detector can exploit that
detector's errors, so report GenEval of such a student with care.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.config.load import validated
from gdmd.config.rewards import GenEvalConfig
from gdmd.rewards.base import Placement, RewardModel
from gdmd.rewards.geneval.colors import ColorClassifier
from gdmd.rewards.geneval.detector import Detector
from gdmd.rewards.geneval.rules import partial_credit, read_task
from gdmd.rewards.preprocessing import check_finite_images, check_images, to_pil

if TYPE_CHECKING:
    from gdmd.types import PromptBatch


class GenEval(RewardModel):
    """Partial credit in [0, 1], not differentiable. Each prompt's ``meta`` is a line of GenEval's metadata.

    options: the fields of ``GenEvalConfig``.
    """

    name = "geneval"
    differentiable = False

    def __init__(self, **options: Any) -> None:
        self.config: GenEvalConfig = validated(GenEvalConfig, options, "GenEval")
        self._place(Placement.of(self.config))

    @classmethod
    def from_modules(cls, detector: Detector, colors: ColorClassifier) -> GenEval:
        """From a detector and a classifier that are already loaded."""
        reward = cls()
        reward.detector, reward.colors, reward.in_memory = detector, colors, True
        return reward

    def to(self, device: str) -> GenEval:
        """Load the networks on another device at their next use; given modules stay where they are."""
        if not self.in_memory:
            self._place(replace(Placement.of(self.config), device=device))
        return self

    def _place(self, placement: Placement) -> None:
        self.detector = Detector.from_pretrained(self.config.detector, placement=placement)
        self.colors = ColorClassifier.from_pretrained(self.config.clip, placement=placement)

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
