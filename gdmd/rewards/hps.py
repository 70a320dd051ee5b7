"""HPSv2 and HPSv2.1: the cosine of a ViT-H/14 CLIP tuned on human preferences (arXiv 2306.09341).

    score = <f_image, f_text> / (|f_image| |f_text|), no logit scale; about .20 to .35

The image is made a float tensor first, its longest side resized to 224 (bicubic, antialias), zeros put around it, and
then normalized; no center crop. A paper's "HPS 28.1" is 100 times this score, ".2810" is this score; v2 and v2.1 are two
sets of weights whose scores must not be compared. Exact GELU, 77 tokens of texts that are cleaned as open_clip cleans
them (``clean``). The authors publish open_clip .pt files: see ``gdmd rewards fetch hps`` and ``gdmd rewards convert hps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from gdmd.rewards.base import HERE, Loaded, Placement, PretrainedReward, Tokenize, already
from gdmd.rewards.clean import open_clip_clean
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, converted_folder, load_clip, load_tokenizer, place_of

Version = Literal["hps", "hps_v2"]


class Hps(PretrainedReward):
    """Cosine of HPSv2's towers on padded images."""

    fit = Preprocess(fit="pad")

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = HERE, version: Version = "hps") -> Hps:
        """From a ``CLIPModel`` and a tokenizer; nothing is loaded."""
        return cls(version, already(model, tokenize), placement)

    @classmethod
    def from_pretrained(cls, path: str | None = None, placement: Placement = HERE, version: Version = "hps") -> Hps:
        """From a converted folder (default: the one ``gdmd rewards convert`` writes). "hps" is v2.1, "hps_v2" is v2."""
        folder = converted_folder(version, path)
        place = place_of(str(folder), None, CLIP_H)

        def load() -> Loaded:
            net = load_clip(place, placement)
            return Loaded(net, load_tokenizer(place, tokens_of(net), open_clip_clean))

        return cls(version, load, placement)

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        return cosine(self.loaded.net, pixels.to(self.placement.dtype), self._tokens(texts))
