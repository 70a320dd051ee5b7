"""PickScore v1: scaled cosine of a ViT-H/14 CLIP tuned on Pick-a-Pic (arXiv 2305.01569, eq. 1).

    score = exp(logit_scale) <f_image, f_text> / (|f_image| |f_text|); exp(logit_scale) is about 100, scores 19 to 24

Some code divides by 26 to bring it near [0, 1]; here it is never divided. A paper's "PickScore 22.1" is this score,
"0.221" is the cosine. Preprocessing of transformers' CLIP processor (crop offset rounded down). 77 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.rewards.base import DEFAULT_PLACEMENT, Loaded, Placement, PretrainedReward, Tokenize, from_loaded
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, PICKSCORE, WeightsLocation, load_clip, load_tokenizer, locate_weights


class PickScore(PretrainedReward):
    """exp(logit_scale) times the cosine."""

    fit = Preprocess(corner="floor")

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = DEFAULT_PLACEMENT) -> PickScore:
        """From a ``CLIPModel`` and a tokenizer that are already loaded."""
        return cls("pickscore", from_loaded(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls,
        path: str | None = None,
        revision: str | None = None,
        placement: Placement = DEFAULT_PLACEMENT,
        tokenizer: str | None = None,
    ) -> PickScore:
        """From a folder (no network) or a hub id; default: the published weights, pinned.

        tokenizer: folder or hub id; default: the folder itself if it has a tokenizer, else CLIP-H's, pinned.
        """
        location = locate_weights(path, revision, PICKSCORE)
        words = tokenizer_location(location, tokenizer)

        def load() -> Loaded:
            net = load_clip(location, placement)
            return Loaded(net, load_tokenizer(words, tokens_of(net)))

        return cls("pickscore", load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        model: Any = self.loaded.net
        scale: Tensor = model.logit_scale.float().exp()
        return scale * cosine(model, pixels.to(self.placement.dtype), self._tokens(texts))


def tokenizer_location(weights: WeightsLocation, tokenizer: str | None) -> WeightsLocation:
    """The given tokenizer, else that in a local folder of weights, else CLIP-H's."""
    if tokenizer is None and weights.local and (Path(weights.name_or_path) / "tokenizer_config.json").is_file():
        return weights
    return locate_weights(tokenizer, None, CLIP_H)
