"""Measures of finished images beyond scorers: ShapesEval for the Shapes world, distances in a feature space."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.evaluation.geneval import images_key, prompts_in
from gdmd.evaluation.preference import GeneratedImages, PromptSet
from gdmd.evaluation.scorers import Features
from gdmd.evaluation.verdict import PER_IMAGE, per_image
from gdmd.reporting.distances import cluster_spread, frechet_distance, mmd, pairwise_distance
from gdmd.rewards.preprocessing import from_pil, to_pil
from gdmd.shapes.check import shapeseval, summarize
from gdmd.shapes.detect import detect
from gdmd.shapes.evaluate import bootstrap_interval
from gdmd.shapes.grammar import TASKS, catalog
from gdmd.shapes.measures import coverage, fidelity
from gdmd.shapes.render import draw_scenes, render
from gdmd.sources.folders import images_in, read_image

_BATCH = 64
GENEVAL = "geneval.json"
"""Written into an image folder by ``gdmd eval geneval score``."""


def shapes_measures(generated: GeneratedImages, prompt_set: PromptSet) -> dict[str, Any]:
    """ShapesEval by task with an interval and the correctness of every image, fidelity and coverage; on 8-bit images."""
    rows = rows_of(prompt_set)
    images = from_pil([read_image(generated.files[p.prompt, p.image]) for p in prompt_set.slots])
    found = detect(images)
    correct = shapeseval(found, rows)
    task, texts = catalog().task[rows], [slot.text for slot in prompt_set.slots]
    return {
        "shapeseval": summarize(correct, task),
        "shapeseval_interval": list(bootstrap_interval(correct, task, texts, prompt_set.seed)),
        PER_IMAGE: per_image(
            correct.tolist(),
            [TASKS[k] for k in task[:: prompt_set.images].tolist()],
            prompt_set.texts,
            prompt_set.images,
            prompt_set.file,
            prompt_set.seed,
        ),
        "fidelity": float(fidelity(images, found).mean()),
        "coverage": coverage(found, rows, correct),
    }


def right_images(files: Sequence[Path], captions: Sequence[str]) -> list[bool]:
    """Whether each image shows what its caption asks for, by the checker."""
    rows = torch.tensor([catalog().row(text) for text in captions])
    found: list[bool] = shapeseval(from_pil([read_image(file) for file in files]), rows).tolist()
    return found


def rows_of(prompt_set: PromptSet) -> Tensor:
    """The catalog row of every image. ValueError for a prompt that is not a Shapes caption."""
    return torch.tensor([catalog().row(slot.text) for slot in prompt_set.slots])


def feature_measures(
    generated: GeneratedImages, prompt_set: PromptSet, make: Features, name: str, reference: Tensor | None
) -> dict[str, Any]:
    """Diversity and spread within prompts, and distances to the reference's features if there are any.

    None: not measurable, for example the diversity of one image per prompt.
    """
    own = features_of(make, [generated.files[p.prompt, p.image] for p in prompt_set.slots])
    prompt = torch.tensor([slot.prompt for slot in prompt_set.slots])
    several = prompt_set.images > 1
    compared = reference is not None and len(own) > 1
    return {
        "features": name,
        "diversity": pairwise_distance(own, prompt) if several else None,
        "spread": cluster_spread(own, prompt) if several else None,
        "frechet": frechet_distance(own, reference) if compared and reference is not None else None,
        "mmd": mmd(own, reference) if compared and reference is not None else None,
        "reference_images": len(reference) if reference is not None else None,
    }


def features_of(make: Features, files: Sequence[Path]) -> Tensor:
    """[N, D], in batches."""
    return torch.cat([make([read_image(f) for f in files[k : k + _BATCH]]) for k in range(0, len(files), _BATCH)])


def reference_files(folder: Path) -> list[Path]:
    """Every image below a folder, in any layout. ValueError below two images."""
    files = images_in(folder.rglob("*")) if folder.is_dir() else []
    if len(files) < 2:
        raise ValueError(f"--reference {folder}: a distance needs a folder with two images or more, got {len(files)}")
    return files


def render_features(make: Features, prompt_set: PromptSet) -> Tensor:
    """Features of true renders of the same captions, one per image: the reference in the Shapes world."""
    images = to_pil(render(draw_scenes(rows_of(prompt_set), torch.Generator().manual_seed(prompt_set.seed))))
    return torch.cat([make(images[k : k + _BATCH]) for k in range(0, len(images), _BATCH)])


def geneval_scores(folders: Sequence[Path], log: Callable[[str], None]) -> list[Mapping[str, Any] | None]:
    """The GenEval scores stored next to the images of each folder, if any.

    Scores of other images, or by another detector or of other prompts than those before, are ignored, as ``log`` says.
    """
    found: list[Mapping[str, Any] | None] = []
    first: tuple[Path, Any] | None = None
    for folder in folders:
        file = folder / GENEVAL
        stored = _stored_geneval(file) if file.is_file() else None
        if stored is not None and (reason := _unusable(stored, folder, first)):
            log(f"{file} {reason}")
            stored = None
        if stored is not None and first is None:
            first = folder, stored["by"]
        found.append(stored["scores"] if stored else None)
    return found


def _unusable(stored: Mapping[str, Any], folder: Path, first: tuple[Path, Any] | None) -> str:
    """Why the scores of a folder are ignored; "" if they are not. first: the folder before it, and its detector."""
    if stored["images"] != images_key(folder):
        return "holds scores of other images, so they are ignored; run gdmd eval geneval score again"
    if first is None:
        return ""
    before, by = first
    if stored["by"] is None or stored["by"] != by:
        return (
            f"was scored by another detector, classifier or version of gdmd than {before / GENEVAL}, so it is ignored; run "
            "gdmd eval geneval score again"
        )
    if prompts_in(folder) != prompts_in(before):
        return (
            f"holds scores of other prompts than {before / GENEVAL}, so it is ignored; for a comparison generate and score "
            "images of the same prompts"
        )
    return ""


def _stored_geneval(file: Path) -> dict[str, Any]:
    """scores, and what they are from: images, by. ValueError for a damaged file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            task: {"value": float(one["value"]), **{end: _end(one[end]) for end in ("low", "high")}}
            for task, one in found["scores"].items()
        }
        return {"scores": scores, "images": found.get("images"), "by": found.get("by")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); score the folder again with gdmd eval geneval score") from error


def _end(value: Any) -> float | None:
    """An end of an interval; None where it is not known."""
    return None if value is None else float(value)
