"""From image folders to a study folder: draw the plan, re-encode the images under random names, write the links.

Re-encoding is part of the blinding: file names, PNG text chunks, EXIF, formats and file dates of the originals could
each reveal the model.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pil

from gdmd.config.study import ADDRESS, StudyConfig
from gdmd.io import RunError, writing
from gdmd.reporting.progress_bar import progress_bar
from gdmd.sources.folders import ImageRow, read_image
from gdmd.study.design import PlanWithKey, draw_plan
from gdmd.study.folders import common_rows
from gdmd.study.records import IMAGES, LINKS, PLAN, Plan, Prompt

MAX_SIDE = 4096
"""Pixels; larger images are rejected (decompression bombs, and slow on a phone)."""
BLOCKS = 8
"""A corrupted copy is 8 x 8 blocks under strong noise: clearly worse than any image."""


@dataclass(frozen=True)
class Prepared:
    """The plan, and what the admin should know before inviting raters."""

    plan: Plan
    tokens: tuple[str, ...]
    votes_per_model_pair: int
    warnings: tuple[str, ...]


def check_new(study: Path) -> None:
    """RunError if ``study`` exists and is not empty: votes of an earlier plan are never overwritten."""
    if study.exists() and (not study.is_dir() or any(study.iterdir())):
        raise RunError(f"{study} exists and is not empty; a plan is never written over another: choose a new folder")


def prepare(
    cfg: StudyConfig, folders: Mapping[str, Path], study: Path, common: bool = False, address: str = ADDRESS
) -> Prepared:
    """Write the study folder, after models, prompts and numbers have been checked.

    address: where raters will reach the page; their links begin with it.
    """
    check_new(study)
    rows = common_rows(folders, cfg.images_per_prompt, common)
    firsts = [row[next(iter(folders))] for row in rows]
    prompts = [Prompt(text=row.text, task=row.task) for row in firsts]
    draft = draw_plan(cfg, list(folders), prompts)
    sizes: dict[str, set[tuple[int, int]]] = {name: set() for name in folders}
    whole = study.resolve()
    partial = whole.with_name(f".{whole.name}.partial")
    with writing("the study", study):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / IMAGES).mkdir(parents=True)
            _write_images(draft, rows, partial / IMAGES, sizes)
            write_private(partial / LINKS, links_text(draft.tokens, address))
            write_private(partial / PLAN, draft.plan.model_dump_json(indent=1))
            partial.rename(whole)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    model_pairs = len(folders) - 1 if cfg.against else math.comb(len(folders), 2)
    warnings = (*_warnings(sizes, cfg), *_more_votes(draft.plan, cfg))
    return Prepared(draft.plan, draft.tokens, cfg.raters * cfg.pairs_per_rater // model_pairs, warnings)


def _write_images(
    draft: PlanWithKey, rows: Sequence[Mapping[str, ImageRow]], folder: Path, sizes: dict[str, set[tuple[int, int]]]
) -> None:
    def opened(model: str, prompt: int, index: int) -> Pil.Image:
        image = read_image(path := rows[prompt][model].images[index])
        if max(image.size) > MAX_SIDE:
            raise RunError(f"{path} has {image.width} x {image.height} pixels, at most {MAX_SIDE} a side; shrink it")
        return image

    with progress_bar("writing the images", len(draft.images) + len(draft.ruined)) as advance:
        for id_, (model, prompt, index) in sorted(draft.images.items()):
            image = opened(model, prompt, index)
            sizes[model].add(image.size)
            _save(image, folder / f"{id_}.png")
            advance(1)
        for number, (id_, place) in enumerate(sorted(draft.ruined.items())):
            _save(ruin(opened(*place), draft.plan.seed + number), folder / f"{id_}.png")
            advance(1)


def ruin(image: Pil.Image, seed: int) -> Pil.Image:
    """The image as 8 x 8 blocks under Gaussian noise of a quarter of the range."""
    small = image.resize((BLOCKS, BLOCKS), Pil.Resampling.BOX).resize(image.size, Pil.Resampling.NEAREST)
    noise = np.random.default_rng(seed).normal(0, 64, (image.height, image.width, 3))
    return Pil.fromarray((np.asarray(small, dtype=np.float64) + noise).clip(0, 255).astype(np.uint8), "RGB")


def _save(image: Pil.Image, path: Path) -> None:
    """Pixels only, without the original's metadata; every file gets the same date."""
    Pil.fromarray(np.asarray(image)).save(path, format="PNG")
    os.utime(path, (0, 0))


def links_text(tokens: Sequence[str], address: str) -> str:
    """The table of raters: number, token, and the link to send."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rater", "token", "link"])
    writer.writerows([number, token, link(address, token)] for number, token in enumerate(tokens))
    return text.getvalue()


def link(address: str, token: str) -> str:
    """What a rater opens. The token is in the fragment, which browsers do not send."""
    return f"{address.rstrip('/')}/#token={token}"


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _more_votes(plan: Plan, cfg: StudyConfig) -> tuple[str, ...]:
    """A warning if there are too few images for pairs with only ``votes_per_pair`` votes each."""
    votes = Counter(trial.pair for rater in plan.raters for trial in rater.trials if trial.kind == "pair")
    if (most := max(votes.values())) <= cfg.votes_per_pair + 1:
        return ()
    return (
        f"there are only {len(votes)} pairs of images, so each is judged by up to {most} raters instead of "
        f"{cfg.votes_per_pair}; for more different pairs give more prompts, or raise --images",
    )


def _warnings(sizes: Mapping[str, set[tuple[int, int]]], cfg: StudyConfig) -> tuple[str, ...]:
    found = []
    if len(set(map(frozenset, sizes.values()))) > 1:
        listed = "; ".join(f"{name}: {', '.join(f'{w}x{h}' for w, h in sorted(own))}" for name, own in sizes.items())
        found.append(f"the models' images differ in size, which tells them apart ({listed}); resize them to one size")
    shown = f"{cfg.title} {cfg.consent}"
    longer = [name for name in sizes if len(name) > 1]  # "a" is also a word
    named = [name for name in longer if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", shown, re.I)]
    if named:
        found.append(f"the title or the consent text contains '{named[0]}', which is a model's name; reword it")
    if cfg.votes_per_pair == 1:
        found.append("every pair is judged by one rater, so the agreement between raters cannot be measured")
    return tuple(found)
