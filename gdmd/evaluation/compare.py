"""What ``gdmd eval preference`` and ``gdmd eval compare`` do: any sources on the same prompts and noise.

One source at a time is in memory; the scorers are loaded once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.config.image_source import SourceConfig
from gdmd.config.run import RewardConfig
from gdmd.diffusion.device import pick_device
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
    GeneratedImages,
    Log,
    PromptSet,
    generate_images,
    read_prompt_set,
    score,
    summary,
    write_summary,
)
from gdmd.evaluation.scorers import (
    Features,
    check_trained,
    feature_maker,
    judges_shapes,
    load_scorers,
    read_scorers,
    shapes_scorers,
)
from gdmd.evaluation.verdict import SHAPES_SET
from gdmd.io import finite_or_none, write_atomic
from gdmd.recipes.build_rewards import check_metadata
from gdmd.recipes.open_run import check_checkpoint
from gdmd.recipes.run_folders import config_of
from gdmd.reporting.progress_bar import phase
from gdmd.reporting.statistics import Scores, paired_difference
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.shapes.render import IMAGE_SIZE
from gdmd.sources.base import Source
from gdmd.sources.folders import FolderSource, image_file, read_image
from gdmd.sources.open import draws_shapes, kind_of, open_source

RESULT, PAGE = "compare.json", "compare.html"
SHAPESEVAL = "ShapesEval"
PER_TASK = 50
"""Captions per task of the Shapes evaluation set: 300."""


@dataclass(frozen=True)
class EvalOptions:
    """The options of both commands.

    prompts: None = the Shapes evaluation set, ``per_task`` captions of each task (None = PER_TASK); limit: prompts of a
    file; column: of the prompts in a table. scorers, features: as written on the command line; none = those of the Shapes
    world, or the rewards of the run. shard: (k, n), this process generates the images of prompts k, k + n, ... only.
    gallery: prompts on the page.
    """

    prompts: str | None = None
    limit: int | None = None
    per_task: int | None = None
    images: int = 4
    seed: int = 777
    scorers: tuple[str, ...] = ()
    features: str | None = None
    reference: Path | None = None
    device: str | None = None
    shard: tuple[int, int] = (0, 1)
    gallery: int = 24
    column: str | None = None


def preference(cfg: SourceConfig, options: EvalOptions, folder: Path, log: Log) -> dict[str, Any]:
    """Evaluate one source: images, scores and summary in ``folder``."""
    _, (row,) = _measured([cfg], options, [folder], log)
    write_summary(folder, row)
    return row


def compare(sources: Sequence[SourceConfig], options: EvalOptions, folder: Path, log: Log) -> dict[str, Any]:
    """Evaluate several sources in DIR/NAME; write DIR/compare.json and the page DIR/compare.html."""
    folders = [folder / source.slug for source in sources]
    prompt_set, rows = _measured(sources, options, folders, log)
    for own, row in zip(folders, rows, strict=True):
        write_summary(own, row)
    shown = {row["source"]["name"]: row for row in rows}
    content = {"rows": shown, "against": next(iter(shown))}
    write_atomic(folder / RESULT, json.dumps(content, indent=2) + "\n", "the comparison")
    count = len(prompt_set.texts)
    numbers = [k * count // min(options.gallery, count) for k in range(min(options.gallery, count))]  # spread over all
    shapes = any("shapeseval" in row for row in rows)
    galleries = [_gallery(own, cfg, prompt_set, numbers, shapes) for own, cfg in zip(folders, sources, strict=True)]
    write_page(folder / PAGE, shown, galleries, [prompt_set.texts[number] for number in numbers])
    log(f"page: {folder / PAGE}")
    return content


def generate_shard(cfg: SourceConfig, options: EvalOptions, folder: Path) -> int:
    """Generate this process's shard of the images, without scores; return the number of its prompts.

    ValueError for a folder of images, of which there is nothing to generate.
    """
    _require_prompts(options, shapes=draws_shapes(cfg))
    if kind_of(cfg) == "images":
        raise ValueError(f"--shard divides the generation of images, and {cfg.where} already holds them; leave it out")
    prompt_set = _prompt_set(options)
    generate_images(_opened(cfg, options), prompt_set, folder, options.shard)
    return len(range(options.shard[0], len(prompt_set.texts), options.shard[1]))


def _measured(
    sources: Sequence[SourceConfig], options: EvalOptions, folders: Sequence[Path], log: Log
) -> tuple[PromptSet, list[dict[str, Any]]]:
    """The prompts and a summary per source. What needs no model is checked before the first image is generated."""
    shapes = any(draws_shapes(source) for source in sources)
    _require_prompts(options, shapes=shapes)
    name = options.features or ("shapes" if shapes else None)
    if options.reference is not None and name is None:
        raise ValueError("--reference has no effect without --features: name the features to compare, such as clip")
    specs = _specs(options, sources, shapes)
    check_trained(sources, specs)
    prompt_set = _prompt_set(options)
    if prompt_set.note:
        log(prompt_set.note)
    check_metadata(specs, prompt_set.texts, prompt_set.meta)
    if shapes:
        rows_of(prompt_set)
    real = reference_files(options.reference) if options.reference is not None else ()
    _check_sources(sources, prompt_set, real, _shapes_only(specs, name, shapes))
    device = pick_device(options.device)
    with phase(f"loading {', '.join(spec.label for spec in specs)}"):
        rewards = load_scorers(specs, device)
        make = feature_maker(name, device) if name else None
    generated = [
        generate_images(_opened(source, options), prompt_set, own) for source, own in zip(sources, folders, strict=True)
    ]
    scores = [score(one, prompt_set, own, specs, rewards, log) for one, own in zip(generated, folders, strict=True)]
    with phase("measuring the images", plain=False):
        extra = _by_task(generated, folders, prompt_set, shapes, log)
        if make and name:
            reference = _reference(make, prompt_set, real, shapes)
            extra = [
                row | feature_measures(one, prompt_set, make, name, reference)
                for one, row in zip(generated, extra, strict=True)
            ]
    rows = []
    for one, own, more in zip(generated, scores, extra, strict=True):
        row = summary(one, prompt_set, own, specs) | more
        row["against_first"] = _against(own, scores[0]) if one is not generated[0] else {}
        rows.append(finite_or_none(row))
    return prompt_set, rows


def _require_prompts(options: EvalOptions, *, shapes: bool) -> None:
    """ValueError if there are no prompts. shapes: a source generates images of the Shapes world."""
    if options.prompts is None and not shapes:
        raise ValueError("--prompts is missing: only Shapes sources have a built-in prompt set")


def _shapes_only(specs: Sequence[RewardConfig], features: str | None, shapes: bool) -> list[str]:
    """The measures that apply to Shapes images only. shapes: ShapesEval is measured."""
    scorers = [f"scorer {spec.label}" for spec in specs if judges_shapes(spec)]
    return [*([SHAPESEVAL] if shapes else []), *scorers, *(["features shapes"] if features == "shapes" else [])]


def _check_sources(
    sources: Sequence[SourceConfig], prompt_set: PromptSet, real: Sequence[Path], shapes_only: Sequence[str]
) -> None:
    """ValueError for a folder without the needed images, a run without the checkpoint, and images of other models than the
    ``shapes_only`` measures can judge.

    real: the reference images.
    """
    advice = "evaluate Shapes and other images in separate calls" if SHAPESEVAL in shapes_only else "name others"
    limits = f"{', '.join(shapes_only)}: for {IMAGE_SIZE} x {IMAGE_SIZE} images of the Shapes world only; {advice}"
    files = list(real)
    for source in sources:
        if kind_of(source) == "images":
            folder = FolderSource(source)
            files += [folder.file(slot) for slot in prompt_set.slots]
            continue
        if kind_of(source) == "run":
            check_checkpoint(Path(source.where), source.checkpoint)
        if shapes_only and not draws_shapes(source):
            raise ValueError(f"{source.where} does not generate Shapes images. {limits}")
    for file in files if shapes_only else ():
        if (size := read_image(file).size) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{file} is {size[0]} x {size[1]}. {limits}")


def _by_task(
    generated: Sequence[GeneratedImages], folders: Sequence[Path], prompt_set: PromptSet, shapes: bool, log: Log
) -> list[dict[str, Any]]:
    """ShapesEval, or the GenEval scores stored next to the images."""
    if shapes:
        return [shapes_measures(one, prompt_set) for one in generated]
    homes = [
        Path(one.info.where) if one.info.kind == "images" else own / "images"
        for one, own in zip(generated, folders, strict=True)
    ]
    return [{"geneval": scores} for scores in geneval_scores(homes, log)]


def _reference(make: Features, prompt_set: PromptSet, real: Sequence[Path], shapes: bool) -> Tensor | None:
    """Features of the reference images, or of true renders of the same captions."""
    if real:
        return features_of(make, real)
    return render_features(make, prompt_set) if shapes else None


def _against(own: Mapping[str, Scores], first: Mapping[str, Scores]) -> dict[str, Any]:
    return {label: asdict(paired_difference(own[label], first[label])) for label in own}


def _prompt_set(options: EvalOptions) -> PromptSet:
    if options.prompts is not None:
        if options.per_task is not None:
            raise ValueError(
                "--per-task is for the Shapes evaluation set, and --prompts gives other prompts; leave one of them out, or "
                "use the first prompts with --limit"
            )
        return read_prompt_set(options.prompts, options.images, options.seed, options.limit, options.column)
    if options.limit is not None:
        raise ValueError(
            "--limit is for a file of prompts: the first captions of the Shapes evaluation set are those of its first "
            "tasks, and ShapesEval is the mean of all six; give fewer of each with --per-task"
        )
    texts = catalog().texts(fixed_rows("eval", options.per_task or PER_TASK))
    return PromptSet(SHAPES_SET, texts, tuple({"prompt": t} for t in texts), options.images, options.seed)


def _specs(options: EvalOptions, sources: Sequence[SourceConfig], shapes: bool) -> tuple[RewardConfig, ...]:
    if options.scorers:
        return read_scorers(options.scorers)
    if shapes:
        return shapes_scorers()
    for source in sources:
        if kind_of(source) == "run" and (cfg := config_of(Path(source.where))).method.rewarded:
            return cfg.rewards
    raise ValueError("no scorer was given; name at least one, for example --scorer clip (see gdmd rewards list)")


def _opened(cfg: SourceConfig, options: EvalOptions) -> Source:
    """The source, on the command's device unless it names one."""
    movable = kind_of(cfg) != "images" and cfg.device is None and options.device is not None
    with phase(f"loading {cfg.name}"):
        return open_source(cfg.changed({"device": options.device}) if movable else cfg)


def _gallery(folder: Path, cfg: SourceConfig, prompt_set: PromptSet, numbers: Sequence[int], shapes: bool) -> Gallery:
    """The first image of each of these prompts and, for Shapes, whether it is correct."""
    if kind_of(cfg) != "images":
        files = [image_file(folder / "images", number, 0) for number in numbers]
    else:
        source, slots = FolderSource(cfg), prompt_set.slots[:: prompt_set.images]
        files = [source.file(slots[k]) for k in numbers]
    return Gallery(cfg.name, files, right_images(files, [prompt_set.texts[k] for k in numbers]) if shapes else ())
