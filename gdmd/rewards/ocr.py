"""OCR: does the image show the text that the prompt quotes? (arXiv 2505.05470, text rendering)

    score = max(0, 1 - d / n)    in [0, 1]; 1 = exact match

  n  characters of the requested text
  d  edit distance (insertions, deletions, substitutions) between it and the text that the OCR model reads

Both texts are normalized: NFKC, straight quotes and hyphens, no case, no white space; other punctuation counts. Several
quoted parts of a prompt are joined in order. Apostrophes are not quotes.
other_text "error": text beyond the requested one counts in d, so filling the image with letters gains nothing;
"free": d is that of the best-matching substring, for scenes that may contain other signs.
A prompt without quoted text is not scored (NaN). Not differentiable.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gdmd.config.load import validated
from gdmd.config.rewards import OcrConfig
from gdmd.rewards.base import DEFAULT_PLACEMENT, Placement, RewardModel, set_dtype
from gdmd.rewards.preprocessing import check_finite_images, check_images, to_pil
from gdmd.rewards.user_code import called, imported
from gdmd.rewards.weights import OCR as PUBLISHED
from gdmd.rewards.weights import OcrModel, load_ocr_model, locate_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.types import PromptBatch

Read = Callable[["Image"], str]
"""The text in an 8-bit image; "" if there is none."""
OtherText = Literal["error", "free"]
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
_ALIKE = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-", "—": "-"})
_END_OF_TURN = "<|im_end|>"


def requested_text(prompt: str) -> str:
    """The quoted parts of a prompt, joined by spaces; "" if there are none. Quotes: "..." “...” „...“ «...» 「...」"""
    return " ".join(next(filter(None, found.groups())) for found in _QUOTED.finditer(prompt))


def normalized(text: str) -> str:
    """The characters that are compared: NFKC, straight quotes and hyphens, no case, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_ALIKE).casefold().split())


def edit_distance(requested: str, read: str, anywhere: bool = False) -> int:
    """Fewest insertions, deletions and substitutions from ``read`` (``anywhere``: its best substring) to ``requested``."""
    row = [0] * (len(read) + 1) if anywhere else list(range(len(read) + 1))
    for line, letter in enumerate(requested, 1):
        above, row = row, [line]
        for column, other in enumerate(read, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (letter != other)))
    return min(row) if anywhere else row[-1]


def ocr_score(prompt: str, read: str, other_text: OtherText = "error") -> float:
    """max(0, 1 - d / n); NaN for a prompt without quoted text."""
    requested = normalized(requested_text(prompt))
    if not requested:
        return math.nan
    return max(0.0, 1 - edit_distance(requested, normalized(read), other_text == "free") / len(requested))


class OCR(RewardModel):
    """The OCR score, not differentiable. Images whose prompt quotes no text are not read.

    options: the fields of ``OcrConfig``.
    """

    name = "ocr"
    differentiable = False

    def __init__(self, **options: Any) -> None:
        self.config: OcrConfig = validated(OcrConfig, options, "OCR")
        self._total = self._without_text = 0
        self.read = self._reader(Placement.of(self.config))

    @classmethod
    def from_modules(cls, read: Read, **options: Any) -> OCR:
        """From a reader that is already loaded."""
        reward = cls(**options)
        reward.read, reward.in_memory = read, True
        return reward

    def to(self, device: str) -> OCR:
        """Load the model on another device at its next use."""
        if isinstance(self.read, OcrReader):
            self.read = self._reader(replace(Placement.of(self.config), device=device))
        return self

    def _reader(self, placement: Placement) -> Read:
        if target := self.config.reader:
            return partial(called, f"text reader {target}", imported(target))
        return OcrReader.from_pretrained(self.config.path, self.config.revision, placement, self.config.tokens)

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] in [0, 1]; NaN if the prompt quotes no text."""
        check_images(self.name, images, len(prompts))
        check_finite_images(self.name, images)
        return self.score_pil(to_pil(images), prompts.text).to(images.device)

    def score_pil(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """8-bit images -> [N], fp32, on the CPU; the same scores as ``score``."""
        quotes = [bool(normalized(requested_text(text))) for text in texts]
        self._total, self._without_text = self._total + len(quotes), self._without_text + quotes.count(False)
        scores = [
            ocr_score(text, self._read(image), self.config.other_text) if quoted else math.nan
            for image, text, quoted in zip(images, texts, quotes, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def stats(self) -> Mapping[str, Tensor]:
        """Fraction of images so far whose prompt quotes no text."""
        return {f"reward/{self.name}/unasked": torch.tensor(self._without_text / max(self._total, 1))}

    def unscored_because(self) -> str:
        share = self._without_text / max(self._total, 1)
        return f"{share:.0%} of the images have a prompt that quotes no text" if self._without_text else ""

    def _read(self, image: Image) -> str:
        text = self.read(image)
        if not isinstance(text, str):
            raise ValueError(f"the text reader returned a {type(text).__name__} for an image; it must return a string")
        return text


class OcrReader:
    """A frozen image-to-text model of transformers as image -> text: one image at a time, greedy decoding.

    For models that read whole scenes (GOT-OCR 2.0, arXiv 2409.01704). A line reader (TrOCR) also runs, but suits only
    images of a single line of text.
    """

    def __init__(
        self, load: Callable[[], OcrModel], placement: Placement = DEFAULT_PLACEMENT, tokens: int = 128
    ) -> None:
        self._load, self.placement, self.tokens = load, placement, tokens
        self._parts: OcrModel | None = None

    @classmethod
    def from_modules(
        cls, net: Any, processor: Any, placement: Placement = DEFAULT_PLACEMENT, tokens: int = 128
    ) -> OcrReader:
        """From a loaded model with ``generate`` and its processor."""
        return cls(lambda: OcrModel(net, processor), placement, tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | None = None,
        revision: str | None = None,
        placement: Placement = DEFAULT_PLACEMENT,
        tokens: int = 128,
    ) -> OcrReader:
        """From a folder (no network) or a hub id; default: GOT-OCR 2.0 at a pinned commit."""
        location = locate_weights(path, revision, PUBLISHED)
        return cls(lambda: load_ocr_model(location, placement), placement, tokens)

    @property
    def parts(self) -> OcrModel:
        """Network and processor, loaded and frozen on first use."""
        if self._parts is None:
            model = self._load()
            set_dtype(model.net, self.placement.dtype)
            model.net.to(self.placement.device).eval().requires_grad_(False)
            self._parts = model
        return self._parts

    @torch.no_grad()
    def __call__(self, image: Image) -> str:
        """The text in the image, at most ``tokens`` tokens of it."""
        net, processor = self.parts.net, self.parts.processor
        inputs = {
            key: value.to(self.placement.device, self.placement.dtype if value.is_floating_point() else None)
            for key, value in processor(images=image.convert("RGB"), return_tensors="pt").items()
        }
        tokenizer = processor.tokenizer
        ids = net.generate(
            **inputs, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
            eos_token_id=_end_tokens(tokenizer), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        prefix = 0 if net.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        text: str = tokenizer.decode(ids[0, prefix:], skip_special_tokens=True)
        return text.strip()


def _end_tokens(tokenizer: Any) -> list[int]:
    """Tokens that end the text: the end of the sequence, and the end of a turn if the tokenizer has one."""
    turn = tokenizer.convert_tokens_to_ids(_END_OF_TURN)
    ends = {tokenizer.eos_token_id} | ({turn} if turn != tokenizer.unk_token_id else set())
    return sorted(ends - {None})
