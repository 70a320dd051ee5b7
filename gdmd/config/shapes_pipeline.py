"""Diffusers pipelines that were trained on the Shapes world: which ones ship with the package, and how to tell one.

The file shapes_pipeline.json, next to model_index.json, marks such a pipeline; ``gdmd pretrain pipeline`` writes it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from gdmd.config.names import listed, near

MARKER = "shapes_pipeline.json"
PREFIX = "shapes:"
"""``shapes:NAME`` is the path of a shipped pipeline. A hub id cannot have a colon."""
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
PIPELINES = Path(__file__).parents[1] / "assets" / "pipelines"
"""The folders of the shipped pipelines, by name."""


class ShapesPipeline(BaseModel):
    """What a pipeline was trained for, and how: the content of its MARKER, which may hold more.

    max_tokens: model.max_tokens, and max_sequence_length of the pipeline's call; 0 = the family has no such setting.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    family: str
    command: str
    seed: int
    steps: int
    height: int
    width: int
    max_tokens: int


def shipped_pipelines() -> list[str]:
    """The names of the shipped pipelines."""
    return sorted(file.parent.name for file in PIPELINES.glob(f"*/{MARKER}"))


def located(path: str) -> str:
    """The folder of a shipped pipeline for shapes:NAME; any other path or hub id is returned unchanged.

    ValueError for an unknown name.
    """
    if not path.startswith(PREFIX):
        return path
    name, known = path.removeprefix(PREFIX), shipped_pipelines()
    if name not in known:
        given = [f"{PREFIX}{one}" for one in near(name, known) or known]
        advice = f"did you mean {listed(given)}?" if given else "none is installed; reinstall gdmd"
        raise ValueError(f"{path!r} is not a shipped pipeline; {advice}")
    return str(PIPELINES / name)


def is_shapes_pipeline(path: str) -> bool:
    """Whether the pipeline at ``path`` was trained on the Shapes world; false for a hub id and for a missing folder.

    ValueError for an unknown shapes:NAME.
    """
    return os.path.isfile(os.path.join(located(path), MARKER))  # False for a name too long, where Path.is_file raises


def draws_real_images(path: str) -> bool:
    """Whether ``path`` is known not to be a Shapes pipeline: it is a hub id, or a folder without the MARKER.

    A folder that does not exist may have been one: the base model of a run that has moved.
    """
    hub_id = re.fullmatch(HUB_ID, path) is not None and not os.path.isdir(os.path.dirname(path))
    return not is_shapes_pipeline(path) and (hub_id or os.path.isdir(path))


def read_shapes_pipeline(path: str) -> ShapesPipeline | None:
    """What the MARKER of a pipeline says; None for a pipeline without one.

    ValueError for an unknown shapes:NAME and for a damaged file.
    """
    file = Path(located(path)) / MARKER
    if not is_shapes_pipeline(path):
        return None
    try:
        return ShapesPipeline.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*(str(key) for key in first["loc"]), first["msg"]])
    except OSError as error:
        reason = str(error.strerror)
    raise ValueError(f"{file} is damaged ({reason}); copy the pipeline again")
