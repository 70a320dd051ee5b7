"""From image folders to a study folder: draw the plan, re-encode the images under random names, write the links.

Re-encoding is part of the blinding: file names, PNG text chunks, EXIF, formats and file dates of the originals
would each tell the model.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pil

from gdmd.config.study import ADDRESS, StudyConfig
from gdmd.data.image_files import open_image
from gdmd.io import RunError, writing
from gdmd.study.design import Drawn, Image, draw_plan
from gdmd.study.folders import Row, common_rows
from gdmd.study.records import IMAGES, LINKS, PLAN, Plan

MAX_SIDE = 4096
"""Pixels; a larger image is refused (a decompression bomb, or slow on a phone)."""
BLOCKS = 8
"""A ruined copy is 8 x 8 blocks under strong noise: clearly worse than any image."""


@dataclass(frozen=True)
class Prepared:
    """The plan, and what the organizer should know before inviting anybody."""

    plan: Plan
    tokens: tuple[str, ...]
    votes_per_duel: int
    warnings: tuple[str, ...]


def check_new(study: Path) -> None:
    """RunError where ``study`` exists and is not empty: votes of an earlier plan are never overwritten."""
    if study.exists() and (not study.is_dir() or any(study.iterdir())):
        raise RunError(f"{study} exists and is not empty; a plan is never written over another: choose a new folder")


def prepare(
    cfg: StudyConfig, folders: Mapping[str, Path], study: Path, common: bool = False, address: str = ADDRESS
) -> Prepared:
    """Write the study folder; nothing is written before models, prompts and numbers are found right.

    address: where raters will reach the page; their links begin with it.
    """
    check_new(study)
    rows = common_rows(folders, cfg.images_per_prompt, common)
    prompts = [row[next(iter(folders))].prompt for row in rows]
    drawn = draw_plan(cfg, list(folders), prompts)
    sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in folders}
    whole = study.resolve()
    partial = whole.with_name(f".{whole.name}.partial")
    with writing("the study", study):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / IMAGES).mkdir(parents=True)
            _write_images(drawn, rows, partial / IMAGES, sizes)
            write_private(partial / LINKS, links_text(drawn.tokens, address))
            write_private(partial / PLAN, drawn.plan.model_dump_json(indent=1))
            partial.rename(whole)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    duels = len(folders) - 1 if cfg.against else math.comb(len(folders), 2)
    return Prepared(drawn.plan, drawn.tokens, cfg.raters * cfg.pairs_per_rater // duels, _warnings(sizes, cfg))


def _write_images(
    drawn: Drawn, rows: Sequence[Mapping[str, Row]], folder: Path, sizes: dict[str, set[tuple[int, int]]]
) -> None:
    for id_, image in sorted(drawn.images.items()):
        picture = _open(_file(rows, image))
        sizes[image[0]].add(picture.size)
        _save(picture, folder / f"{id_}.png")
    for number, (id_, image) in enumerate(sorted(drawn.ruined.items())):
        _save(ruin(_open(_file(rows, image)), drawn.plan.seed + number), folder / f"{id_}.png")


def _file(rows: Sequence[Mapping[str, Row]], image: Image) -> Path:
    model, prompt, index = image
    return rows[prompt][model].images[index]


def _open(path: Path) -> Pil.Image:
    try:
        picture = open_image(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read as an image: {error}; replace the file") from error
    if max(picture.size) > MAX_SIDE:
        raise RunError(f"{path} has {picture.width} x {picture.height} pixels, at most {MAX_SIDE} a side; shrink it")
    return picture


def ruin(picture: Pil.Image, seed: int) -> Pil.Image:
    """The image as 8 x 8 blocks under Gaussian noise of a quarter of the range."""
    small = picture.resize((BLOCKS, BLOCKS), Pil.Resampling.BOX).resize(picture.size, Pil.Resampling.NEAREST)
    noise = np.random.default_rng(seed).normal(0, 64, (picture.height, picture.width, 3))
    return Pil.fromarray((np.asarray(small, dtype=np.float64) + noise).clip(0, 255).astype(np.uint8), "RGB")


def _save(picture: Pil.Image, path: Path) -> None:
    """Pixels only: a new image has none of the original's metadata; the date is one for all."""
    Pil.fromarray(np.asarray(picture)).save(path, format="PNG")
    os.utime(path, (0, 0))


def links_text(tokens: Sequence[str], address: str) -> str:
    """The table of raters: number, token, and the whole link to send."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rater", "token", "link"])
    writer.writerows([number, token, link(address, token)] for number, token in enumerate(tokens))
    return text.getvalue()


def link(address: str, token: str) -> str:
    """What a rater opens: the token is in the fragment, which no browser sends."""
    return f"{address.rstrip('/')}/#token={token}"


def write_private(path: Path, text: str) -> None:
    """For the organizer's eyes: readable by the owner only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _warnings(sizes: Mapping[str, set[tuple[int, int]]], cfg: StudyConfig) -> tuple[str, ...]:
    found = []
    if len(set(map(frozenset, sizes.values()))) > 1:
        listed = "; ".join(f"{name}: {', '.join(f'{w}x{h}' for w, h in sorted(own))}" for name, own in sizes.items())
        found.append(f"the models' images differ in size, which tells them apart ({listed}); bring them to one size")
    said = f"{cfg.title} {cfg.consent}"
    longer = [name for name in sizes if len(name) > 1]  # "a" is a word, too
    told = [name for name in longer if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said, re.I)]
    if told:
        found.append(f"the title or the consent text holds the word '{told[0]}', which is a model's name; reword it")
    if cfg.votes_per_pair == 1:
        found.append("every pair is judged by one rater, so the agreement between raters cannot be measured")
    return tuple(found)
