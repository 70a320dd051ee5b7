"""PickScore v1: scaled cosine of a ViT-H/14 CLIP tuned on Pick-a-Pic (arXiv 2305.01569, eq. 1).

    score = exp(logit_scale) <f_image, f_text> / (|f_image| |f_text|); exp(logit_scale) is about 100, scores about 19 to 24

Some code divides by 26 to bring it near [0, 1]; here it is never divided. A paper's "PickScore 22.1" is this score,
".221" is the cosine. Preprocessed by transformers' CLIP processor (center crop rounded down). 77 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.rewards.base import HERE, Loaded, Placement, PretrainedReward, Tokenize, already
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, PICKSCORE, load_clip, load_tokenizer, place_of


class PickScore(PretrainedReward):
    """exp(logit_scale) times the cosine."""

    fit = Preprocess(corner="floor")

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = HERE) -> PickScore:
        """From a ``CLIPModel`` and a tokenizer; nothing is loaded."""
        return cls("pickscore", already(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls,
        path: str | None = None,
        revision: str | None = None,
        placement: Placement = HERE,
        tokenizer: str | None = None,
    ) -> PickScore:
        """From a folder (no network) or a hub id; default: the published weights, pinned.

        tokenizer: folder or id; default: the folder itself where it holds one, else that of CLIP-H, pinned.
        """
        place = place_of(path, revision, PICKSCORE)
        own = place.local and tokenizer is None and (Path(place.where) / "tokenizer_config.json").is_file()
        words = place if own else place_of(tokenizer, None, CLIP_H)

        def load() -> Loaded:
            net = load_clip(place, placement)
            return Loaded(net, load_tokenizer(words, tokens_of(net)))

        return cls("pickscore", load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        model: Any = self.loaded.net
        scale: Tensor = model.logit_scale.float().exp()
        return scale * cosine(model, pixels.to(self.placement.dtype), self._tokens(texts))
