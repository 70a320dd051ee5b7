"""OCR: is the text that the prompt asks for in quotes what can be read in the image? (arXiv 2505.05470, text rendering)

    score = max(0, 1 - d / n)    in [0, 1]; 1 = letter by letter

  n  characters of the text asked for
  d  edit distance (insertions, deletions, substitutions) between it and what the reader reads

Both texts are compared after NFKC, with straight quotes and hyphens, without case and without white space; other
punctuation counts. Several quoted pieces of a prompt are one text, in their order. Apostrophes quote nothing.
other_text "error": what the image says beyond the text asked for counts in d, so that walls of letters gain nothing;
"free": d is that of the best-matching stretch of what was read, for scenes that may hold other signs.
A prompt without quoted text is not scored (NaN): it asks nothing that a reader could judge. Not differentiable.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gdmd.rewards.base import HERE, Placement
from gdmd.rewards.preprocessing import check_images, to_pil
from gdmd.rewards.weights import OCR, ReadingNet, load_reader, place_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.types import PromptBatch

Read = Callable[["Image"], str]
"""What is written in an 8-bit image; "" where nothing is."""
OtherText = Literal["error", "free"]
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
_ALIKE = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "—": "-"})
_END_OF_TURN = "<|im_end|>"


def asked_text(prompt: str) -> str:
    """The quoted pieces of a prompt, joined by spaces; "" where there is none. Quotes: "..." “...” „...“ «...» 「...」"""
    return " ".join(next(filter(None, found.groups())) for found in _QUOTED.finditer(prompt))


def normalized(text: str) -> str:
    """The letters that are compared: NFKC, straight quotes and hyphens, no case, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_ALIKE).casefold().split())


def edit_distance(asked: str, read: str, anywhere: bool = False) -> int:
    """Fewest insertions, deletions and substitutions from ``read`` (or its best stretch) to ``asked``."""
    row = [0] * (len(read) + 1) if anywhere else list(range(len(read) + 1))
    for place, letter in enumerate(asked, 1):
        above, row = row, [place]
        for column, other in enumerate(read, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (letter != other)))
    return min(row) if anywhere else row[-1]


def ocr_score(prompt: str, read: str, other_text: OtherText = "error") -> float:
    """max(0, 1 - d / n); NaN for a prompt without quoted text."""
    asked = normalized(asked_text(prompt))
    if not asked:
        return math.nan
    return max(0.0, 1 - edit_distance(asked, normalized(read), other_text == "free") / len(asked))


class OcrReward:
    """A reader as a ``Reward``. Images whose prompt quotes no text are not read."""

    name = "ocr"
    differentiable = False

    def __init__(self, read: Read, other_text: OtherText = "error") -> None:
        self.read, self.other_text = read, other_text
        self._seen = self._unasked = 0

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] in [0, 1]; NaN where the prompt quotes no text."""
        check_images(self.name, images, len(prompts))
        if not torch.isfinite(images).all():
            bad = torch.nonzero(~torch.isfinite(images).flatten(1).all(1))[:, 0].tolist()
            raise ValueError(f"ocr got images that are not finite at samples {bad}; look at the decoder")
        return self.score_pil(to_pil(images), prompts.text).to(images.device)

    def score_pil(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """8-bit images -> [N], fp32, on the CPU; what ``score`` gives for them."""
        asks = [bool(normalized(asked_text(text))) for text in texts]
        self._seen, self._unasked = self._seen + len(asks), self._unasked + asks.count(False)
        scores = [
            ocr_score(text, self._words(image), self.other_text) if asked else math.nan
            for image, text, asked in zip(images, texts, asks, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def stats(self) -> Mapping[str, Tensor]:
        """Share of images whose prompt quoted no text, since the start."""
        return {f"reward/{self.name}/unasked": torch.tensor(self._unasked / max(self._seen, 1))}

    def unscored_because(self) -> str:
        share = self._unasked / max(self._seen, 1)
        return f"{share:.0%} of the images have a prompt that quotes no text to read" if self._unasked else ""

    def _words(self, image: Image) -> str:
        words = self.read(image)
        if not isinstance(words, str):
            raise ValueError(f"the text reader gave a {type(words).__name__} for an image; it must return a string")
        return words


class Reader:
    """A frozen image-to-text model of transformers as image -> text, one image at a time, greedily.

    For a model that reads whole scenes (GOT-OCR 2.0, arXiv 2409.01704). One that reads a single cropped line (TrOCR)
    loads and runs as well, but suits images that are one line of text only.
    """

    def __init__(self, load: Callable[[], ReadingNet], placement: Placement = HERE, tokens: int = 128) -> None:
        self._load, self.placement, self.tokens = load, placement, tokens
        self._parts: ReadingNet | None = None

    @classmethod
    def from_modules(cls, net: Any, processor: Any, placement: Placement = HERE, tokens: int = 128) -> Reader:
        """From a model with ``generate`` and its processor; nothing is loaded."""
        return cls(lambda: ReadingNet(net, processor), placement, tokens)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, revision: str | None = None, placement: Placement = HERE, tokens: int = 128
    ) -> Reader:
        """From a folder (no network) or a hub id; default: GOT-OCR 2.0 at a pinned commit."""
        place = place_of(path, revision, OCR)
        return cls(lambda: load_reader(place, placement), placement, tokens)

    @property
    def parts(self) -> ReadingNet:
        """Network and processor, loaded and frozen on first use."""
        if self._parts is None:
            found = self._load()
            found.net.to(self.placement.device, self.placement.dtype).eval().requires_grad_(False)
            self._parts = found
        return self._parts

    @torch.no_grad()
    def __call__(self, image: Image) -> str:
        """What is written in the image; at most ``tokens`` tokens of it are read."""
        net, processor = self.parts.net, self.parts.processor
        given = {
            key: value.to(self.placement.device, self.placement.dtype if value.is_floating_point() else None)
            for key, value in processor(images=image.convert("RGB"), return_tensors="pt").items()
        }
        words = processor.tokenizer
        ids = net.generate(
            **given, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
            eos_token_id=_ends(words), pad_token_id=words.pad_token_id,
        )  # fmt: skip
        prefix = 0 if net.config.is_encoder_decoder else given["input_ids"].shape[1]
        text: str = words.decode(ids[0, prefix:], skip_special_tokens=True)
        return text.strip()


def _ends(words: Any) -> list[int]:
    """Tokens that end a reading: the tokenizer's own end, and the end of a turn where it knows one."""
    turn = words.convert_tokens_to_ids(_END_OF_TURN)
    found = {words.eos_token_id} | ({turn} if turn != words.unk_token_id else set())
    return sorted(found - {None})
