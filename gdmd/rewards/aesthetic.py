"""LAION aesthetic predictor v2: linear layers on the unit image embedding of CLIP ViT-L/14; the prompt is not read.

    score = W5 (W4 (W3 (W2 (W1 f + b1) + b2) + b3) + b4) + b5,  f = f_image / |f_image|

Widths 768-1024-128-64-16-1 with dropout in training and no activation anywhere, so the whole head is one affine map;
scores are on the 1 to 10 scale of the raters, mostly 4 to 7, unbounded. The authors publish a .pth file: see
``gdmd rewards convert aesthetic``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gdmd.rewards.base import HERE, Loaded, Placement, PretrainedReward, already
from gdmd.rewards.clip import image_embedding
from gdmd.rewards.weights import CLIP_L, converted_folder, load_clip, place_of

HEAD_WIDTHS = (1024, 128, 64, 16, 1)


def linear_head(width: int) -> nn.Sequential:
    """width-1024-128-64-16-1 without activations. Named as in the released files (dropouts left out): 0 2 4 6 7."""
    sizes = (width, *HEAD_WIDTHS)
    names = ("0", "2", "4", "6", "7")
    return nn.Sequential(OrderedDict((n, nn.Linear(a, b)) for n, a, b in zip(names, sizes, sizes[1:], strict=False)))


class Aesthetic(PretrainedReward):
    """The head's answer; prompts are ignored."""

    @classmethod
    def from_modules(cls, clip: Any, head: nn.Module, placement: Placement = HERE) -> Aesthetic:
        """From a ``CLIPModel`` and a head such as ``linear_head``; nothing is loaded."""
        return cls("aesthetic", already(clip, None, head), placement)

    @classmethod
    def from_pretrained(
        cls,
        path: str | None = None,
        clip: str | None = None,
        revision: str | None = None,
        placement: Placement = HERE,
    ) -> Aesthetic:
        """path: converted folder of the head; clip, revision: as in ``ClipScore.from_pretrained``, whose net it shares."""
        folder = converted_folder("aesthetic", path)
        place = place_of(clip, revision, CLIP_L)

        def load() -> Loaded:
            from safetensors.torch import load_file

            tower = load_clip(place, placement)
            head = linear_head(int(tower.config.projection_dim))
            head.load_state_dict(load_file(folder / "model.safetensors"))
            return Loaded(tower, None, head)

        return cls("aesthetic", load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        embedding = image_embedding(self.loaded.net, pixels.to(self.placement.dtype))
        scores: Tensor = self._head(embedding)  # fp32
        return scores[:, 0]
