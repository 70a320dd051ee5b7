"""What ``gdmd eval preference`` does: prompts -> images -> every scorer -> means with intervals. Resumable.

    DIR/images/00000/metadata.jsonl, samples/0000.png   the images, in GenEval's layout
    DIR/settings.json                                   what they were generated with
    DIR/scores.jsonl                                    {scorer, prompt, image, key, score}; null = not scored
    DIR/timing.jsonl                                    {images, seconds, first, batch, device}, a line per batch
    DIR/preference.json                                 the summary

A kill loses at most the current batch. An existing folder of images is scored in place.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdmd.config.describe import labels_of
from gdmd.config.run import RewardConfig
from gdmd.data.prompts import prompt_file, read_prompts
from gdmd.evaluation.scorers import may_fail, reads_metadata, scores_of
from gdmd.io import RunError, append_jsonl, content_hash, file_hash, finite_or_none, numbered_jsonl, write_atomic
from gdmd.recipes.long_prompts import warn_long_prompts_of_rewards
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.reporting.progress_bar import counted
from gdmd.reporting.statistics import Scores, clustered_mean, speed
from gdmd.sources.base import ImageSlot, Source, SourceInfo, image_slots, record_settings
from gdmd.sources.folders import FolderSource, image_file, read_image, write_image, write_metadata
from gdmd.types import Reward

SCORER_BATCH = 32
"""Images per call of a scorer; a kill loses at most these scores."""
SCORES, TIMING, SUMMARY = "scores.jsonl", "timing.jsonl", "preference.json"
_MISSING = object()
Log = Callable[[str], None]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of an evaluation, the number of images of each, and the seed of their noise.

    columns: names of the metadata of the whole file, which some prompts may lack.
    """

    file: str
    texts: tuple[str, ...]
    meta: tuple[Mapping[str, Any], ...]
    images: int
    seed: int
    note: str = ""
    columns: frozenset[str] = frozenset()

    @property
    def slots(self) -> list[ImageSlot]:
        return image_slots(self.texts, self.images)


@dataclass(frozen=True)
class GeneratedImages:
    """The images of a source: its description, their files, and seconds per image (None = not measured)."""

    info: SourceInfo
    files: Mapping[tuple[int, int], Path]
    seconds: float | None


def read_prompt_set(
    given: str | Path, images: int, seed: int, limit: int | None = None, column: str | None = None
) -> PromptSet:
    """The first ``limit`` prompts of a file or a shipped set, each with its metadata."""
    found = read_prompts(given, column)
    meta = found.meta or tuple({"prompt": text} for text in found.texts)
    columns = frozenset(name for row in meta for name in row)
    name = prompt_file(str(given)).name
    return PromptSet(name, found.texts[:limit], meta[:limit], images, seed, found.note(), columns)


def generate_images(
    source: Source, prompt_set: PromptSet, folder: Path, shard: tuple[int, int] = (0, 1)
) -> GeneratedImages:
    """Generate the missing images. shard (k, n): only prompts k, k + n, ...; the images do not depend on it."""
    source.check(prompt_set.texts)
    if isinstance(source, FolderSource):
        files = {(p.prompt, p.image): source.file(p) for p in prompt_set.slots}
        record_settings(folder, source.info, prompt_set.seed, folder)
        return GeneratedImages(source.info, files, None)
    home = folder / "images"
    record_settings(folder, source.info, prompt_set.seed, home)
    own = [slot for slot in prompt_set.slots if slot.prompt % shard[1] == shard[0]]
    for prompt in dict.fromkeys(slot.prompt for slot in own):
        write_metadata(home, prompt, prompt_set.meta[prompt])
    missing = [slot for slot in own if not image_file(home, slot.prompt, slot.image).exists()]
    batch, device = source.info.batch, source.info.device
    what = f"{source.info.name}: generating {len(missing):,} image{'s' * (len(missing) != 1)}"
    for part in counted(_parts(missing, batch), what, len(missing)):
        began = time.perf_counter()
        images = source.generate(part, prompt_set.seed)
        seconds, first = time.perf_counter() - began, int(part[0] is missing[0])
        for slot, image in zip(part, images, strict=True):
            write_image(image_file(home, slot.prompt, slot.image), image)
        row = {"images": len(part), "seconds": seconds, "first": first, "batch": batch, "device": device}
        append_jsonl(folder / TIMING, [row], "the times", option="--out")
    files = {(p.prompt, p.image): image_file(home, p.prompt, p.image) for p in prompt_set.slots}
    return GeneratedImages(source.info, files, speed(_rows(folder / TIMING, _TIMING_KEYS)))


def score(
    generated: GeneratedImages,
    prompt_set: PromptSet,
    folder: Path,
    specs: Sequence[RewardConfig],
    rewards: Mapping[str, Reward],
    log: Log,
) -> dict[str, Scores]:
    """Score the images that a scorer has not scored yet. Scores by label and (prompt, image).

    Prompts of the same text are one prompt with more images, because intervals resample whole prompts. A stored score
    is reused for the same image content, prompt (with its metadata if the scorer reads it) and scorer.
    """
    known = _known_scores(folder / SCORES)
    images = {slot: file_hash(generated.files[slot.prompt, slot.image]) for slot in prompt_set.slots}
    first = {text: k for k, text in reversed(list(enumerate(prompt_set.texts)))}
    places = {slot: (first[slot.text], slot.occurrence * prompt_set.images + slot.image) for slot in prompt_set.slots}
    read = [dict.fromkeys(prompt_set.columns) | dict(row) for row in prompt_set.meta]  # None where a prompt lacks one
    found: dict[str, Scores] = {}
    for spec, (label, reward) in zip(specs, rewards.items(), strict=True):
        scorer, reads = scorer_identity(spec), reads_metadata(spec)
        keys = {
            slot: _score_key(scorer, images[slot], slot.text, read[slot.prompt] if reads else None)
            for slot in prompt_set.slots
        }
        retry = may_fail(spec)
        todo = [p for p in prompt_set.slots if keys[p] not in known or (retry and math.isnan(known[keys[p]]))]
        if todo:
            warn_long_prompts_of_rewards([reward], prompt_set.texts)
        for part in counted(_parts(todo, SCORER_BATCH), f"{generated.info.name}: scoring with {label}", len(todo)):
            pixels = [read_image(generated.files[slot.prompt, slot.image]) for slot in part]
            meta = [prompt_set.meta[slot.prompt] for slot in part]
            values = scores_of(reward, pixels, [slot.text for slot in part], meta, prompt_set.columns)
            own = {keys[slot]: value for slot, value in zip(part, values, strict=True)}
            rows = [{"scorer": label, "prompt": p.prompt, "image": p.image, "key": keys[p]} for p in part]
            scored = [row | {"score": own[row["key"]]} for row in rows]
            append_jsonl(folder / SCORES, scored, "the scores", option="--out")
            known |= own
        if todo:
            scored_now = sum(not math.isnan(known[keys[slot]]) for slot in todo)
            of = "" if scored_now == len(todo) else f" of {len(todo)}"
            log(f"{generated.info.name}: {label} scored {scored_now}{of} images")
        found[label] = {place: known[keys[slot]] for slot, place in places.items()}
        if all(math.isnan(value) for value in found[label].values()):
            log(f"warning: {label} scored no image of {generated.info.name}, so it has no mean")
    return found


def summary(
    generated: GeneratedImages, prompt_set: PromptSet, scores: Mapping[str, Scores], specs: Sequence[RewardConfig]
) -> dict[str, Any]:
    """Plain data: the source and, per scorer, mean, interval and whether it was trained on (null = unknown).

    size: the chosen one of a run with several image sizes; null = the default.
    """
    trained = generated.info.trained
    return {
        "source": generated.info.json(),
        "weights": generated.info.identity.get("weights"),
        "size": generated.info.identity.get("size"),
        "prompt_file": prompt_set.file,
        "prompts": len(prompt_set.texts),
        "images_per_prompt": prompt_set.images,
        "seed": prompt_set.seed,
        "seconds_per_image": generated.seconds,
        "scores": {
            spec.label: finite_or_none(
                asdict(clustered_mean(scores[spec.label])) | {"trained": _trained(spec, trained)}
            )
            for spec in specs
        },
    }


def _trained(spec: RewardConfig, trained: Sequence[str] | None) -> bool | None:
    """Whether a scorer was trained on: itself, a part of it or, for a remote one, the reward that it serves."""
    return None if trained is None else any(label in trained for label in labels_of(spec))


def write_summary(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write DIR/preference.json; returns its path."""
    write_atomic(folder / SUMMARY, json.dumps(content, indent=2) + "\n", "the scores")
    return folder / SUMMARY


def _parts(slots: Sequence[ImageSlot], size: int) -> Iterator[Sequence[ImageSlot]]:
    return (slots[start : start + size] for start in range(0, len(slots), size))


def _score_key(scorer: str, image: str, text: str, meta: Mapping[str, Any] | None) -> str:
    """What a score depends on. scorer, image: their hashes; meta: the metadata that the scorer reads."""
    return content_hash(scorer, image, text, json.dumps(meta, sort_keys=True))


def _known_scores(path: Path) -> dict[str, float]:
    """Scores by key, NaN = not scored."""
    rows = _rows(path, _SCORE_KEYS)
    return {row["key"]: math.nan if row["score"] is None else float(row["score"]) for row in rows}


_Number = (int, float)
_SCORE_KEYS: Mapping[str, Any] = {
    "key": str,
    "scorer": str,
    "prompt": int,
    "image": int,
    "score": (*_Number, type(None)),
}
_TIMING_KEYS: Mapping[str, Any] = {"images": int, "seconds": _Number, "first": int}


def _rows(path: Path, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that gdmd appends to. keys: name -> type. RunError for a damaged line."""
    numbered = numbered_jsonl(path, torn_tail=True) if path.exists() else []
    for number, row in numbered:
        if not all(isinstance(row.get(key, _MISSING), kind) for key, kind in keys.items()):
            raise RunError(f"{path}, line {number} is damaged; delete the file, and its numbers are computed again")
    return [row for _, row in numbered]
