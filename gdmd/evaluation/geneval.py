"""What ``gdmd eval geneval`` does: prompts, images in the official layout, detections, scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.evaluation.geneval_prompts import draw_tasks
from gdmd.evaluation.geneval_scores import (
    Judged,
    Score,
    image_files,
    judge_recorded,
    judged,
    read_metadata,
    recording,
    summarize,
)
from gdmd.io import RunError, append_jsonl, content_hash, file_hash, read_jsonl, write_atomic
from gdmd.rewards.geneval.rules import DetectedObject, Task, as_row
from gdmd.sources.base import Source, image_slots, record_settings
from gdmd.sources.folders import image_file, read_image, write_image, write_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.rewards.geneval.colors import ColorClassifier
    from gdmd.rewards.geneval.detector import Detector

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


def generate_from(source: Source, tasks: Sequence[Task], folder: Path, images: int, seed: int) -> int:
    """``generate`` with a source. ValueError for prompts it cannot show, and for images of another source or seed."""
    source.check([task.prompt for task in tasks])
    record_settings(folder, source.info, seed, folder)
    later = [slot for slot in folder.glob("*") if slot.name.isdecimal() and int(slot.name) >= len(tasks)]
    if later:
        raise RunError(
            f"{folder} holds images of {len(later)} prompts beyond the {len(tasks)} of this metadata, and gdmd eval geneval "
            "score would count them; give an empty folder with --out, or delete them"
        )
    return generate(source_maker(source), tasks, folder, images, seed)


def generate(
    make: Maker, tasks: Sequence[Task], folder: Path, images: int, seed: int, watch: Callable[[int], None] | None = None
) -> int:
    """Make the images of every prompt in the official layout; prompts whose images are all there are skipped.

    The seed of a prompt is a hash of (seed, its number), so images depend neither on the batch nor on a restart.
    Returns how many images were made. RunError for a folder that holds other prompts.
    """
    made = 0
    for number, task in enumerate(tasks):
        write_metadata(folder, number, as_row(task))
        names = [image_file(folder, number, k) for k in range(images)]
        if not all(name.exists() for name in names):
            for name, image in zip(names, make(task.prompt, images, prompt_seed(seed, number)), strict=True):
                write_image(name, image)
            made += images
        if watch:
            watch(number + 1)
    return made


def prompt_seed(seed: int, number: int) -> int:
    """A seed below 2^48 for the prompt with this number."""
    return int.from_bytes(hashlib.sha256(f"geneval {seed} {number}".encode()).digest()[:6], "big")


def score_folder(
    folder: Path,
    detector: Detector,
    colors: ColorClassifier,
    watch: Callable[[int], None] | None = None,
    by: str = "",
) -> dict[str, Score]:
    """Detect what is not recorded yet in DIR/detections.jsonl, then judge it. Resumable.

    by: identity of detector and classifier. A line belongs to it, to the content of the image and to what its prompt
    asks; lines of anything else are removed.
    """
    files = list(image_files(folder))
    path = folder / DETECTIONS
    keys = [_key(by, prompt, number, file, task) for prompt, task, number, file in files]
    done = _recorded(path, set(keys))
    for count, (key, (prompt, task, number, file)) in enumerate(zip(keys, files, strict=True), 1):
        if key not in done:
            line = detect(file, prompt, number, task, detector, colors)
            append_jsonl(path, [line | {"key": key}], "the detections")
        if watch:
            watch(count)
    rows = judge_recorded(path, {prompt: task for prompt, task, _, _ in files})
    return write_scores(folder, rows, images_key(folder))


def images_key(folder: Path) -> str:
    """A hash of the prompts and images of a folder in the official layout: what its scores belong to."""
    files = sorted([*folder.glob("*/metadata.jsonl"), *folder.glob("*/samples/*.png")])
    return content_hash(*(part for file in files for part in (file.relative_to(folder).as_posix(), file_hash(file))))


def _key(by: str, prompt: int, number: int, file: Path, task: Task) -> str:
    return content_hash(by, f"{prompt} {number}", file_hash(file), json.dumps(as_row(task)))


def detect(
    file: Path, prompt: int, number: int, task: Task, detector: Detector, colors: ColorClassifier
) -> dict[str, Any]:
    """A line of detections.jsonl: every object of one image, and the colors that the rules ask for."""
    image = read_image(file)
    found = detector(image)
    known: dict[tuple[str, int], str] = {}

    def color_of(name: str, objects: Sequence[DetectedObject]) -> Sequence[str]:
        answer = colors.colors(image, name, objects, found.masks)
        known.update({(name, one.key): color for one, color in zip(objects, answer, strict=True)})
        return answer

    judged(prompt, number, task, found.objects, color_of)
    return recording(prompt, number, task, found.objects, known)


def score_recorded(detections: Path, metadata: Path, folder: Path | None = None) -> dict[str, Score]:
    """Apply the rules to recorded detections, without detector, classifier and images."""
    tasks = dict(enumerate(read_metadata(metadata)))
    rows = judge_recorded(detections, tasks)
    return write_scores(folder, rows) if folder else summarize(rows)


def write_scores(folder: Path, rows: Sequence[Judged], images: str | None = None) -> dict[str, Score]:
    """results.jsonl, one line per image, and geneval.json, the scores with intervals. images: ``images_key``."""
    scores = summarize(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS, "".join(json.dumps(row.json()) + "\n" for row in rows), "the results")
    summary = {"label": LABEL, "images": images, "scores": {name: asdict(score) for name, score in scores.items()}}
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2) + "\n", "the scores")
    return scores


def source_maker(source: Source) -> Maker:
    """Any source of images as a ``Maker``; its noise is that of image k of prompt 0 at the given seed."""

    def make(prompt: str, count: int, seed: int) -> list[Image]:
        slots, step = image_slots([prompt], count), source.info.batch
        return [image for k in range(0, count, step) for image in source.generate(slots[k : k + step], seed)]

    return make


def _recorded(path: Path, keys: Set[str]) -> set[str]:
    """Those of ``keys`` that have a line; all other lines, and one that a kill cut off, are removed from the file."""
    rows = read_jsonl(path, torn_tail=True) if path.exists() else []
    kept = {row["key"]: row for row in rows if isinstance(row.get("key"), str) and row["key"] in keys}
    if len(kept) < len(rows):
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept.values()), "the detections")
    return set(kept)
