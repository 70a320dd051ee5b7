"""What every config is made of: the frozen base class and the number types that say what a field may be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LARGEST_COUNT = 2**63 - 1
"""A count must fit the int64 of a tensor."""


class Config(BaseModel):
    """A typed, frozen value; an unknown key is an error and defaults are checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _home(cls, given: Any) -> Any:
        """~/models is below the home folder, as a shell reads it, where that path exists."""
        return {key: in_home(value) for key, value in given.items()} if isinstance(given, Mapping) else given


def in_home(value: Any) -> Any:
    """The path below the home folder that a text starting with ~/ names, if it exists; any other value as it is."""
    if isinstance(value, list | tuple):
        return [in_home(item) for item in value]
    there = os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else ""
    return there if os.path.exists(there) else value


def _not_a_bool(value: Any) -> Any:
    """YAML reads ``yes`` and ``on`` as true, which would pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not a truth value")
    return value


Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST_COUNT)]
"""How many: 1, 2, ...; never a float, a string or a truth value."""

NonNegativeCount = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]
"""How many, zero included (a seed, a number of warm-up steps)."""

Finite = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]
"""Any finite number; "1e-5", which YAML reads as a string, is one."""

Positive = Annotated[float, BeforeValidator(_not_a_bool), Field(gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

NonNegative = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, allow_inf_nan=False)]
"""A finite number, zero included."""

Probability = Annotated[float, BeforeValidator(_not_a_bool), Field(ge=0, le=1, allow_inf_nan=False)]
"""A number in [0, 1]."""
