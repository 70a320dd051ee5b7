"""One interface for everything that generates images: runs, exports, diffusers pipelines with LoRA, image folders.

The noise of image j of prompt i is a function of (seed, i, j) alone: batch size, number of devices and restarts do not
change it, and two sources with latents of the same shape start from the same noise. torch is imported only when a source
is opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from gdmd.config.image_source import SourceConfig
from gdmd.io import RunError, near_name
from gdmd.models.pipeline_files import instead_of_pipeline
from gdmd.recipes.run_folders import TEACHERS
from gdmd.sources.base import EXPORT_FILE, Kind, Source
from gdmd.sources.folders import FolderSource, holds_images


def kind_of(cfg: SourceConfig) -> Kind:
    """The kind of a source, from the files there. ValueError (before torch is imported) for settings of another kind."""
    kind = _kind(cfg.where)
    every = set(SourceConfig.model_fields) - {"checkpoint"}
    fits = {
        "export": {"base", "dtype", "device", "revision", "variant"},
        "pipeline": every,
        "run": {"checkpoint", "base"},
    }
    allowed = fits.get(kind, set()) | {"name", "where", "batch", "trained"}
    extra = sorted(key for key in cfg.model_fields_set if key not in allowed)
    if extra or (kind == "pipeline" and cfg.base):
        raise ValueError(
            f"source {cfg.where} is a {kind}, for which {', '.join(extra) or 'base'} cannot be set; leave that out"
        )
    return kind


def _kind(where: str) -> Kind:
    folder = Path(where)
    if where in TEACHERS and not folder.exists():
        return "teacher"
    if (folder / "config.yaml").is_file():
        return "run"
    if (folder / EXPORT_FILE).is_file():
        return "export"
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if holds_images(folder):
        return "images"
    if not folder.exists() and not folder.parent.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where):
        return "pipeline"
    wrong = f"it has none of their files.{instead_of_pipeline(folder)}"
    reason = wrong if folder.exists() else f"it does not exist.{near_name(where, TEACHERS)}"
    raise RunError(
        f"{where} is not a run folder, nor an exported folder, a diffusers pipeline, a hub id (ORG/NAME) or a folder of "
        f"images: {reason}"
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
