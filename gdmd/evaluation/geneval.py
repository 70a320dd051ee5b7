"""What ``gdmd eval geneval`` does: prompts, images in the official layout, detections, scores."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.config.describe import counted
from gdmd.evaluation.geneval_prompts import draw_tasks
from gdmd.evaluation.geneval_scores import (
    ImageResult,
    Score,
    detections_row,
    image_files,
    judge_detections,
    judge_image,
    read_metadata,
    summarize,
)
from gdmd.io import RunError, append_jsonl, content_hash, file_hash, finite_or_none, read_jsonl, write_atomic, writing
from gdmd.reporting.progress_bar import progress_bar
from gdmd.rewards.geneval.rules import DetectedObject, Task, as_row
from gdmd.sources.base import Source, image_slots, record_settings
from gdmd.sources.folders import FolderSource, image_file, read_image, write_image, write_metadata

if TYPE_CHECKING:
    from gdmd.rewards.geneval.colors import ColorClassifier
    from gdmd.rewards.geneval.detector import Detector

DETECTIONS, RESULTS, SUMMARY = "detections.jsonl", "results.jsonl", "geneval.json"
LABEL = "GenEval (HF detector)"
"""The name of the scores: the published ones use mmdet's detector."""


def write_prompts(path: Path, per_task: int, seed: int, without: Path | None = None) -> int:
    """Draw prompts and write them in the official format; return their number. without: metadata of excluded prompts."""
    tasks = draw_tasks(per_task, seed, read_metadata(without) if without else ())
    with writing("the prompts", path, option="--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(as_row(task)) + "\n" for task in tasks), "the prompts", option="--out")
    return len(tasks)


def generate(source: Source, tasks: Sequence[Task], folder: Path, images: int, seed: int) -> int:
    """Generate the images of every prompt in the official layout; return how many were missing.

    The seed of a prompt is a hash of (seed, its number), so that images depend neither on the batch nor on a restart.
    Those of a folder are copied. ValueError for prompts that the source cannot show; RunError if the folder holds other
    prompts, or images of another source or seed.
    """
    source.check([task.prompt for task in tasks])
    info = source.info
    if isinstance(source, FolderSource):
        info = replace(info, identity={**info.identity, "content": source.content()})
    record_settings(folder, info, seed, folder)
    later = [slot for slot in folder.glob("*") if slot.name.isdecimal() and int(slot.name) >= len(tasks)]
    if later:
        raise RunError(
            f"{folder} holds images of {counted(len(later), 'prompt')} beyond the {len(tasks)} of this metadata, and "
            "gdmd eval geneval score would count them; give an empty folder with --out, or delete them"
        )
    for number, task in enumerate(tasks):
        write_metadata(folder, number, as_row(task))
    files = [[image_file(folder, number, k) for k in range(images)] for number in range(len(tasks))]
    step, every = source.info.batch, image_slots([task.prompt for task in tasks], images)
    missing = [number for number, own in enumerate(files) if not all(file.exists() for file in own)]
    with progress_bar(
        f"{source.info.name}: generating images of {counted(len(missing), 'prompt')}", len(missing)
    ) as advance:
        for number in missing:
            own_seed = prompt_seed(seed, number)
            slots = [replace(slot, prompt=0) for slot in every[number * images : (number + 1) * images]]
            found = [one for k in range(0, images, step) for one in source.generate(slots[k : k + step], own_seed)]
            for file, image in zip(files[number], found, strict=True):
                write_image(file, image)
            advance(1)
    return len(missing) * images


def prompt_seed(seed: int, number: int) -> int:
    """A seed below 2^48 for the prompt with this number."""
    return int.from_bytes(hashlib.sha256(f"geneval {seed} {number}".encode()).digest()[:6], "big")


def score_folder(folder: Path, detector: Detector, colors: ColorClassifier, by: str = "") -> dict[str, Score]:
    """Detect what DIR/detections.jsonl does not hold yet, then judge it. Resumable.

    by: identity of detector and classifier. A line is reused for the same identity, image content and prompt
    requirements; other lines are removed.
    """
    files = list(image_files(folder))
    path = folder / DETECTIONS
    keys = [_key(by, prompt, number, file, task) for prompt, task, number, file in files]
    done = _recorded(path, set(keys))
    todo = [(key, one) for key, one in zip(keys, files, strict=True) if key not in done]
    with progress_bar(f"detecting objects in {counted(len(todo), 'image')}", len(todo)) as advance:
        for key, (prompt, task, number, file) in todo:
            row = detect(file, prompt, number, task, detector, colors)
            append_jsonl(path, [row | {"key": key}], "the detections")
            advance(1)
    results = judge_detections(path, {prompt: task for prompt, task, _, _ in files})
    return write_scores(folder, results, images_key(folder), by)


def images_key(folder: Path) -> str:
    """A hash of the prompts and images of a folder in the official layout, to which its scores belong."""
    files = sorted([*folder.glob("*/metadata.jsonl"), *folder.glob("*/samples/*.png")])
    return content_hash(*(part for file in files for part in (file.relative_to(folder).as_posix(), file_hash(file))))


def prompts_in(folder: Path) -> Counter[Task]:
    """How often a folder in the official layout has each prompt, with its requirements."""
    return Counter({number: task for number, task, _, _ in image_files(folder)}.values())


def _key(by: str, prompt: int, number: int, file: Path, task: Task) -> str:
    return content_hash(by, f"{prompt} {number}", file_hash(file), json.dumps(as_row(task)))


def detect(
    file: Path, prompt: int, number: int, task: Task, detector: Detector, colors: ColorClassifier
) -> dict[str, Any]:
    """A row of detections.jsonl: every object of one image, and the colors that the rules need."""
    image = read_image(file)
    found = detector(image)
    known: dict[tuple[str, int], str] = {}

    def color_of(name: str, objects: Sequence[DetectedObject]) -> Sequence[str]:
        answer = colors.colors(image, name, objects, found.masks)
        known.update({(name, one.key): color for one, color in zip(objects, answer, strict=True)})
        return answer

    judge_image(prompt, number, task, found.objects, color_of)
    return detections_row(prompt, number, task, found.objects, known)


def score_recorded(detections: Path, metadata: Path) -> dict[str, Score]:
    """Score recorded detections, without detector, classifier or images."""
    tasks = dict(enumerate(read_metadata(metadata)))
    return summarize(judge_detections(detections, tasks))


def write_scores(folder: Path, results: Sequence[ImageResult], images: str, by: str) -> dict[str, Score]:
    """results.jsonl, one line per image, and geneval.json, the scores with intervals and what they are from.

    images: ``images_key``; by: identity of detector and classifier.
    """
    scores = summarize(results)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RESULTS, "".join(json.dumps(row.json()) + "\n" for row in results), "the results")
    summary = {
        "label": LABEL,
        "images": images,
        "by": by,
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    write_atomic(folder / SUMMARY, json.dumps(finite_or_none(summary), indent=2) + "\n", "the scores")
    return scores


def _recorded(path: Path, keys: Set[str]) -> set[str]:
    """The ``keys`` that have a row; other rows and a truncated last line are removed from the file."""
    rows = read_jsonl(path, torn_tail=True) if path.exists() else []
    kept = {row["key"]: row for row in rows if isinstance(row.get("key"), str) and row["key"] in keys}
    if len(kept) < len(rows):
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept.values()), "the detections")
    return set(kept)
