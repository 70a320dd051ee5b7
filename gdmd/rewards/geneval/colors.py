"""GenEval's color classifier: zero-shot CLIP ViT-L/14 on each object, cut out by its mask (arXiv 2310.11513, section 3.2).

The pixels of the mask on grey #999, cropped to the box, through CLIP's preprocessing. For each of the ten colors the unit
text embeddings of three templates are averaged and normalized again; the color with the largest cosine wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.base import HERE, Loaded, Placement, Tokenize, already
from gdmd.rewards.clip import image_embedding, text_embedding, tokens_of
from gdmd.rewards.geneval.rules import COLORS, ColorOf, Found
from gdmd.rewards.preprocessing import Preprocess
from gdmd.rewards.weights import CLIP_L, load_clip, load_tokenizer, place_of

if TYPE_CHECKING:
    from typing import Any

    from PIL.Image import Image

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"


class ColorClassifier:
    """A frozen CLIP as (image, objects, masks) -> one color per object."""

    def __init__(self, load: Callable[[], Loaded], placement: Placement = HERE) -> None:
        self._load, self.placement = load, placement
        self._loaded: Loaded | None = None
        self._known: dict[str, Tensor] = {}

    @classmethod
    def from_modules(cls, model: Any, tokenize: Tokenize, placement: Placement = HERE) -> ColorClassifier:
        """From a ``CLIPModel`` and a tokenizer."""
        return cls(already(model, tokenize), placement)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, revision: str | None = None, placement: Placement = HERE
    ) -> ColorClassifier:
        """As ``ClipScore.from_pretrained``, whose network it shares."""
        place = place_of(path, revision, CLIP_L)

        def load() -> Loaded:
            net = load_clip(place, placement)
            return Loaded(net, load_tokenizer(place, tokens_of(net)))

        return cls(load, placement)

    def of(self, image: Image, masks: Tensor) -> ColorOf:
        """The classifier of one image's objects, for ``judge`` and ``partial_credit``."""
        return lambda name, objects: self.colors(image, name, objects, masks)

    @torch.no_grad()
    def colors(self, image: Image, name: str, objects: Sequence[Found], masks: Tensor) -> list[str]:
        """masks [K, H, W] bool, read at the objects' keys -> the color of each object."""
        if not objects:
            return []
        net = self._ready().net
        how = Preprocess(size=int(net.config.vision_config.image_size))  # type: ignore[union-attr, arg-type]
        pixels = how.pil([cut_out(image, one, masks[one.key]) for one in objects])
        seen = image_embedding(net, pixels.to(self.placement.device, self.placement.dtype))
        best = (seen @ self._texts(name).T).argmax(1)
        return [COLORS[index] for index in best.tolist()]

    def _ready(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self._load()
            self._loaded.net.to(self.placement.device, self.placement.dtype).eval().requires_grad_(False)
        return self._loaded

    def _texts(self, name: str) -> Tensor:
        """Unit vectors of the ten colors for objects called ``name``, [10, D]."""
        if name not in self._known:
            loaded = self._ready()
            assert loaded.tokenize is not None
            lines = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = {key: value.to(self.placement.device) for key, value in loaded.tokenize(lines).items()}
            read = text_embedding(loaded.net, tokens).reshape(len(COLORS), len(TEMPLATES), -1)
            self._known[name] = F.normalize(read.mean(1), dim=-1)
        return self._known[name]


def cut_out(image: Image, found: Found, mask: Tensor) -> Image:
    """The object's pixels on grey, cropped to its box."""
    from PIL import Image as pillow

    picture = image.convert("RGB")
    stencil = pillow.fromarray(mask.cpu().numpy())
    alone = pillow.composite(picture, pillow.new("RGB", picture.size, BACKGROUND), stencil)
    x0, y0, x1, y1 = (round(side) for side in found.box)
    return alone.crop((x0, y0, x1, y1))
