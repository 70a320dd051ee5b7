"""One interface for everything that generates images: runs, exports, diffusers pipelines with LoRA, image folders.

The noise of image j of prompt i is a function of (seed, i, j) alone: batch size, number of devices and restarts do not
change it, and two sources with latents of the same shape start from the same noise. torch is imported only when a source
is opened.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gdmd.config.image_source import SourceConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.shapes_pipeline import HUB_ID, PREFIX, is_shapes_pipeline, located
from gdmd.io import RunError, near_name, read_json
from gdmd.models.pipeline_files import instead_of_pipeline
from gdmd.recipes.run_folders import TEACHERS, config_of
from gdmd.runs.student_file import EXPORT_FILE
from gdmd.sources.base import Kind, Source
from gdmd.sources.folders import FolderSource, holds_images


def kind_of(cfg: SourceConfig) -> Kind:
    """The kind of a source, from the files there. ValueError (before torch is imported) for settings of another kind."""
    kind = _kind(cfg.where)
    every = set(SourceConfig.model_fields) - {"checkpoint"}
    fits = {
        "export": {"base", "dtype", "device", "revision", "variant"},
        "pipeline": every,
        "run": {"checkpoint", "base", "device", "height", "width"},
        "teacher": {"device"},
    }
    allowed = fits.get(kind, set()) | {"name", "where", "batch", "trained"}
    extra = sorted(key for key in cfg.model_fields_set if key not in allowed)
    if extra or (kind == "pipeline" and cfg.base):
        what = {"export": "an export", "images": "a folder of images", "teacher": "a teacher row"}.get(
            kind, f"a {kind}"
        )
        raise ValueError(
            f"source {cfg.where} is {what}, for which {', '.join(extra) or 'base'} cannot be set; leave that out"
        )
    return kind


def _kind(where: str) -> Kind:
    folder = Path(where)
    if where in TEACHERS and not folder.exists():
        return "teacher"
    if where.startswith(PREFIX):
        folder = Path(located(where))
    if (folder / "config.yaml").is_file():
        return "run"
    if (folder / EXPORT_FILE).is_file():
        return "export"
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if holds_images(folder):
        return "images"
    if not folder.exists() and not folder.parent.is_dir() and re.fullmatch(HUB_ID, where):
        return "pipeline"
    wrong = f"it has none of the expected files.{instead_of_pipeline(folder)}"
    reason = wrong if folder.exists() else f"it does not exist.{near_name(where, TEACHERS)}"
    raise RunError(
        f"source {where}: {reason} Give a run folder, an exported folder, a diffusers pipeline (folder or hub id ORG/NAME), "
        "a folder of images, or teacher."
    )


def draws_shapes(cfg: SourceConfig) -> bool:
    """Whether a source generates images of Shapes captions; false for a folder of images, which may hold any."""
    match kind_of(cfg):
        case "teacher":
            return True
        case "run":
            run = config_of(Path(cfg.where))
            moved = cfg.base is not None and isinstance(run.model, DiffusersModel)
            return is_shapes_pipeline(str(cfg.base)) if moved else run.shapes_world
        case "export":
            return read_json(Path(cfg.where) / EXPORT_FILE, "Export the run again.").get("shapes") is True
        case "pipeline":
            return is_shapes_pipeline(cfg.where)
        case "images":
            return False


def require_one_world(sources: Sequence[SourceConfig]) -> None:
    """Check the kind of every source. ValueError where sources of the Shapes world and of real models would be compared.

    Folders of images go with both.
    """
    worlds = {source.where: draws_shapes(source) for source in sources if kind_of(source) != "images"}
    if len(set(worlds.values())) > 1:
        shapes, others = ([where for where in worlds if worlds[where] is one] for one in (True, False))
        raise ValueError(
            f"{', '.join(shapes)} generate 32 x 32 images of Shapes captions, {', '.join(others)} images of any prompt: "
            "no prompts or scorers suit both; compare them in separate calls"
        )


def open_source(cfg: SourceConfig) -> Source:
    """Load a source; a local path never touches the network."""
    match kind_of(cfg):
        case "teacher" | "run":
            from gdmd.sources.runs import RunSource

            return RunSource.open(cfg)
        case "export":
            from gdmd.sources.pipelines import open_export

            return open_export(cfg)
        case "pipeline":
            from gdmd.sources.pipelines import open_pipeline

            return open_pipeline(cfg)
        case "images":
            return FolderSource(cfg)
