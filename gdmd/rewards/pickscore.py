"""PickScore v1: scaled cosine of a ViT-H/14 CLIP tuned on Pick-a-Pic (arXiv 2305.01569, eq. 1).

    score = exp(logit_scale) <f_image, f_text> / (|f_image| |f_text|); exp(logit_scale) is about 100, scores 19 to 24

Some code divides by 26 to bring it near [0, 1]; here it is never divided. A paper's "PickScore 22.1" is this score,
"0.221" is the cosine. Preprocessing of transformers' CLIP processor (crop offset rounded down). 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.config.rewards import PickScoreConfig
from gdmd.rewards.base import Loaded, PretrainedReward
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, PICKSCORE, WeightsLocation, load_clip, load_tokenizer, locate_weights


class PickScore(PretrainedReward):
    """exp(logit_scale) times the cosine."""

    config_class = PickScoreConfig
    fit = Preprocess(corner="floor")

    def _loader(self) -> Callable[[], Loaded]:
        location = locate_weights(self.config.path, self.config.revision, PICKSCORE)
        words = tokenizer_location(location, self.config.tokenizer)

        def load() -> Loaded:
            net = load_clip(location, self.placement)
            return Loaded(net, load_tokenizer(words, tokens_of(net)))

        return load

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        model: Any = self.loaded.net
        scale: Tensor = model.logit_scale.float().exp()
        return scale * cosine(model, pixels.to(self.placement.dtype), self._tokens(texts))


def tokenizer_location(weights: WeightsLocation, tokenizer: str | None) -> WeightsLocation:
    """The given tokenizer, else that in a local folder of weights, else CLIP-H's."""
    if tokenizer is None and weights.local and (Path(weights.name_or_path) / "tokenizer_config.json").is_file():
        return weights
    return locate_weights(tokenizer, None, CLIP_H)
