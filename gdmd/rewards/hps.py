"""HPSv2 and HPSv2.1: the cosine of a ViT-H/14 CLIP tuned on human preferences (arXiv 2306.09341).

    score = <f_image, f_text> / (|f_image| |f_text|), no logit scale; about 0.20 to 0.35

The image is converted to float, its longest side resized to 224 (bicubic, antialias), padded with zeros, then normalized;
no center crop. A paper's "HPS 28.1" is 100 times this score, "0.281" is this score. v2 and v2.1 are different weights:
never compare their scores. Exact GELU; 77 tokens of texts cleaned as open_clip does (``clean``). The authors publish
open_clip .pt files: ``gdmd rewards fetch hps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from gdmd.rewards.base import DEFAULT_PLACEMENT, Loaded, Placement, PretrainedReward, Tokenize, from_loaded
from gdmd.rewards.clean import open_clip_clean
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, converted_folder, load_clip, load_tokenizer, locate_weights

Version = Literal["hps", "hps_v2"]


class Hps(PretrainedReward):
    """Cosine of HPSv2's embeddings on padded images."""

    fit = Preprocess(fit="pad")

    @classmethod
    def from_modules(
        cls, model: Any, tokenize: Tokenize, placement: Placement = DEFAULT_PLACEMENT, version: Version = "hps"
    ) -> Hps:
        """From a ``CLIPModel`` and a tokenizer that are already loaded."""
        return cls(version, from_loaded(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, placement: Placement = DEFAULT_PLACEMENT, version: Version = "hps"
    ) -> Hps:
        """From a converted folder (default: the one ``gdmd rewards convert`` writes). "hps" is v2.1, "hps_v2" is v2."""
        folder = converted_folder(version, path)
        location = locate_weights(str(folder), None, CLIP_H)

        def load() -> Loaded:
            net = load_clip(location, placement)
            return Loaded(net, load_tokenizer(location, tokens_of(net), open_clip_clean))

        return cls(version, load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        return cosine(self.loaded.net, pixels.to(self.placement.dtype), self._tokens(texts))
