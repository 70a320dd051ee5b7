"""What all image sources share: description, numbering of images and their noise, and the settings file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gdmd.io import RunError, read_json, write_atomic, writing

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


Kind = Literal["teacher", "run", "export", "pipeline", "images"]


SETTINGS = "settings.json"
"""The file next to generated images with what they were generated with."""


MAX_IMAGES = 4096
"""Images per prompt. Noise is keyed by prompt x 4096 + image, so that asking for more images keeps the first ones."""


@dataclass(frozen=True)
class ImageSlot:
    """One image: number and text of its prompt, its own number, and which occurrence of this text the prompt is."""

    prompt: int
    image: int
    text: str
    occurrence: int = 0

    @property
    def key(self) -> int:
        """The key of its random draws."""
        return self.prompt * MAX_IMAGES + self.image


@dataclass(frozen=True)
class SourceInfo:
    """The description of a source.

    nfe: network calls per image, if known. trained: labels of the rewards it was trained on; None = unknown. identity:
    everything that its images depend on besides prompt and noise; an image folder holds images of one identity.
    """

    name: str
    kind: Kind
    where: str
    shapes: bool = False
    nfe: int | None = None
    step: int | None = None
    trained: tuple[str, ...] | None = None
    batch: int = 4
    device: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The part that is reported."""
        given = {"name": self.name, "kind": self.kind, "where": self.where, "nfe": self.nfe, "step": self.step}
        return given | {"trained": None if self.trained is None else list(self.trained)}


class Source(Protocol):
    """Something that generates images."""

    @property
    def info(self) -> SourceInfo: ...

    def check(self, texts: Sequence[str]) -> None:
        """ValueError for prompts that it cannot generate."""
        ...

    def generate(self, slots: Sequence[ImageSlot], seed: int) -> list[Image]:
        """One image per slot."""
        ...


def image_slots(texts: Sequence[str], images: int) -> list[ImageSlot]:
    """Every image of a list of prompts, prompt by prompt."""
    if not 1 <= images <= MAX_IMAGES:
        raise ValueError(f"images per prompt = {images}: 1 to {MAX_IMAGES} are possible")
    seen: Counter[str] = Counter()
    found = []
    for number, text in enumerate(texts):
        found += [ImageSlot(number, image, text, seen[text]) for image in range(images)]
        seen[text] += 1
    return found


def record_settings(folder: Path, info: SourceInfo, seed: int, home: Path) -> None:
    """Record in FOLDER/settings.json what generates the images in ``home``. RunError if it has another source."""
    drawn = info.kind != "images"
    wanted = json.loads(json.dumps({"identity": dict(info.identity), **({"seed": seed} if drawn else {})}))
    path = folder / SETTINGS
    with writing("the images", folder, option="--out"):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        there = read_json(path, "Give an empty folder with --out.")
        keys = _differing(there.get("identity"), wanted["identity"])
        keys += ["seed"] if drawn and there.get("seed") != seed else []
        if keys:
            verb = "differs" if len(keys) == 1 else "differ"
            raise RunError(
                f"{folder} holds images of another source ({', '.join(keys)} {verb}); give an empty folder with --out"
            )
        return
    if drawn and next(home.glob("*/samples/*.png"), None):
        raise RunError(f"{home} holds images of an unknown source ({path} is missing); give an empty folder with --out")
    write_atomic(path, json.dumps(wanted, indent=2) + "\n", "the settings", option="--out")


def _differing(there: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ; a missing key equals one without a value."""
    known = there if isinstance(there, dict) else {}
    both = [(key, known.get(key), wanted.get(key)) for key in dict.fromkeys((*wanted, *known))]
    return [key for key, before, now in both if before != now and not (before in (None, []) and now in (None, []))]


def device_name(device: torch.device) -> str:
    """The device's name, which is stored with measured times, so that those of two devices are not mixed."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_images(pixels: Tensor, name: str) -> list[Image]:
    """[B, 3, H, W] in [0, 1] -> 8-bit images. ValueError for pixels that are not finite, which would turn black."""
    import torch

    from gdmd.rewards.preprocessing import to_pil

    bad = torch.nonzero(~torch.isfinite(pixels).flatten(1).all(1))[:, 0].tolist()
    if bad:
        raise ValueError(
            f"images {bad} of a batch of {name!r} are not finite; the network has diverged, or its weights do not fit "
            "their dtype: use an earlier checkpoint, or dtype=fp32"
        )
    return to_pil(pixels)
