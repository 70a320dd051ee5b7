"""What ``gdmd eval geneval`` does: prompts, images in the official layout, detections, scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.evaluation.geneval import (
    Judged,
    Score,
    image_files,
    judge_recorded,
    judged,
    read_metadata,
    recording,
    summarise,
)
from gdmd.evaluation.geneval_prompts import draw_tasks
from gdmd.evaluation.image_folders import read_image
from gdmd.io import RunError, write_atomic, writing
from gdmd.programs.sources import Source, places_of
from gdmd.rewards.geneval_rules import Found, Task, as_row

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.rewards.geneval_colors import ColorClassifier
    from gdmd.rewards.geneval_detector import Detector

DETECTIONS, RESULTS, SUMMARY = "detections.jsonl", "results.jsonl", "geneval.json"
LABEL = "GenEval (HF detector)"
"""What the numbers are called: the published ones come from mmdet's weights."""
Maker = Callable[[str, int, int], Sequence["Image"]]
"""(prompt, number of images, seed) -> images; image k depends on the prompt, the seed and k alone."""


def write_prompts(path: Path, per_task: int, seed: int, without: Path | None = None) -> int:
    """Draw prompts and write them in the official format; ``without``: metadata whose prompts are left out."""
    taken = {task.prompt for task in read_metadata(without)} if without else set()
    tasks = draw_tasks(per_task, seed, taken)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(as_row(task)) + "\n" for task in tasks), "the prompts")
    return len(tasks)


def generate(
    make: Maker, tasks: Sequence[Task], folder: Path, images: int, seed: int, watch: Callable[[int], None] | None = None
) -> int:
    """Make the images of every prompt in the official layout; prompts whose images are all there are skipped.

    The seed of a prompt is a hash of (seed, its number), so images depend neither on the batch nor on a restart.
    Returns how many images were made. RunError for a folder that holds other prompts.
    """
    made = 0
    for number, task in enumerate(tasks):
        place = folder / f"{number:05d}"
        samples = place / "samples"
        line = json.dumps(as_row(task)) + "\n"
        metadata = place / "metadata.jsonl"
        if metadata.exists() and metadata.read_text(encoding="utf-8") != line:
            raise RunError(f"{place} holds another prompt; give an empty folder with --out")
        names = [samples / f"{k:04d}.png" for k in range(images)]
        if not all(name.exists() for name in names):
            with writing("the images", samples):
                samples.mkdir(parents=True, exist_ok=True)
                metadata.write_text(line, encoding="utf-8")
                for name, image in zip(names, make(task.prompt, images, prompt_seed(seed, number)), strict=True):
                    partial = name.with_suffix(".partial")
                    image.save(partial, "PNG")
                    partial.replace(name)
            made += images
        if watch:
            watch(number + 1)
    return made


def prompt_seed(seed: int, number: int) -> int:
    """A seed below 2^48 for the prompt with this number."""
    return int.from_bytes(hashlib.sha256(f"geneval {seed} {number}".encode()).digest()[:6], "big")


def score_folder(
    folder: Path, detector: Detector, colors: ColorClassifier, watch: Callable[[int], None] | None = None
) -> dict[str, Score]:
    """Detect what is not recorded yet in DIR/detections.jsonl, then judge everything recorded. Resumable."""
    files = list(image_files(folder))
    path = folder / DETECTIONS
    done = _recorded(path)
    with writing("the detections", path), path.open("a", encoding="utf-8") as record:
        for count, (prompt, task, number, file) in enumerate(files, 1):
            if (prompt, number) not in done:
                line = detect(file, prompt, number, task, detector, colors)
                record.write(json.dumps(line) + "\n")
                record.flush()
            if watch:
                watch(count)
    wanted = {(prompt, number) for prompt, _, number, _ in files}
    rows = judge_recorded(path, {prompt: task for prompt, task, _, _ in files})
    return write_scores(folder, [row for row in rows if (row.prompt, row.image) in wanted])


def detect(
    file: Path, prompt: int, number: int, task: Task, detector: Detector, colors: ColorClassifier
) -> dict[str, Any]:
    """A line of detections.jsonl: every object of one image, and the colors that the rules ask for."""
    image = read_image(file)
    found = detector(image)
    known: dict[tuple[str, int], str] = {}

    def color_of(name: str, objects: Sequence[Found]) -> Sequence[str]:
        answer = colors.colors(image, name, objects, found.masks)
        known.update({(name, one.key): color for one, color in zip(objects, answer, strict=True)})
        return answer

    judged(prompt, number, task, found.objects, color_of)
    return recording(prompt, number, task, found.objects, known)


def score_recorded(detections: Path, metadata: Path, folder: Path | None = None) -> dict[str, Score]:
    """Apply the rules to recorded detections, without detector, classifier and images."""
    tasks = dict(enumerate(read_metadata(metadata)))
    rows = judge_recorded(detections, tasks)
    return write_scores(folder, rows) if folder else summarise(rows)


def write_scores(folder: Path, rows: Sequence[Judged]) -> dict[str, Score]:
    """results.jsonl, one line per image, and geneval.json, the scores with intervals."""
    scores = summarise(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS, "".join(json.dumps(row.json()) + "\n" for row in rows), "the results")
    summary = {"label": LABEL, "scores": {name: asdict(score) for name, score in scores.items()}}
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2) + "\n", "the scores")
    return scores


def source_maker(source: Source) -> Maker:
    """Any source of images as a ``Maker``; its noise is that of image k of prompt 0 at the given seed."""

    def make(prompt: str, count: int, seed: int) -> list[Image]:
        places, step = places_of([prompt], count), source.facts.batch
        return [image for k in range(0, count, step) for image in source.make(places[k : k + step], seed)]

    return make


def _recorded(path: Path) -> set[tuple[int, int]]:
    """(prompt, image) of the whole lines; a last line that a kill cut off is removed."""
    if not path.exists():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomic(path, whole, "the detections")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(row["prompt_number"], row["image"]) for row in rows}
