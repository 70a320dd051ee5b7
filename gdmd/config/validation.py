"""Validation during training: images of fixed prompts every N steps, and scorers that train nothing."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from gdmd.config.base import Config, Count, NonNegativeCount
from gdmd.config.rewards import RewardConfig

PREFIX = "validation/"
"""Prefix of keys in metrics.jsonl: validation/LABEL (student) and validation/teacher/LABEL (teacher, logged once).

With model.sizes there is also a key of each size, whose LABEL is ``at_size``."""
TEACHER = f"{PREFIX}teacher/"
DIVERSITY = "images/diversity"
"""The LABEL of diversity: mean 1 - cosine of the image features of two images of one prompt, mean over prompts."""
FEATURES = ("shapes_clip_heldout", "clip", "shapes_clip")
"""Kinds of rewards with image features, in the order in which diversity uses them."""


def at_size(label: str, height: int, width: int) -> str:
    """The label of a score of the images of one size, for example clip/768x1344."""
    return f"{label}/{height}x{width}"


def split_size(label: str) -> tuple[str, str]:
    """The label without its size, and the size as HEIGHTxWIDTH; "" for a mean over all images."""
    found = re.fullmatch(r"(.+)/(\d+x\d+)", label)
    return (found[1], found[2]) if found else (label, "")


class ValidationConfig(Config):
    """The ``validation`` section of a recipe."""

    prompts: tuple[str, ...] | str | None = Field(
        default=None,
        description="List of prompts, or a file or shipped set as in prompts.file; prompts.column counts for the same file. "
        "Default: captions of all tasks (Shapes world), or the shipped set validation of eight prompts.",
    )
    every: NonNegativeCount = Field(
        default=100,
        description="Steps between validations of the EMA student, also at step 0 and at the last; 0 = none. The first "
        "one also generates the teacher's images, in eval.teacher_steps guided steps each; other ranks wait for it (see "
        "loop.rank_timeout).",
    )
    images: Count = Field(
        default=1,
        description="Images per prompt, of each size in model.sizes. From 2 on their diversity is logged, too, if a reward "
        "or scorer has image features (clip, and the dual encoders of the Shapes world).",
    )
    scorers: tuple[RewardConfig, ...] | None = Field(
        default=None,
        description="Held-out rewards: they score the validation images and train nothing. Default: shapes_clip_heldout "
        "in the Shapes world, none for other models.",
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _texts_or_file(cls, given: Any) -> Any:
        listed = (
            isinstance(given, list | tuple) and given and all(isinstance(one, str) and one.strip() for one in given)
        )
        if given is None or isinstance(given, str) or listed:
            return given
        raise ValueError("should be a file, or a list of prompts like ['a red cube', 'two cats']")

    @field_validator("scorers")
    @classmethod
    def _different(cls, given: tuple[RewardConfig, ...] | None) -> tuple[RewardConfig, ...] | None:
        labels = [scorer.label for scorer in given or ()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"each scorer may be listed once, got {labels}")
        return given
