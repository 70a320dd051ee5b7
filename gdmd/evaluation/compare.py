"""What ``gdmd eval preference`` and ``gdmd eval compare`` do: sources, one after the other, on the same prompts and noise.

One source at a time is in memory; the scorers' weights are loaded once, when the images of all are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.config.image_source import SourceConfig
from gdmd.config.run import RewardConfig
from gdmd.evaluation.measures import (
    feature_measures,
    features_of,
    geneval_scores,
    reference_files,
    render_features,
    right_images,
    rows_of,
    shapes_measures,
)
from gdmd.evaluation.model_page import Gallery, write_page
from gdmd.evaluation.preference import (
    Asked,
    Produced,
    Say,
    asked_of,
    produce,
    score,
    summary,
    write_summary,
)
from gdmd.evaluation.scorers import Features, feature_maker, judges_shapes, load_scorers, read_scorers, shapes_scorers
from gdmd.io import finite_or_none, write_atomic
from gdmd.recipes.run_folders import TEACHERS, config_of
from gdmd.reporting.statistics import Scores, paired_difference
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.shapes.scorer_networks import IMAGE_SIZE
from gdmd.sources.folders import FolderSource, image_file, read_image
from gdmd.sources.open import kind_of, open_source

RESULT, PAGE = "compare.json", "compare.html"
SHAPESEVAL = "ShapesEval"


@dataclass(frozen=True)
class Wanted:
    """What is measured: the options of both commands.

    prompts: None = the fixed captions of the Shapes world; column: where a table has them. scorers, features: as written
    on the command line; none = those of the Shapes world, or the rewards of the run. shard: (k, n), this process makes
    every n-th prompt from k.
    """

    prompts: str | None = None
    limit: int | None = None
    per_task: int = 50
    images: int = 4
    seed: int = 777
    scorers: tuple[str, ...] = ()
    features: str | None = None
    reference: Path | None = None
    device: str | None = None
    shard: tuple[int, int] = (0, 1)
    gallery: int = 24
    column: str | None = None


def preference(cfg: SourceConfig, wanted: Wanted, folder: Path, say: Say) -> dict[str, Any]:
    """One source: images, scores, summary in ``folder``."""
    _, (row,) = _measured([cfg], wanted, [folder], say)
    write_summary(folder, row)
    return row


def compare(sources: Sequence[SourceConfig], wanted: Wanted, folder: Path, say: Say) -> dict[str, Any]:
    """Several: each in DIR/NAME, then DIR/compare.json and the page DIR/compare.html."""
    folders = [folder / source.slug for source in sources]
    asked, rows = _measured(sources, wanted, folders, say)
    for own, row in zip(folders, rows, strict=True):
        write_summary(own, row)
    shown = {row["source"]["name"]: row for row in rows}
    content = {"rows": shown, "against": next(iter(shown))}
    write_atomic(folder / RESULT, json.dumps(content, indent=2) + "\n", "the comparison")
    count = len(asked.texts)
    numbers = [k * count // min(wanted.gallery, count) for k in range(min(wanted.gallery, count))]  # spread over all
    shapes = any("shapeseval" in row for row in rows)
    galleries = [_gallery(own, cfg, asked, numbers, shapes) for own, cfg in zip(folders, sources, strict=True)]
    write_page(folder / PAGE, shown, galleries, [asked.texts[number] for number in numbers])
    say(f"page: {folder / PAGE}")
    return content


def make_only(cfg: SourceConfig, wanted: Wanted, folder: Path, say: Say) -> int:
    """This process's share of the images, without scores; the number of its prompts."""
    asked = _asked(wanted)
    produce(open_source(_placed(cfg, wanted)), asked, folder, say, wanted.shard)
    return len(range(wanted.shard[0], len(asked.texts), wanted.shard[1]))


def _measured(
    sources: Sequence[SourceConfig], wanted: Wanted, folders: Sequence[Path], say: Say
) -> tuple[Asked, list[dict[str, Any]]]:
    """The prompts and a summary per source. Everything that can be wrong is found before the first image is made."""
    shapes = any(_shapes(source) for source in sources)
    if wanted.prompts is None and not shapes:
        raise ValueError("--prompts is missing: only sources of the Shapes world have a prompt set of their own")
    name = wanted.features or ("shapes" if shapes else None)
    if wanted.reference is not None and name is None:
        raise ValueError("--reference changes nothing without --features: name the features to compare, such as clip")
    specs = _specs(wanted, sources, shapes)
    asked = _asked(wanted)
    if asked.note:
        say(asked.note)
    if shapes:
        rows_of(asked)
    real = reference_files(wanted.reference) if wanted.reference is not None else ()
    _check_sources(sources, asked, real, _shapes_readers(specs, name, shapes))
    device = wanted.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rewards = load_scorers(specs, device)
    make = feature_maker(name, device) if name else None
    made = [
        produce(open_source(_placed(source, wanted)), asked, own, say)
        for source, own in zip(sources, folders, strict=True)
    ]
    scores = [score(one, asked, own, specs, rewards, say) for one, own in zip(made, folders, strict=True)]
    extra = _by_task(made, folders, asked, shapes, say)
    if make and name:
        reference = _reference(make, asked, real, shapes)
        extra = [
            row | feature_measures(one, asked, make, name, reference) for one, row in zip(made, extra, strict=True)
        ]
    rows = []
    for one, own, more in zip(made, scores, extra, strict=True):
        row = summary(one, asked, own) | more
        row["against_first"] = _against(own, scores[0]) if one is not made[0] else {}
        rows.append(finite_or_none(row))
    return asked, rows


def _shapes_readers(specs: Sequence[RewardConfig], features: str | None, shapes: bool) -> list[str]:
    """What judges images of the Shapes world only. shapes: ShapesEval is measured."""
    scorers = [f"scorer {spec.label}" for spec in specs if judges_shapes(spec)]
    return [*([SHAPESEVAL] if shapes else []), *scorers, *(["features shapes"] if features == "shapes" else [])]


def _check_sources(sources: Sequence[SourceConfig], asked: Asked, real: Sequence[Path], readers: Sequence[str]) -> None:
    """ValueError for a folder without the images that are asked for, and for images that ``readers`` cannot judge.

    real: images to compare with.
    """
    advice = "evaluate the two worlds in separate calls" if SHAPESEVAL in readers else "name others"
    limits = f"{', '.join(readers)}: for {IMAGE_SIZE} x {IMAGE_SIZE} images of the Shapes world only; {advice}"
    files = list(real)
    for source in sources:
        if kind_of(source) == "images":
            folder = FolderSource(source)
            files += [folder.file(place) for place in asked.places]
        elif readers and not _shapes(source):
            raise ValueError(f"{source.where} draws images of a real model. {limits}")
    for file in files if readers else ():
        if (size := read_image(file).size) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{file} is {size[0]} x {size[1]}. {limits}")


def _by_task(
    made: Sequence[Produced], folders: Sequence[Path], asked: Asked, shapes: bool, say: Say
) -> list[dict[str, Any]]:
    """ShapesEval, or the GenEval scores that lie beside the images."""
    if shapes:
        return [shapes_measures(one, asked) for one in made]
    homes = [
        Path(one.facts.where) if one.facts.kind == "images" else own / "images"
        for one, own in zip(made, folders, strict=True)
    ]
    return [{"geneval": geneval_scores(home, say)} for home in homes]


def _reference(make: Features, asked: Asked, real: Sequence[Path], shapes: bool) -> Tensor | None:
    """The features to compare with: of the given images, or of true renders of the same captions."""
    if real:
        return features_of(make, real)
    return render_features(make, asked) if shapes else None


def _against(own: Mapping[str, Scores], first: Mapping[str, Scores]) -> dict[str, Any]:
    return {label: asdict(paired_difference(own[label], first[label])) for label in own}


def _asked(wanted: Wanted) -> Asked:
    if wanted.prompts is not None:
        return asked_of(wanted.prompts, wanted.images, wanted.seed, wanted.limit, wanted.column)
    texts = tuple(catalog().captions[row].text for row in fixed_rows("eval", wanted.per_task).tolist())
    texts = texts[: wanted.limit]
    return Asked("the Shapes evaluation set", texts, tuple({"prompt": t} for t in texts), wanted.images, wanted.seed)


def _specs(wanted: Wanted, sources: Sequence[SourceConfig], shapes: bool) -> tuple[RewardConfig, ...]:
    if wanted.scorers:
        return read_scorers(wanted.scorers)
    if shapes:
        return shapes_scorers()
    for source in sources:
        if kind_of(source) == "run" and (cfg := config_of(Path(source.where))).method.rewarded:
            return cfg.rewards
    raise ValueError("no scorer was given; name at least one, for example --scorer clip (see gdmd rewards list)")


def _shapes(source: SourceConfig) -> bool:
    if kind_of(source) == "run":
        return config_of(Path(source.where)).model.kind == "shapes"
    return source.where in TEACHERS


def _placed(cfg: SourceConfig, wanted: Wanted) -> SourceConfig:
    """The command's device, where the source has none of its own."""
    movable = kind_of(cfg) in ("pipeline", "export") and cfg.device is None and wanted.device is not None
    return cfg.changed({"device": wanted.device}) if movable else cfg


def _gallery(folder: Path, cfg: SourceConfig, asked: Asked, numbers: Sequence[int], shapes: bool) -> Gallery:
    """The file of the first image of these prompts; of Shapes, whether it is right."""
    if kind_of(cfg) != "images":
        files = [image_file(folder / "images", number, 0) for number in numbers]
    else:
        source, places = FolderSource(cfg), asked.places[:: asked.images]
        files = [source.file(places[k]) for k in numbers]
    return Gallery(cfg.name, files, right_images(files, [asked.texts[k] for k in numbers]) if shapes else ())
