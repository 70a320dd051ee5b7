"""GenEval's color classifier: zero-shot CLIP ViT-L/14 on each object, cut out by its mask (arXiv 2310.11513, section 3.2).

The masked pixels on gray #999, cropped to the box, are preprocessed for CLIP. For each of the ten colors, the unit text
embeddings of three templates are averaged and normalized; the color with the largest cosine wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.base import DEFAULT_PLACEMENT, Loaded, Placement, Tokenize
from gdmd.rewards.clip import image_embedding, text_embedding, tokens_of
from gdmd.rewards.geneval.rules import COLORS, ColorOf, DetectedObject
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_L, load_clip, load_tokenizer, locate_weights

if TYPE_CHECKING:
    from typing import Any

    from PIL.Image import Image

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"


class ColorClassifier:
    """A frozen CLIP as (image, objects, masks) -> one color per object."""

    def __init__(self, load: Callable[[], Loaded], placement: Placement = DEFAULT_PLACEMENT) -> None:
        self._load, self.placement = load, placement
        self._loaded: Loaded | None = None
        self._text_embeddings: dict[str, Tensor] = {}

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = DEFAULT_PLACEMENT) -> ColorClassifier:
        """From a ``CLIPModel`` and a tokenizer."""
        return cls(lambda: Loaded(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, revision: str | None = None, placement: Placement = DEFAULT_PLACEMENT
    ) -> ColorClassifier:
        """From a folder (no network) or a hub id; default: ViT-L/14 of OpenAI, the network of ``CLIPScore``."""
        location = locate_weights(path, revision, CLIP_L)

        def load() -> Loaded:
            net = load_clip(location, placement)
            return Loaded(net, load_tokenizer(location, tokens_of(net)))

        return cls(load, placement)

    def of(self, image: Image, masks: Tensor) -> ColorOf:
        """The classifier for the objects of one image, as ``judge`` and ``partial_credit`` need it."""
        return lambda name, objects: self.colors(image, name, objects, masks)

    @torch.no_grad()
    def colors(self, image: Image, name: str, objects: Sequence[DetectedObject], masks: Tensor) -> list[str]:
        """masks [K, H, W] bool, indexed by the keys of the objects -> the color of each object."""
        if not objects:
            return []
        net = self._ready().net
        preprocess = Preprocess(size=int(net.config.vision_config.image_size))  # type: ignore[union-attr, arg-type]
        pixels = preprocess.pil([cut_out(image, one, masks[one.key]) for one in objects])
        embeddings = image_embedding(net, pixels.to(self.placement.device, self.placement.dtype))
        best = (embeddings @ self._texts(name).T).argmax(1)
        return [COLORS[index] for index in best.tolist()]

    def _ready(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load()
            self._loaded.net.to(self.placement.device, self.placement.dtype).eval().requires_grad_(False)
        return self._loaded

    def _texts(self, name: str) -> Tensor:
        """Unit text embeddings of the ten colors for objects called ``name``, [10, D]."""
        if name not in self._text_embeddings:
            loaded = self._ready()
            assert loaded.tokenize is not None
            lines = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = {key: value.to(self.placement.device) for key, value in loaded.tokenize(lines).items()}
            embeddings = text_embedding(loaded.net, tokens).reshape(len(COLORS), len(TEMPLATES), -1)
            self._text_embeddings[name] = F.normalize(embeddings.mean(1), dim=-1)
        return self._text_embeddings[name]


def cut_out(image: Image, detected: DetectedObject, mask: Tensor) -> Image:
    """The object's pixels on gray, cropped to its box."""
    from PIL import Image as pillow

    rgb = image.convert("RGB")
    masked = pillow.composite(rgb, pillow.new("RGB", rgb.size, BACKGROUND), pillow.fromarray(mask.cpu().numpy()))
    x0, y0, x1, y1 = (round(side) for side in detected.box)
    return masked.crop((x0, y0, x1, y1))
