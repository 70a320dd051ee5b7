"""Mask2Former for inference: transformers' model and class layer without its training loss, which would need scipy.

The tensors have the names of ``Mask2FormerForUniversalSegmentation``, so its published weights load as they are. This
module imports transformers: import it inside the function that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
)


@dataclass(frozen=True)
class Queries:
    """What the last decoder layer says about each of the Q queries."""

    class_queries_logits: Tensor  # [B, Q, C + 1], the last class is "no object"
    masks_queries_logits: Tensor  # [B, Q, h / 4, w / 4]


class Mask2Former(Mask2FormerPreTrainedModel):
    """Pixels [B, 3, h, w] -> ``Queries``."""

    _keys_to_ignore_on_load_unexpected = [r"criterion\."]  # noqa: RUF012 (transformers' own declaration)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor) -> Queries:
        found = self.model(pixel_values=pixel_values, output_hidden_states=True)
        normalized = found.transformer_decoder_intermediate_states[-1].transpose(0, 1)  # [B, Q, D], after the last norm
        return Queries(self.class_predictor(normalized), found.masks_queries_logits[-1])
