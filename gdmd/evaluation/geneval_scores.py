"""GenEval (arXiv 2310.11513): metadata and image folders in the official layout, recorded detections, scores with intervals.

    DIR/00000/metadata.jsonl       one line of evaluation_metadata.jsonl
    DIR/00000/samples/0000.png     its images

The score of a task is the mean over its images; overall is the unweighted mean of the tasks. The 95 % intervals resample
whole prompts within each task, since images of one prompt are not independent. A detections.jsonl holds, per image, every
object above 0.3 with its confidence and, if the prompt needs it, its color, so that the rules can be applied again without
the detector.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdmd.io import numbered_jsonl
from gdmd.reporting.statistics import REPLICATES, Floats, bootstrap_means, percentile_interval
from gdmd.rewards.geneval.rules import COLORS, TASKS, ColorOf, DetectedObject, Task, judge, partial_credit, read_task
from gdmd.sources.folders import images_in


@dataclass(frozen=True)
class ImageResult:
    """The judgement of one image: whether it is correct, why not, and its partial credit. prompt: its number."""

    prompt: int
    image: int
    task: Task
    correct: bool
    reasons: tuple[str, ...]
    credit: float

    def json(self) -> dict[str, Any]:
        """A line of results.jsonl."""
        return {
            "prompt_number": self.prompt, "image": self.image, "tag": self.task.tag, "prompt": self.task.prompt,
            "correct": self.correct, "reason": "; ".join(self.reasons), "partial_credit": self.credit,
        }  # fmt: skip


@dataclass(frozen=True)
class Score:
    """A share of correct images with its 95 % interval over prompts; NaN where a task has one prompt.

    fewest: images of the prompt with the fewest.
    """

    value: float
    low: float
    high: float
    images: int
    prompts: int
    fewest: int


def read_metadata(path: Path) -> tuple[Task, ...]:
    """The lines of an evaluation_metadata.jsonl. ValueError names the line that is not GenEval's."""
    rows = numbered_jsonl(path)
    if not rows:
        raise ValueError(f"{path}: the file is empty; it needs at least one line")
    return tuple(read_task(row, f"{path}, line {number}") for number, row in rows)


def image_files(folder: Path) -> Iterator[tuple[int, Task, int, Path]]:
    """(prompt number, task, image number, file) of every image in a folder of the official layout, in order.

    ValueError for a folder without any, and for a prompt folder without metadata or images.
    """
    numbered = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    if not numbered:
        raise ValueError(f"{folder} has no prompt folders 00000, 00001, ...; give a folder in GenEval's layout")
    for one in numbered:
        found = read_metadata(one / "metadata.jsonl")
        if len(found) != 1:
            raise ValueError(
                f"{one / 'metadata.jsonl'}: {len(found)} lines; one prompt folder has one line of metadata"
            )
        samples = one / "samples"
        images = images_in(samples.iterdir()) if samples.is_dir() else []
        names = [path for path in images if re.fullmatch(r"\d+\.png", path.name)]
        if other := [path for path in images if path.stem.isdecimal() and path not in names]:
            raise ValueError(f"{other[0]}: GenEval's layout has PNG files 0000.png, 0001.png, ...; convert the image")
        if not names:
            raise ValueError(f"{samples} holds no images 0000.png, ...; generate them first")
        for path in names:
            yield int(one.name), found[0], int(path.stem), path


def judge_image(
    prompt: int, image: int, task: Task, found: Mapping[str, Sequence[DetectedObject]], color_of: ColorOf
) -> ImageResult:
    """Metric and partial credit of one image."""
    verdict = judge(task, found, color_of)
    return ImageResult(prompt, image, task, verdict.correct, verdict.reasons, partial_credit(task, found, color_of))


def detections_row(
    prompt: int,
    image: int,
    task: Task,
    found: Mapping[str, Sequence[DetectedObject]],
    colors: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
    """A row of detections.jsonl; colors by (class, key)."""
    objects = {
        name: [
            {"box": list(one.box), "confidence": one.confidence, "color": colors.get((name, one.key))}
            for one in ones
        ]
        for name, ones in found.items()
    }  # fmt: skip
    return {"prompt_number": prompt, "image": image, "tag": task.tag, "prompt": task.prompt, "objects": objects}


def judge_detections(path: Path, tasks: Mapping[int, Task]) -> list[ImageResult]:
    """Apply the rules to a detections.jsonl. tasks: by prompt number.

    ValueError names a bad line, and one that was recorded for another prompt.
    """
    rows = []
    for number, row in numbered_jsonl(path, torn_tail=True):
        where = f"{path}, line {number}"
        try:
            prompt, image = int(row["prompt_number"]), int(row["image"])
            found, colors = _objects(row["objects"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: not a recorded detection ({error}); expected prompt_number, image and objects by class"
            ) from error
        if prompt not in tasks:
            raise ValueError(f"{where}: prompt {prompt} is not among the {len(tasks)} prompts; give its metadata")
        if row.get("prompt", tasks[prompt].prompt) != tasks[prompt].prompt:
            raise ValueError(
                f"{where}: recorded for {str(row['prompt'])[:60]!r}, but prompt {prompt} of the metadata is "
                f"{tasks[prompt].prompt[:60]!r}; give the metadata that the images were generated from"
            )
        rows.append(judge_image(prompt, image, tasks[prompt], found, recorded_colors(colors, where)))
    return rows


def recorded_colors(colors: Mapping[tuple[str, int], str | None], where: str) -> ColorOf:
    """A classifier that looks up recorded colors. ValueError for a color that was not recorded."""

    def color_of(name: str, objects: Sequence[DetectedObject]) -> list[str]:
        known = [colors.get((name, one.key)) for one in objects]
        if None in known:
            raise ValueError(f"{where}: the color of a {name} is needed but was not recorded; detect it again")
        return [str(color) for color in known]

    return color_of


def summarize(rows: Sequence[ImageResult]) -> dict[str, Score]:
    """Scores by task and "overall". ValueError without rows, or if an image was judged twice."""
    if not rows:
        raise ValueError("there are no judged images; score at least one")
    places = [(row.prompt, row.image) for row in rows]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"image {twice[1]} of prompt {twice[0]} was judged twice; each image counts once")
    rng = np.random.default_rng(0)
    scores: dict[str, Score] = {}
    drawn: list[Floats] = []
    for tag in TASKS:
        own = [row for row in rows if row.task.tag == tag]
        if not own:
            continue
        right, prompts = [float(row.correct) for row in own], [row.prompt for row in own]
        drawn.append(bootstrap_means(right, prompts, REPLICATES, rng))
        scores[tag] = _score(sum(right) / len(right), drawn[-1], own)
    mean = sum(score.value for score in scores.values()) / len(scores)
    return {"overall": _score(mean, np.mean(drawn, 0), rows), **scores}


def _score(value: float, replicates: Floats, rows: Sequence[ImageResult]) -> Score:
    images = Counter(row.prompt for row in rows)
    return Score(value, *percentile_interval(replicates), len(rows), len(images), min(images.values()))


def _objects(rows: Any) -> tuple[dict[str, list[DetectedObject]], dict[tuple[str, int], str | None]]:
    found: dict[str, list[DetectedObject]] = {}
    colors: dict[tuple[str, int], str | None] = {}
    for name, ones in rows.items():
        for key, one in enumerate(ones):
            x0, y0, x1, y1 = map(float, one["box"])
            color = one.get("color")
            if color is not None and color not in COLORS:
                raise ValueError(f"color {color!r} is none of {', '.join(COLORS)}")
            found.setdefault(name, []).append(DetectedObject((x0, y0, x1, y1), float(one["confidence"]), key))
            colors[name, key] = color
    return found, colors
