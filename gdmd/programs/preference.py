"""What ``gdmd eval preference`` does: prompts -> images -> every scorer -> means with intervals. Resumable.

    DIR/images/00000/metadata.jsonl, samples/0000.png   the images, in GenEval's layout
    DIR/settings.json                                   what they were made with
    DIR/scores.jsonl                                    {scorer, prompt, image, score}; null = not scored
    DIR/timing.jsonl                                    {images, seconds, first}: batches
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
from gdmd.evaluation.image_folders import image_file, read_image, write_image, write_metadata
from gdmd.evaluation.preference import Scores, clustered_mean, speed
from gdmd.io import RunError, finite_or_none, write_atomic, writing
from gdmd.programs.scorers import scores_of
from gdmd.programs.sources import Facts, FolderSource, Place, Source, places_of
from gdmd.types import Reward

SCORED = 32
"""Images per call of a scorer: what a kill loses of its work."""
SETTINGS, SCORES, TIMING, SUMMARY = "settings.json", "scores.jsonl", "timing.jsonl", "preference.json"
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
        files = {(p.prompt, p.image): source.row(p).images[p.image] for p in asked.places}
        _settle(folder, source.facts, asked)
        return Produced(source.facts, files, None)
    home = folder / "images"
    _settle(folder, source.facts, asked)
    own = [place for place in asked.places if place.prompt % shard[1] == shard[0]]
    for prompt in dict.fromkeys(place.prompt for place in own):
        write_metadata(home, prompt, asked.meta[prompt])
    missing = [place for place in own if not image_file(home, place.prompt, place.image).exists()]
    batch = source.facts.batch
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        began = time.perf_counter()
        made = source.make(part, asked.seed)
        seconds = time.perf_counter() - began
        for place, image in zip(part, made, strict=True):
            write_image(image_file(home, place.prompt, place.image), image)
        _append(folder / TIMING, [{"images": len(part), "seconds": seconds, "first": int(start == 0)}])
        say(f"{source.facts.name}: {start + len(part)} of {len(missing)} images made")
    files = {(p.prompt, p.image): image_file(home, p.prompt, p.image) for p in asked.places}
    return Produced(source.facts, files, speed(_lines(folder / TIMING, _TIMING_KEYS)))


def score(
    produced: Produced,
    asked: Asked,
    folder: Path,
    specs: Sequence[RewardConfig],
    rewards: Mapping[str, Reward],
    say: Say,
) -> dict[str, Scores]:
    """Ask every scorer about the images it has not seen yet. Scores by label and place."""
    _check_scorers(folder, specs)
    found: dict[str, dict[tuple[int, int], float]] = {label: {} for label in rewards}
    for line in _lines(folder / SCORES, _SCORE_KEYS):
        if line["scorer"] in found:
            value = math.nan if line["score"] is None else float(line["score"])
            found[line["scorer"]][int(line["prompt"]), int(line["image"])] = value
    for label, reward in rewards.items():
        todo = [place for place in asked.places if (place.prompt, place.image) not in found[label]]
        for part in _parts(todo):
            images = [read_image(produced.files[place.prompt, place.image]) for place in part]
            meta = [asked.meta[place.prompt] for place in part]
            values = scores_of(reward, images, [place.text for place in part], meta)
            rows = list(zip(part, values, strict=True))
            _append(folder / SCORES, [_score_line(label, place, value) for place, value in rows])
            found[label] |= {(place.prompt, place.image): value for place, value in rows}
        if todo:
            say(f"{produced.facts.name}: {label} scored {len(todo)} images")
    wanted = [(place.prompt, place.image) for place in asked.places]
    return {label: {place: own[place] for place in wanted} for label, own in found.items()}


def summary(produced: Produced, asked: Asked, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The public form: the source and, per scorer, mean, interval and whether it was trained on (null = not known)."""
    trained = produced.facts.trained
    return {
        "source": produced.facts.json(),
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


def _settle(folder: Path, facts: Facts, asked: Asked) -> None:
    """Refuse a folder whose images were made by something else, or from another noise."""
    wanted = json.loads(json.dumps({"identity": dict(facts.identity), "seed": asked.seed}))
    path = folder / SETTINGS
    with writing("the images", folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        there = _json(path)
        before = there.get("identity")
        known = before if isinstance(before, dict) else {}
        keys = [key for key in wanted["identity"] if known.get(key) != wanted["identity"][key]]
        keys += ["seed"] if there.get("seed") != asked.seed else []
        if keys:
            raise RunError(
                f"{folder} holds images of another source ({', '.join(keys)} differ); give an empty folder with --out"
            )
        return
    write_atomic(path, json.dumps(wanted, indent=2) + "\n", "the settings")


def _check_scorers(folder: Path, specs: Sequence[RewardConfig]) -> None:
    """A scorer whose settings changed since its scores were written is refused; new ones are noted."""
    path = folder / "scorers.json"
    known = _json(path) if path.exists() else {}
    now = {spec.label: spec.model_dump(mode="json", exclude={"device", "offload", "chunk"}) for spec in specs}
    changed = [label for label, own in now.items() if known.get(label, own) != own]
    if changed:
        raise RunError(
            f"{folder} holds scores of {changed[0]} with other settings ({known[changed[0]]}); "
            f"delete its lines from {SCORES} and {path.name}, or give an empty folder with --out"
        )
    write_atomic(path, json.dumps(known | now, indent=2) + "\n", "the scorers")


def _parts(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    for start in range(0, len(places), SCORED):
        yield places[start : start + SCORED]


def _score_line(label: str, place: Place, value: float) -> dict[str, Any]:
    written = None if math.isnan(value) else value
    return {"scorer": label, "prompt": place.prompt, "image": place.image, "score": written}


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with writing("the scores", path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(dict(row)) + "\n" for row in rows))


_Number = (int, float)
_SCORE_KEYS: Mapping[str, Any] = {"scorer": str, "prompt": int, "image": int, "score": (*_Number, type(None))}
_TIMING_KEYS: Mapping[str, Any] = {"images": int, "seconds": _Number, "first": int}


def _lines(path: Path, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of a jsonl file of rows {key: type}; a last line that a kill cut off is removed from it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomic(path, whole, "the scores")
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        wrong = [n for n, row in enumerate(rows, 1) if not all(isinstance(row[key], keys[key]) for key in keys)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); delete the file, and its numbers are made again") from error
    if wrong:
        raise RunError(f"{path}, line {wrong[0]} is damaged; delete the file, and its numbers are made again")
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); give an empty folder with --out") from error
