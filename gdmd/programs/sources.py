"""One interface for everything that makes images: gdmd runs, exports, diffusers pipelines with LoRA, image folders.

Image j of prompt i has its own noise, a function of (seed, i, j) alone: neither the batch nor the number of devices nor
a restart changes it, and two sources given the same seed start from the same noise wherever their latents have one
shape. Nothing here imports torch before a source is opened.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gdmd.backbones.pipeline_files import instead_of_pipeline
from gdmd.config.sources import SourceConfig
from gdmd.evaluation.image_folders import holds_images, read_image, read_images
from gdmd.io import RunError, near_name, read_json, write_atomic, writing
from gdmd.programs.folders import TEACHERS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

Kind = Literal["teacher", "run", "export", "pipeline", "images"]
EXPORT_FILE = "gdmd_export.json"
"""In an exported folder: what is needed to make images with it."""
SETTINGS = "settings.json"
"""Beside drawn images: what they were made with."""
MOST_IMAGES = 4096
"""Per prompt; the number of an image is prompt x 4096 + image, so that more images never change the first ones."""


@dataclass(frozen=True)
class Place:
    """One image: the text and number of its prompt, its own number, and which occurrence of the text this is."""

    prompt: int
    image: int
    text: str
    occurrence: int = 0

    @property
    def key(self) -> int:
        """What its random draws are keyed by."""
        return self.prompt * MOST_IMAGES + self.image


@dataclass(frozen=True)
class Facts:
    """What is known of a source.

    nfe: network calls per image, where known. trained: labels of the rewards it was trained on; None = not known.
    device: what it runs on. identity: everything its images depend on besides prompt and noise; a folder of images holds
    those of one identity.
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
        """Its public part."""
        given = {"name": self.name, "kind": self.kind, "where": self.where, "nfe": self.nfe, "step": self.step}
        return given | {"trained": None if self.trained is None else list(self.trained)}


class Source(Protocol):
    """Something that makes images."""

    @property
    def facts(self) -> Facts: ...

    def check(self, texts: Sequence[str]) -> None:
        """ValueError for prompts that it cannot show."""
        ...

    def make(self, places: Sequence[Place], seed: int) -> list[Image]:
        """One image per place."""
        ...


def places_of(texts: Sequence[str], images: int) -> list[Place]:
    """Every image of a list of prompts, prompt by prompt."""
    if not 1 <= images <= MOST_IMAGES:
        raise ValueError(f"images per prompt = {images}: 1 to {MOST_IMAGES} are possible")
    seen: Counter[str] = Counter()
    found = []
    for number, text in enumerate(texts):
        found += [Place(number, image, text, seen[text]) for image in range(images)]
        seen[text] += 1
    return found


def kind_of(cfg: SourceConfig) -> Kind:
    """What a source is, from what lies there. ValueError (without torch) for what is none, or has options of another."""
    kind = _kind(cfg.where)
    every = set(SourceConfig.model_fields) - {"checkpoint"}
    fits = {
        "export": {"base", "dtype", "device", "revision", "variant"},
        "pipeline": every,
        "run": {"checkpoint", "base"},
    }
    allowed = fits.get(kind, set()) | {"name", "where", "batch", "trained"}
    extra = sorted(key for key in cfg.model_fields_set if key not in allowed)
    if extra or (kind == "pipeline" and cfg.base):
        raise ValueError(
            f"source {cfg.where} is a {kind}, for which {', '.join(extra) or 'base'} cannot be set; leave that out"
        )
    return kind


def _kind(where: str) -> Kind:
    folder = Path(where)
    if where in TEACHERS and not folder.exists():
        return "teacher"
    if (folder / "config.yaml").is_file():
        return "run"
    if (folder / EXPORT_FILE).is_file():
        return "export"
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if holds_images(folder):
        return "images"
    if not folder.exists() and not folder.parent.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where):
        return "pipeline"
    holds = f"it holds none of their files.{instead_of_pipeline(folder)}"
    seen = holds if folder.exists() else f"it does not exist.{near_name(where, TEACHERS)}"
    raise RunError(
        f"{where} is not a run folder, nor an exported folder, a diffusers pipeline, a hub id (ORG/NAME) or a folder of "
        f"images: {seen}"
    )


def open_source(cfg: SourceConfig) -> Source:
    """Load what makes the images; a local path never touches the network."""
    match kind_of(cfg):
        case "teacher" | "run":
            from gdmd.programs.source_runs import RunSource

            return RunSource.open(cfg)
        case "export":
            from gdmd.programs.source_pipelines import open_export

            return open_export(cfg)
        case "pipeline":
            from gdmd.programs.source_pipelines import open_pipeline

            return open_pipeline(cfg)
        case "images":
            return FolderSource(cfg)


class FolderSource:
    """Images that exist already, in one of the layouts of ``evaluation.image_folders``, found by the prompt's text."""

    def __init__(self, cfg: SourceConfig) -> None:
        self.rows = read_images(Path(cfg.where))
        identity = {"kind": "images"}  # nothing is drawn; scores go by the content of the files
        trained = cfg.trained or None
        self.facts = Facts(cfg.name, "images", cfg.where, trained=trained, batch=cfg.batch or 16, identity=identity)

    def file(self, place: Place) -> Path:
        """The image's file. ValueError where the prompt, or the image, is not there."""
        row = self.rows.get((place.text, place.occurrence))
        if row is None:
            raise ValueError(
                f"{self.facts.where} has no images of the prompt {place.text[:60]!r}; add them, or give the prompts that "
                "its images were generated for"
            )
        if place.image >= (count := len(row.images)):
            fewer = f", or ask for at most {count} with -n" if count else ""
            raise ValueError(
                f"{self.facts.where} has {count} image{'s' * (count != 1)} of {place.text[:60]!r}, but image "
                f"{place.image + 1} is needed; add images{fewer}"
            )
        return row.images[place.image]

    def check(self, texts: Sequence[str]) -> None:
        for place in places_of(texts, 1):
            self.file(place)

    def make(self, places: Sequence[Place], seed: int) -> list[Image]:
        """The images as they are; the seed of whoever made them is not known here."""
        return [read_image(self.file(place)) for place in places]


def settle(folder: Path, facts: Facts, seed: int, home: Path) -> None:
    """Note in FOLDER/settings.json what makes the images in ``home``. RunError where they are another source's."""
    drawn = facts.kind != "images"
    wanted = json.loads(json.dumps({"identity": dict(facts.identity), **({"seed": seed} if drawn else {})}))
    path = folder / SETTINGS
    with writing("the images", folder):
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
    """Keys whose values differ; a missing key is as good as one without a value."""
    known = there if isinstance(there, dict) else {}
    both = [(key, known.get(key), wanted.get(key)) for key in dict.fromkeys((*wanted, *known))]
    return [key for key, before, now in both if before != now and not (before in (None, []) and now in (None, []))]


def device_name(device: torch.device) -> str:
    """For times: those of two devices are not mixed."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_images(pixels: Tensor, name: str) -> list[Image]:
    """[B, 3, H, W] in [0, 1] -> 8-bit images. ValueError for pixels that are not finite: they would become black."""
    import torch

    from gdmd.rewards.images import to_pil

    bad = torch.nonzero(~torch.isfinite(pixels).flatten(1).all(1))[:, 0].tolist()
    if bad:
        raise ValueError(
            f"images {bad} of a batch of {name!r} are not finite; the network has diverged, or its weights do not fit "
            "their dtype: use an earlier checkpoint, or dtype=fp32"
        )
    return to_pil(pixels)
