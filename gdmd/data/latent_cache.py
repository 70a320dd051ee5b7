"""Latents of real images computed once and stored on disk, read row by row during training.

FOLDER/KEY holds the shards (see ``shards``; keys: the SHA-256 of image files, with the decoding version where that
matters) and index.json, the images of the data set with their captions. KEY is a hash of the VAE's identity (content,
precision) and of the image size, so that latents of another VAE or size are never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdmd.data.captioned_images import Captioned, Unusable, captioned_images, files_below, one_line, pixels
from gdmd.data.image_files import DECODING, plain
from gdmd.data.shards import SHARD, Shards
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.io import content_hash, write_atomic
from gdmd.types import PromptBatch

BATCH = 4
"""Images per call of the codec, which splits them by model.decode_chunk."""
INDEX = "index.json"
SHOWN = 5
"""Largest number of examples in an error."""
AGAIN = "run `gdmd latents` with this recipe and its overrides"
_log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]
"""[B, 3, H, W] in [0, 1] -> [B, C, h, w]."""


@dataclass(frozen=True)
class Computed:
    """What ``LatentStore.prepare`` did."""

    images: int
    encoded: int
    captions: int
    unusable: tuple[Unusable, ...]


@dataclass
class LatentStore:
    """The latents of one data set, VAE and image size.

    ``identity``: everything that changes latents; ``what``: a description of it, for errors.
    """

    root: Path
    identity: str
    source: tuple[str, ...]
    what: str

    def __post_init__(self) -> None:
        self.folder = self.root / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        self.shards = Shards(self.folder, "images", "latents", f"if it is damaged, delete it; then {AGAIN}")

    def prepare(
        self,
        size: tuple[int, int],
        encoder: Callable[[], Encode],
        most_unusable: int,
        seen: Callable[[], None] = lambda: None,
    ) -> Computed:
        """Encode the images that are not on disk, shard by shard, then write the index.

        ``encoder`` is called only if needed, ``seen`` after every image. ValueError for more than ``most_unusable``
        unusable images, and if there are no images.
        """
        rows: list[dict[str, str]] = []
        unusable: list[Unusable] = []
        waiting: dict[str, Tensor] = {}
        encode: Encode | None = None
        encoded = 0
        for found in self._images(size, waiting):
            seen()
            if isinstance(found, Unusable):
                unusable.append(found)
                _refuse_many(unusable, most_unusable)
                continue
            rows.append(found)
            if len(waiting) == SHARD:
                encode = encode or encoder()
                encoded += self._write(waiting, encode)
        if waiting:
            encoded += self._write(waiting, encode or encoder())
        if not rows:
            raise ValueError(
                f"real_data.source {_joined(self.source)}: contains no image with a caption. {_named(unusable)}"
                f"{_tars_in(self.source)}"
            )
        self._save_index(rows, unusable)
        return Computed(len(rows), encoded, len({row["caption"] for row in rows}), tuple(unusable))

    def _images(self, size: tuple[int, int], waiting: dict[str, Tensor]) -> Iterator[dict[str, str] | Unusable]:
        """Rows of the index; adds the pixels of images that are not on disk to ``waiting``."""
        for source in self.source:
            for found in captioned_images(Path(source)):
                yield found if isinstance(found, Unusable) else self._known(found, size, waiting)

    def _known(self, found: Captioned, size: tuple[int, int], waiting: dict[str, Tensor]) -> dict[str, str] | Unusable:
        digest = _key(found.content)
        if digest not in self.shards and digest not in waiting:
            try:
                waiting[digest] = pixels(found.content, *size, found.name)
            except ValueError as error:
                return Unusable(found.name, str(error))
        return {"image": digest, "caption": found.caption, "name": found.name}

    def _write(self, waiting: dict[str, Tensor], encode: Encode) -> int:
        """Encode and write one shard; empties ``waiting``."""
        images = list(waiting.values())
        parts = [
            encode(torch.stack(images[start : start + BATCH]).float() / 255) for start in range(0, len(images), BATCH)
        ]
        latents = torch.cat(parts).float().cpu()
        if not latents.isfinite().all():
            raise ValueError(f"{self.what}: the latents are not finite; try model.dtype=fp32")
        self.shards.write(list(waiting), {"latents": latents})
        waiting.clear()
        return len(images)

    def _save_index(self, rows: Sequence[Mapping[str, str]], unusable: Sequence[Unusable]) -> None:
        passed = [{"name": found.name, "why": found.why} for found in unusable]
        state = [self._state(Path(source)) for source in self.source]
        content = {"source": self.source, "state": state, "decoding": DECODING, "images": rows, "unusable": passed}
        write_atomic(self.folder / INDEX, json.dumps(content), "the latents", "real_data.latents")

    def open(self) -> StoredLatents:
        """The complete store. ValueError with the command to run if it is missing, damaged or has other images."""
        index = self._index()
        if index is None:
            raise ValueError(f"real_data.latents {str(self.root)!r}: no complete latents of {self.what}; {AGAIN}")
        self._check_source(index)
        if lost := sum(image not in self.shards for image, _ in index.images):
            raise ValueError(f"{self.folder}: the latents of {lost} images are missing; {AGAIN}")
        return StoredLatents(index.images, self.shards)

    def fingerprint(self) -> str | None:
        """A hash of the images and captions in order; None if there are no complete latents."""
        index = self._index()
        return content_hash(*(part for row in index.images for part in row)) if index else None

    def _index(self) -> _Index | None:
        """The content of index.json; None if it does not exist. ValueError if it is damaged."""
        file = self.folder / INDEX
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            source = tuple(content["source"])
            states = dict(zip(source, content["state"], strict=True))
            images = tuple((str(row["image"]), str(row["caption"])) for row in content["images"])
            return _Index(source, states, images, int(content.get("decoding", 1)))
        except FileNotFoundError:
            return None
        except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: damaged ({error}); {AGAIN}") from error

    def _check_source(self, index: _Index) -> None:
        """ValueError if the images changed or would be decoded differently now; sources that are gone are not checked."""
        there = [name for name in self.source if Path(name).exists()]
        now = {name: self._state(Path(name)) for name in there}
        if index.source != self.source and [now.get(name) for name in self.source] != list(index.states.values()):
            raise ValueError(
                f"real_data.latents {str(self.root)!r}: computed from {_joined(index.source)}, but real_data.source is "
                f"{_joined(self.source)}; {AGAIN}, or give another folder"
            )
        changed = [name for name in there if now[name] != index.states.get(name, now[name])]
        if changed:
            raise ValueError(
                f"real_data.source {_joined(changed)}: its files changed since the latents were computed (their names, "
                f"sizes or times differ); {AGAIN} (only new images are encoded)"
            )
        if index.decoding == DECODING:
            return
        what = (
            f"{self.folder}: computed by a version of gdmd that clipped 16-bit images to white and showed the colors under "
            "transparent pixels"
        )
        if there:
            raise ValueError(f"{what}; {AGAIN} (only such images are encoded again)")
        _log.warning("%s. If the data set has such images, %s where its files are", what, AGAIN)

    def _state(self, source: Path) -> str:
        """A hash of the names, sizes and times of a source's files, to detect changes without reading them."""
        root = self.root.resolve()  # the latents may be in the folder of the images
        files = [file for file in files_below(source) if not file.resolve().is_relative_to(root)]
        found = [(str(file.relative_to(source)), file.stat()) for file in (files if source.is_dir() else [source])]
        return content_hash(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found))


@dataclass(frozen=True)
class _Index:
    """index.json. ``states``: by source; ``images``: (key, caption) of each; ``decoding``: see ``image_files``."""

    source: tuple[str, ...]
    states: Mapping[str, str]
    images: tuple[tuple[str, str], ...]
    decoding: int


class StoredLatents:
    """RealLatents from disk: a random image of each prompt's caption, a function of (seed, step, sample) only."""

    def __init__(self, images: Sequence[tuple[str, str]], shards: Shards) -> None:
        """images: (key, caption) of each image."""
        self._shards = shards
        self._images: dict[str, list[str]] = {}
        for key, caption in images:
            self._images.setdefault(caption, []).append(key)
        self.captions = tuple(caption for _, caption in images)

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError that counts and lists the prompts without an image."""
        missing = [text for text in dict.fromkeys(prompts) if one_line(text) not in self._images]
        if missing:
            shown = ", ".join(repr(text[:60]) for text in missing[:SHOWN])
            raise ValueError(
                f"prompts.file: {len(missing)} of {len(dict.fromkeys(prompts))} prompts have no image in real_data "
                f"({shown}{', ...' if len(missing) > SHOWN else ''}); leave prompts.file out to train on its captions"
            )

    def __call__(self, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """[B, C, H, W], fp32; all images of a caption are equally likely."""
        draws = rng.on_host().uniform("real_image").tolist()
        choices = [self._images[one_line(text)] for text in prompts.text]
        keys = [images[int(draw * len(images))] for images, draw in zip(choices, draws, strict=True)]
        return to_device_async(self._shards.read(keys)["latents"], prompts.index.device)


def _key(content: bytes) -> str:
    """The key of an image file: a hash of its content, with the decoding version where that matters."""
    digest = hashlib.sha256(content).hexdigest()
    return digest if plain(content) else f"{digest}:{DECODING}"


def _refuse_many(unusable: Sequence[Unusable], most: int) -> None:
    if len(unusable) > most:
        raise ValueError(
            f"more than real_data.unreadable = {most} images cannot be used. {_named(unusable)}; fix or remove them, or "
            "raise the limit (finished latents are kept)"
        )


def _named(unusable: Sequence[Unusable]) -> str:
    shown = "; ".join(f"{found.name!r} {found.why}" for found in unusable[:SHOWN])
    return f"Unusable: {len(unusable)}, such as {shown}" if unusable else "No images were found"


def _tars_in(source: Sequence[str]) -> str:
    tars = [tar for folder in source if Path(folder).is_dir() for tar in sorted(Path(folder).glob("*.tar"))]
    return f". It contains .tar files: list them, as in real_data.source=[{tars[0]}, ...]" if tars else ""


def _joined(source: Sequence[str]) -> str:
    return ", ".join(map(repr, source))
