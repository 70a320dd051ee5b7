"""What ``gdmd eval preference`` does: prompts -> images -> every scorer -> means with intervals. Resumable.

    DIR/images/00000/metadata.jsonl, samples/0000.png   the images, in GenEval's layout
    DIR/settings.json                                   what they were made with
    DIR/scores.jsonl                                    {scorer, prompt, image, key, score}; null = not scored
    DIR/timing.jsonl                                    {images, seconds, first, batch, device}: batches
    DIR/preference.json                                 the summary

A kill loses at most the batch in work. A folder of images that exists already is scored where it lies.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdmd.config.run import RewardConfig
from gdmd.data.prompts import read_prompts
from gdmd.evaluation.scorers import may_fail, reads_metadata, scores_of
from gdmd.io import RunError, append_jsonl, content_hash, file_hash, finite_or_none, numbered_jsonl, write_atomic
from gdmd.recipes.long_prompts import warn_long_prompts_of_rewards
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.reporting.statistics import Scores, clustered_mean, speed
from gdmd.sources.base import Facts, Place, Source, places_of, settle
from gdmd.sources.folders import FolderSource, image_file, read_image, write_image, write_metadata
from gdmd.types import Reward

SCORED = 32
"""Images per call of a scorer: what a kill loses of its work."""
SCORES, TIMING, SUMMARY = "scores.jsonl", "timing.jsonl", "preference.json"
_MISSING = object()
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """The prompts of an evaluation and how many images of each, from which noise."""

    file: str
    texts: tuple[str, ...]
    meta: tuple[Mapping[str, Any], ...]
    images: int
    seed: int
    note: str = ""

    @property
    def places(self) -> list[Place]:
        return places_of(self.texts, self.images)


@dataclass(frozen=True)
class Produced:
    """The images of a source: its facts, where they lie, and seconds per image (None = not measured)."""

    facts: Facts
    files: Mapping[tuple[int, int], Path]
    seconds: float | None


def asked_of(given: str | Path, images: int, seed: int, limit: int | None = None, column: str | None = None) -> Asked:
    """The first ``limit`` prompts of a file or a shipped set, each with its row."""
    found = read_prompts(given, column)
    meta = found.meta or tuple({"prompt": text} for text in found.texts)
    return Asked(found.path.name, found.texts[:limit], meta[:limit], images, seed, found.note())


def produce(source: Source, asked: Asked, folder: Path, say: Say, shard: tuple[int, int] = (0, 1)) -> Produced:
    """Make the images that are missing. shard (k, n): only prompts k, k + n, ...; the images do not depend on it."""
    source.check(asked.texts)
    if isinstance(source, FolderSource):
        files = {(p.prompt, p.image): source.file(p) for p in asked.places}
        settle(folder, source.facts, asked.seed, folder)
        return Produced(source.facts, files, None)
    home = folder / "images"
    settle(folder, source.facts, asked.seed, home)
    own = [place for place in asked.places if place.prompt % shard[1] == shard[0]]
    for prompt in dict.fromkeys(place.prompt for place in own):
        write_metadata(home, prompt, asked.meta[prompt])
    missing = [place for place in own if not image_file(home, place.prompt, place.image).exists()]
    batch, device = source.facts.batch, source.facts.device
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        began = time.perf_counter()
        made = source.make(part, asked.seed)
        seconds = time.perf_counter() - began
        for place, image in zip(part, made, strict=True):
            write_image(image_file(home, place.prompt, place.image), image)
        timed = {"images": len(part), "seconds": seconds, "first": int(start == 0), "batch": batch, "device": device}
        append_jsonl(folder / TIMING, [timed], "the times", option="--out")
        say(f"{source.facts.name}: {start + len(part)} of {len(missing)} images made")
    files = {(p.prompt, p.image): image_file(home, p.prompt, p.image) for p in asked.places}
    return Produced(source.facts, files, speed(_rows(folder / TIMING, _TIMING_KEYS)))


def score(
    produced: Produced,
    asked: Asked,
    folder: Path,
    specs: Sequence[RewardConfig],
    rewards: Mapping[str, Reward],
    say: Say,
) -> dict[str, Scores]:
    """Ask every scorer about the images it has not seen yet. Scores by label and place.

    A score belongs to the content of the image, the prompt (with its metadata where the scorer reads it) and the
    scorer's identity.
    """
    known = _known_scores(folder / SCORES)
    images = {place: file_hash(produced.files[place.prompt, place.image]) for place in asked.places}
    found: dict[str, Scores] = {}
    for spec, (label, reward) in zip(specs, rewards.items(), strict=True):
        scorer, reads = scorer_identity(spec), reads_metadata(spec)
        keys = {
            place: _score_key(scorer, images[place], place.text, asked.meta[place.prompt] if reads else None)
            for place in asked.places
        }
        again = may_fail(spec)
        todo = [p for p in asked.places if keys[p] not in known or (again and math.isnan(known[keys[p]]))]
        if todo:
            warn_long_prompts_of_rewards([reward], asked.texts)
        for part in _parts(todo):
            pixels = [read_image(produced.files[place.prompt, place.image]) for place in part]
            meta = [asked.meta[place.prompt] for place in part]
            values = scores_of(reward, pixels, [place.text for place in part], meta)
            own = {keys[place]: value for place, value in zip(part, values, strict=True)}
            rows = [{"scorer": label, "prompt": p.prompt, "image": p.image, "key": keys[p]} for p in part]
            scored = [row | {"score": own[row["key"]]} for row in rows]
            append_jsonl(folder / SCORES, scored, "the scores", option="--out")
            known |= own
        if todo:
            scored_now = sum(not math.isnan(known[keys[place]]) for place in todo)
            of = "" if scored_now == len(todo) else f" of {len(todo)}"
            say(f"{produced.facts.name}: {label} scored {scored_now}{of} images")
        found[label] = {(place.prompt, place.image): known[keys[place]] for place in asked.places}
        if all(math.isnan(value) for value in found[label].values()):
            say(f"warning: {label} left every image of {produced.facts.name} without a score, so it has no mean")
    return found


def summary(produced: Produced, asked: Asked, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The public form: the source and, per scorer, mean, interval and whether it was trained on (null = not known)."""
    trained = produced.facts.trained
    return {
        "source": produced.facts.json(),
        "weights": produced.facts.identity.get("weights"),
        "prompt_file": asked.file,
        "prompts": len(asked.texts),
        "images_per_prompt": asked.images,
        "seed": asked.seed,
        "seconds_per_image": produced.seconds,
        "scores": {
            label: finite_or_none(asdict(clustered_mean(own)) | {"trained": _trained(label, trained)})
            for label, own in scores.items()
        },
    }


def _trained(label: str, trained: Sequence[str] | None) -> bool | None:
    """A remote scorer is the reward that it names."""
    return None if trained is None else label in trained or label.removeprefix("remote ") in trained


def write_summary(folder: Path, content: Mapping[str, Any]) -> Path:
    """DIR/preference.json"""
    write_atomic(folder / SUMMARY, json.dumps(content, indent=2) + "\n", "the scores")
    return folder / SUMMARY


def _parts(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    for start in range(0, len(places), SCORED):
        yield places[start : start + SCORED]


def _score_key(scorer: str, image: str, text: str, meta: Mapping[str, Any] | None) -> str:
    """What a score depends on. scorer, image: their hashes; meta: what the scorer reads of it."""
    return content_hash(scorer, image, text, json.dumps(meta, sort_keys=True))


def _known_scores(path: Path) -> dict[str, float]:
    """Scores by their key, NaN = not scored. Lines of older versions have no key and are left out."""
    rows = _rows(path, _SCORE_KEYS)
    return {row["key"]: math.nan if row["score"] is None else float(row["score"]) for row in rows if "key" in row}


_Number = (int, float)
_SCORE_KEYS: Mapping[str, Any] = {"scorer": str, "prompt": int, "image": int, "score": (*_Number, type(None))}
_TIMING_KEYS: Mapping[str, Any] = {"images": int, "seconds": _Number, "first": int}


def _rows(path: Path, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows {key: type} of a file that gdmd appends to. RunError that names a damaged line."""
    numbered = numbered_jsonl(path, torn_tail=True) if path.exists() else []
    for number, row in numbered:
        if not all(isinstance(row.get(key, _MISSING), kind) for key, kind in keys.items()):
            raise RunError(f"{path}, line {number} is damaged; delete the file, and its numbers are computed again")
    return [row for _, row in numbered]
