"""LAION aesthetic predictor v2: linear layers on the unit image embedding of CLIP ViT-L/14; the prompt is not used.

    score = W5 (W4 (W3 (W2 (W1 f + b1) + b2) + b3) + b4) + b5,  f = f_image / |f_image|

Widths 768-1024-128-64-16-1, with dropout in training and no activations, so the head is one affine map. Scores are on
the raters' scale of 1 to 10 (mostly 4 to 7) but unbounded. The authors publish a .pth file: ``gdmd rewards fetch
aesthetic``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gdmd.config.rewards import AestheticConfig
from gdmd.rewards.base import Loaded, PretrainedReward
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

    config_class = AestheticConfig

    def _loader(self) -> Callable[[], Loaded]:
        folder = converted_folder(self.name, self.config.path)
        location = locate_weights(self.config.clip, self.config.revision, CLIP_L)  # shared with CLIPScore

        def load() -> Loaded:
            from safetensors.torch import load_file

            tower = load_clip(location, self.placement)
            head = linear_head(int(tower.config.projection_dim))
            head.load_state_dict(load_file(folder / "model.safetensors"))
            return Loaded(tower, None, head)

        return load

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        embedding = image_embedding(self.loaded.net, pixels.to(self.placement.dtype))
        scores: Tensor = self._head(embedding)  # fp32
        return scores[:, 0]
