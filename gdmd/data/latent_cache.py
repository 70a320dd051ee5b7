"""Latents of real images computed once: shards of safetensors on disk, read row by row while training.

FOLDER/KEY/shard_NAME.safetensors holds "latents" [n, C, h, w] of up to SHARD images and the SHA-256 of their files in
its header, with the version of the decoding where that changed; index.json the images of the data set with their
captions. KEY is a hash of the VAE's identity (content, precision) and of the size, so that latents of another VAE or size
are never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gdmd.data.captioned_images import Captioned, Unusable, captioned_images, files_below, pixels
from gdmd.data.checksums import Verified, checksums, opened
from gdmd.data.image_files import DECODING, plain
from gdmd.data.text_cache import shard_of
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.io import content_hash, follow_umask, replaced
from gdmd.types import PromptBatch

SHARD = 64
"""Images per file: what an interruption costs at most."""
BATCH = 4
"""Images per call of the codec, which divides them by model.decode_chunk."""
INDEX = "index.json"
SHOWN = 5
"""Examples in an error."""
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
    """The latents of one data set, VAE and size. ``identity``: what they depend on; ``what``: the same for people."""

    root: Path
    identity: str
    source: tuple[str, ...]
    what: str
    _place: dict[str, tuple[Path, int]] = field(default_factory=dict)
    _written: Verified = field(default_factory=Verified)

    def __post_init__(self) -> None:
        self.folder = self.root / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        for shard in sorted(self.folder.glob("shard_*.safetensors")):
            self._add(shard)

    def prepare(
        self,
        size: tuple[int, int],
        encoder: Callable[[], Encode],
        most_unusable: int,
        seen: Callable[[], None] = lambda: None,
    ) -> Computed:
        """Encode what is not on disk, shard by shard, then write the index. ``encoder`` is called if it is needed.

        ``seen`` is called after every image. ValueError for more than ``most_unusable`` unusable images, or for no image.
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
                f"real_data.source {_joined(self.source)}: holds no image with a caption. {_named(unusable)}"
                f"{_tars_in(self.source)}"
            )
        self._save_index(rows, unusable)
        return Computed(len(rows), encoded, len({row["caption"] for row in rows}), tuple(unusable))

    def _images(self, size: tuple[int, int], waiting: dict[str, Tensor]) -> Iterator[dict[str, str] | Unusable]:
        """Rows of the index; the pixels of images that are not on disk go to ``waiting``."""
        for source in self.source:
            for found in captioned_images(Path(source)):
                yield found if isinstance(found, Unusable) else self._known(found, size, waiting)

    def _known(self, found: Captioned, size: tuple[int, int], waiting: dict[str, Tensor]) -> dict[str, str] | Unusable:
        digest = _key(found.content)
        if digest not in self._place and digest not in waiting:
            try:
                waiting[digest] = pixels(found.content, *size, found.name)
            except ValueError as error:
                return Unusable(found.name, str(error))
        return {"image": digest, "caption": found.caption, "name": found.name}

    def _write(self, waiting: dict[str, Tensor], encode: Encode) -> int:
        """One shard, whole or absent; empties ``waiting``."""
        from safetensors.torch import save_file

        images = list(waiting.values())
        parts = [
            encode(torch.stack(images[start : start + BATCH]).float() / 255) for start in range(0, len(images), BATCH)
        ]
        latents = torch.cat(parts).float().cpu().contiguous()
        if not latents.isfinite().all():
            raise ValueError(f"{self.what}: encodes images to numbers that are not finite; try model.dtype=fp32")
        file = shard_of(self.folder, list(waiting))
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"images": json.dumps(list(waiting)), **checksums({"latents": latents})}
        with replaced(file) as partial:
            save_file({"latents": latents}, partial, header)
            follow_umask(partial)
        count = len(waiting)
        waiting.clear()
        self._add(file)
        return count

    def _add(self, shard: Path) -> None:
        """Remember where the images of a shard are; only its header is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, "pt") as found:
                header = found.metadata()
                images = json.loads(header["images"])
                rows = found.get_slice("latents").get_shape()[0]
            if not isinstance(images, list) or len(images) != rows:
                raise ValueError("its header does not fit its latents")
            self._written.learn(shard, header, rows)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"latents {shard}: damaged ({error}); delete the file, and `gdmd latents` computes it again"
            ) from error
        self._place |= {str(image): (shard, row) for row, image in enumerate(images)}

    def _save_index(self, rows: Sequence[Mapping[str, str]], unusable: Sequence[Unusable]) -> None:
        passed = [{"name": found.name, "why": found.why} for found in unusable]
        state = [self._state(Path(source)) for source in self.source]
        content = {"source": self.source, "state": state, "decoding": DECODING, "images": rows, "unusable": passed}
        with replaced(self.folder / INDEX) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")

    def open(self) -> StoredLatents:
        """The finished store. ValueError with the command where it is missing, damaged or of other images."""
        index = self._index()
        if index is None:
            raise ValueError(f"real_data.latents {str(self.root)!r}: no finished latents of {self.what}; {AGAIN}")
        self._check_source(index)
        places = [(caption, self._place.get(image)) for image, caption in index.images]
        if lost := sum(place is None for _, place in places):
            raise ValueError(f"{self.folder}: the latents of {lost} images are missing; {AGAIN}")
        known = tuple((caption, place) for caption, place in places if place)
        return StoredLatents(known, self.folder, self._written)

    def fingerprint(self) -> str | None:
        """A hash of the images and captions, in their order; None where there are no finished latents."""
        index = self._index()
        return content_hash(*(part for row in index.images for part in row)) if index else None

    def _index(self) -> _Index | None:
        """index.json; None where there is none. ValueError for a damaged one."""
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
        """ValueError where the images, as far as they are there, are others now, or are decoded in another way."""
        there = [name for name in self.source if Path(name).exists()]
        now = {name: self._state(Path(name)) for name in there}
        if index.source != self.source and [now.get(name) for name in self.source] != list(index.states.values()):
            raise ValueError(
                f"real_data.latents {str(self.root)!r}: made of {_joined(index.source)}, but real_data.source is "
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
        _log.warning("%s. If the data set holds such images, %s where its files are", what, AGAIN)

    def _state(self, source: Path) -> str:
        """A hash of names, sizes and times of the files of a source: whether images or captions changed. None is read."""
        root = self.root.resolve()  # the latents may lie in the folder of the images
        files = [file for file in files_below(source) if not file.resolve().is_relative_to(root)]
        there = [(str(file.relative_to(source)), file.stat()) for file in (files if source.is_dir() else [source])]
        return content_hash(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in there))


@dataclass(frozen=True)
class _Index:
    """index.json. ``states``: by source; ``images``: (key, caption) of each; ``decoding``: see ``image_files``."""

    source: tuple[str, ...]
    states: Mapping[str, str]
    images: tuple[tuple[str, str], ...]
    decoding: int


class StoredLatents:
    """RealLatents from disk: an image of each prompt's caption, drawn from (seed, step, sample) alone."""

    def __init__(self, images: Sequence[tuple[str, tuple[Path, int]]], folder: Path, written: Verified) -> None:
        self.folder, self._written = folder, written
        self._of: dict[str, list[tuple[Path, int]]] = {}
        for caption, place in images:
            self._of.setdefault(caption, []).append(place)
        self.captions = tuple(caption for caption, _ in images)

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError that counts and shows the prompts without an image."""
        missing = [text for text in dict.fromkeys(prompts) if text not in self._of]
        if missing:
            shown = ", ".join(repr(text[:60]) for text in missing[:SHOWN])
            raise ValueError(
                f"prompts.file: {len(missing)} of {len(dict.fromkeys(prompts))} prompts have no image in real_data "
                f"({shown}{', ...' if len(missing) > SHOWN else ''}); leave prompts.file out to train on its captions"
            )

    def __call__(self, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """[B, C, H, W], fp32; all images of a caption are equally likely."""
        draws = rng.on_host().uniform("real_image").tolist()
        chosen = [self._of[text] for text in prompts.text]
        places = [own[int(draw * len(own))] for own, draw in zip(chosen, draws, strict=True)]
        return to_device_async(self._read(places), prompts.index.device)

    def _read(self, places: Sequence[tuple[Path, int]]) -> Tensor:
        rows: dict[tuple[Path, int], Tensor] = {}
        for shard in {file for file, _ in places}:
            with opened(shard, f"delete it where it is damaged, and {AGAIN}") as stored:
                latents = stored.get_slice("latents")
                rows |= {(file, row): latents[row : row + 1] for file, row in places if file == shard}
        for place, latents in rows.items():
            self._written.check(place, {"latents": latents})
        return torch.cat([rows[place] for place in places])


def _key(content: bytes) -> str:
    """What the latents of an image file belong to: its content, and how it is decoded where that has changed."""
    digest = hashlib.sha256(content).hexdigest()
    return digest if plain(content) else f"{digest}:{DECODING}"


def _refuse_many(unusable: Sequence[Unusable], most: int) -> None:
    if len(unusable) > most:
        raise ValueError(
            f"more than real_data.unreadable = {most} images cannot be used. {_named(unusable)}; mend or remove them, or "
            "raise the limit (finished latents stay)"
        )


def _named(unusable: Sequence[Unusable]) -> str:
    shown = "; ".join(f"{found.name!r} {found.why}" for found in unusable[-SHOWN:])
    return f"Of {len(unusable)}: {shown}" if unusable else "None was found"


def _tars_in(source: Sequence[str]) -> str:
    tars = [tar for folder in source if Path(folder).is_dir() for tar in sorted(Path(folder).glob("*.tar"))]
    return f". It holds .tar files: list them, as in real_data.source=[{tars[0]}, ...]" if tars else ""


def _joined(source: Sequence[str]) -> str:
    return ", ".join(map(repr, source))
