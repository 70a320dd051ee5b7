"""CLIPScore: the cosine of CLIP's image and text embeddings (arXiv 2104.08718, eq. 1 without its 2.5 max(., 0)).

    score = <f_image, f_text> / (|f_image| |f_text|), in [-1, 1]; matching pairs reach .2 to .35 with ViT-L/14

A paper's "CLIP score .29" is this cosine, "29" is 100 times it (torchmetrics), and the CLIPScore of arXiv 2104.08718 is
2.5 times it. 77 tokens, the rest of a longer prompt is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.base import HERE, Loaded, Placement, PretrainedReward, Tokenize, already
from gdmd.rewards.weights import CLIP_L, load_clip, load_tokenizer, place_of


def tokens_of(model: Any) -> int:
    """How many tokens the text tower of a ``CLIPModel`` reads: 77 in every published one."""
    return int(model.config.text_config.max_position_embeddings)


class ClipScore(PretrainedReward):
    """Cosine of image and text embeddings of a ``transformers.CLIPModel``."""

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = HERE) -> ClipScore:
        """From a ``CLIPModel`` and a tokenizer; nothing is loaded."""
        return cls("clip", already(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, revision: str | None = None, placement: Placement = HERE
    ) -> ClipScore:
        """From a folder in transformers' format (no network) or a hub id; default: ViT-L/14 of OpenAI, pinned."""
        place = place_of(path, revision, CLIP_L)

        def load() -> Loaded:
            net = load_clip(place, placement)
            return Loaded(net, load_tokenizer(place, tokens_of(net)))

        return cls("clip", load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        return cosine(self.loaded.net, pixels.to(self.placement.dtype), self._tokens(texts))


def cosine(model: Any, pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
    """pixels [b, 3, S, S], tokens [b, L] -> cosines [b], fp32 from the embeddings on."""
    return (image_embedding(model, pixels) * text_embedding(model, tokens)).sum(-1)


def image_embedding(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors [b, D], fp32, with gradient to the pixels."""
    features: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
    return F.normalize(features.float(), dim=-1)


def text_embedding(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Unit vectors [b, D], fp32."""
    features: Tensor = model.get_text_features(**tokens).pooler_output
    return F.normalize(features.float(), dim=-1)
