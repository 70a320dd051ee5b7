"""CLIPScore: the cosine of CLIP's image and text embeddings (arXiv 2104.08718, eq. 1 without 2.5 max(., 0)).

    score = <f_image, f_text> / (|f_image| |f_text|), in [-1, 1]; matching pairs reach 0.2 to 0.35 with ViT-L/14

A paper's "CLIP score 0.29" is this cosine, "29" is 100 times it (torchmetrics), and the CLIPScore of arXiv 2104.08718 is
2.5 times it. Prompts are truncated to 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from gdmd.config.rewards import ClipConfig
from gdmd.rewards.base import Loaded, PretrainedReward
from gdmd.rewards.weights import CLIP_L, load_clip, load_tokenizer, locate_weights


def tokens_of(model: Any) -> int:
    """Tokens that the text tower of a ``CLIPModel`` reads: 77 in all published ones."""
    return int(model.config.text_config.max_position_embeddings)


class CLIPScore(PretrainedReward):
    """Cosine of image and text embeddings of a ``transformers.CLIPModel``; default: ViT-L/14 of OpenAI, pinned."""

    config_class = ClipConfig

    def _loader(self) -> Callable[[], Loaded]:
        location = locate_weights(self.config.path, self.config.revision, CLIP_L)

        def load() -> Loaded:
            net = load_clip(location, self.placement)
            return Loaded(net, load_tokenizer(location, tokens_of(net)))

        return load

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        return cosine(self.loaded.net, pixels.to(self.placement.dtype), self._tokens(texts))


def cosine(model: Any, pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
    """pixels [b, 3, S, S], tokens [b, L] -> cosines [b]; fp32 from the embeddings on."""
    return (image_embedding(model, pixels) * text_embedding(model, tokens)).sum(-1)


def image_embedding(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors [b, D], fp32, with gradient to the pixels."""
    features: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
    return F.normalize(features.float(), dim=-1)


def text_embedding(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Unit vectors [b, D], fp32."""
    features: Tensor = model.get_text_features(**tokens).pooler_output
    return F.normalize(features.float(), dim=-1)
