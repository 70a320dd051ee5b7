"""LAION aesthetic predictor v2: linear layers on the unit image embedding of CLIP ViT-L/14; the prompt is not used.

    score = W5 (W4 (W3 (W2 (W1 f + b1) + b2) + b3) + b4) + b5,  f = f_image / |f_image|

Widths 768-1024-128-64-16-1, with dropout in training and no activations, so the head is one affine map. Scores are on
the raters' scale of 1 to 10 (mostly 4 to 7) but unbounded. The authors publish a .pth file: ``gdmd rewards fetch
aesthetic``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gdmd.rewards.base import DEFAULT_PLACEMENT, Loaded, Placement, PretrainedReward, from_loaded
from gdmd.rewards.clip import image_embedding
from gdmd.rewards.weights import CLIP_L, converted_folder, load_clip, locate_weights

HEAD_WIDTHS = (1024, 128, 64, 16, 1)


def linear_head(width: int) -> nn.Sequential:
    """width-1024-128-64-16-1 without activations; layers are named as in the released files: 0 2 4 6 7."""
    sizes = (width, *HEAD_WIDTHS)
    names = ("0", "2", "4", "6", "7")
    return nn.Sequential(OrderedDict((n, nn.Linear(a, b)) for n, a, b in zip(names, sizes, sizes[1:], strict=False)))


class Aesthetic(PretrainedReward):
    """Output of the head; prompts are ignored."""

    @classmethod
    def from_modules(cls, clip: Any, head: nn.Module, placement: Placement = DEFAULT_PLACEMENT) -> Aesthetic:
        """From a ``CLIPModel`` and a head such as ``linear_head`` that are already loaded."""
        return cls("aesthetic", from_loaded(clip, None, head), placement)

    @classmethod
    def from_pretrained(
        cls,
        path: str | None = None,
        clip: str | None = None,
        revision: str | None = None,
        placement: Placement = DEFAULT_PLACEMENT,
    ) -> Aesthetic:
        """path: converted folder of the head; clip, revision: as in ``ClipScore``, whose network it shares."""
        folder = converted_folder("aesthetic", path)
        location = locate_weights(clip, revision, CLIP_L)

        def load() -> Loaded:
            from safetensors.torch import load_file

            tower = load_clip(location, placement)
            head = linear_head(int(tower.config.projection_dim))
            head.load_state_dict(load_file(folder / "model.safetensors"))
            return Loaded(tower, None, head)

        return cls("aesthetic", load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        embedding = image_embedding(self.loaded.net, pixels.to(self.placement.dtype))
        scores: Tensor = self._head(embedding)  # fp32
        return scores[:, 0]
