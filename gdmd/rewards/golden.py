"""Golden scores: somebody who has the weights records them once, everybody else compares without the original package.

The images are made here from formulas (their bytes are hashed in the file), so a golden file is a page of JSON. Both
paths are recorded: "pil" is the one of reports, "tensor" the one of training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.rewards.base import PretrainedReward
from gdmd.rewards.ocr import OcrReward
from gdmd.rewards.preprocessing import from_pil, to_pil
from gdmd.types import PromptBatch

if TYPE_CHECKING:
    from PIL.Image import Image

Checked = PretrainedReward | OcrReward
"""Rewards with weights of their own."""
FORMAT = "gdmd-golden-scores/1"
PROMPTS = (
    "a photo of a red apple on a wooden table",
    "an astronaut riding a horse on the moon, oil painting",
    "two cats",
    "",
    "a blurry, noisy picture without any subject " * 12,  # longer than any of the text towers reads
)
TEXTS = (
    ('a sign that says "OPEN"', "OPEN"),
    ('a can with the label "TOMATO SOUP"', "TOMATO SOAP"),
    ('a board with "Platform 9"', "Platform 9"),
    ('a scarf that says "GO TEAM"', ""),
    ('a ticket printed with "ADMIT ONE" and a date', "ADMIT ONE 24 May"),
)
"""(prompt, what its image says) for a reward that reads: right, nearly right, nothing, and too much."""
SIZES = ((512, 512), (384, 640), (333, 257), (224, 224), (96, 1024))
"""(height, width), one per prompt: square, wide, odd and tall, untouched, extreme."""


@dataclass(frozen=True)
class Difference:
    """A recorded score that was not reproduced."""

    entry: int
    path: str
    recorded: float
    found: float


def golden_images() -> list[Image]:
    """One 8-bit image per prompt: waves, rings and steps of known formulas; the same bytes on every machine.

    Integers alone, so that no library's rounding of sines can change a byte.
    """
    return [_drawn(number, height, width) for number, (height, width) in enumerate(SIZES)]


def golden_words() -> list[Image]:
    """One 512 x 512 image per entry of TEXTS: black words in Pillow's bitmap font, 8 times enlarged, on white."""
    from PIL import Image, ImageDraw, ImageFont

    images, font = [], ImageFont.load_default_imagefont()
    for _, words in TEXTS:
        small = Image.new("1", (64, 64), 1)
        for line, word in enumerate(words.split()):
            ImageDraw.Draw(small).text((4, 4 + 12 * line), word, fill=0, font=font)
        images.append(small.convert("RGB").resize((512, 512), Image.Resampling.NEAREST))
    return images


def cases(reward: Checked) -> tuple[list[Image], tuple[str, ...]]:
    """The images and prompts that a reward is checked with."""
    if isinstance(reward, OcrReward):
        return golden_words(), tuple(prompt for prompt, _ in TEXTS)
    return golden_images(), PROMPTS


def record(reward: Checked, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The golden file of a reward as a JSON object. facts: which weights, at which revision, in which dtype."""
    images, prompts = cases(reward)
    rows = zip(images, prompts, *_both(reward, images, prompts), strict=True)
    entries = [
        {"size": [image.height, image.width], "sha256": _digest(image), "prompt": text, "pil": pil, "tensor": tensor}
        for image, text, pil, tensor in rows
    ]
    return {"format": FORMAT, "reward": reward.name, **facts, "entries": entries}


def compare(reward: Checked, golden: Mapping[str, Any], tolerance: float = 1e-3) -> list[Difference]:
    """Scores that differ by more than ``tolerance`` (1 + |recorded|). ValueError for a file of something else."""
    check_golden(golden)
    if golden["reward"] != reward.name:
        raise ValueError(f"these are golden scores of {golden['reward']}, not of {reward.name}; give its own file")
    images, prompts = cases(reward)
    entries: Sequence[Mapping[str, Any]] = golden["entries"]
    for number, (entry, image) in enumerate(zip(entries, images, strict=True)):
        if entry["sha256"] != _digest(image) or entry["prompt"] != prompts[number]:
            raise ValueError(f"golden entry {number} is of another image or prompt; record the file again")
    found = dict(zip(("pil", "tensor"), _both(reward, images, prompts), strict=True))
    return [
        Difference(number, path, float(entry[path]), found[path][number])
        for number, entry in enumerate(entries)
        for path in found
        if not abs(found[path][number] - entry[path]) <= tolerance * (1 + abs(entry[path]))
    ]


def check_golden(golden: Any) -> None:
    """ValueError unless this is a golden file with every entry and finite scores."""
    whole = isinstance(golden, dict) and golden.get("format") == FORMAT and isinstance(golden.get("entries"), list)
    if not whole or len(golden["entries"]) != len(PROMPTS):
        raise ValueError(
            f"not a file of golden scores ({FORMAT} with {len(PROMPTS)} entries); record one with --record"
        )
    for number, entry in enumerate(golden["entries"]):
        scores = [entry.get(path) for path in ("pil", "tensor")] if isinstance(entry, dict) else [None]
        if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
            raise ValueError(f"golden entry {number} has no finite scores under pil and tensor; record the file again")


def _both(reward: Checked, images: Sequence[Image], prompts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Scores by the path of reports and by the path of training (one image at a time: their sizes differ)."""
    index = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        tensor = [
            reward.score(from_pil([image]), PromptBatch(index, (text,), index, {}, {}))
            for image, text in zip(images, prompts, strict=True)
        ]
    return reward.score_pil(images, prompts).tolist(), torch.cat(tensor).tolist()


def _drawn(number: int, height: int, width: int) -> Image:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rings = ((x - width // 2) ** 2 + (y - height // 2) ** 2) // (40 + 60 * number) % 512
    planes = ((x * 255) // width, (y * (3 + number)) % 256, (rings - 256).abs().clamp(max=255))
    turned = torch.stack(planes).roll(number, 0)
    checker = ((x // 16 + y // 16) % 2) * (turned if number % 2 else 0 * turned)
    levels: Tensor = (turned + checker) // (2 if number % 2 else 1)
    return to_pil(levels[None].float() / 255)[0]


def _digest(image: Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
