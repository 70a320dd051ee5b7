"""HPSv2 and HPSv2.1: the cosine of a ViT-H/14 CLIP tuned on human preferences (arXiv 2306.09341).

    score = <f_image, f_text> / (|f_image| |f_text|), no logit scale; about 0.20 to 0.35

The image is converted to float, its longest side resized to 224 (bicubic, antialias), padded with zeros, then normalized;
no center crop. A paper's "HPS 28.1" is 100 times this score, "0.281" is this score. v2 and v2.1 are different weights:
never compare their scores. Exact GELU; 77 tokens of texts cleaned as open_clip does (``clean``). The authors publish
open_clip .pt files: ``gdmd rewards fetch hps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gdmd.config.rewards import HpsConfig
from gdmd.rewards.base import Loaded, PretrainedReward
from gdmd.rewards.clean import open_clip_clean
from gdmd.rewards.clip import cosine, tokens_of
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_H, converted_folder, load_clip, load_tokenizer, locate_weights


class HPSv2(PretrainedReward):
    """Cosine of HPSv2's embeddings on padded images; the weights of v2.1, or those of v2 with kind="hps_v2"."""

    config_class = HpsConfig
    fit = Preprocess(fit="pad")

    def _loader(self) -> Callable[[], Loaded]:
        folder = converted_folder(self.name, self.config.path)
        location = locate_weights(str(folder), None, CLIP_H)

        def load() -> Loaded:
            net = load_clip(location, self.placement)
            return Loaded(net, load_tokenizer(location, tokens_of(net), open_clip_clean))

        return load

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        return cosine(self.loaded.net, pixels.to(self.placement.dtype), self._tokens(texts))
