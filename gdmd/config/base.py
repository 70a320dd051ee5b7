"""The base class of all configs, and number types with bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from gdmd.config.explain import FIELDS_ONLY, Mistakes, explain
from gdmd.config.load import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic has no public name for it

LARGEST_COUNT = 2**63 - 1
"""A count must fit the int64 of a tensor."""


class _ExplainedErrors(ModelMetaclass):
    """Mistakes in ``SomeConfig(...)`` are the same ConfigError as those in a file."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise ConfigError(explain(cls, error, cls.__name__, tree=fields)) from None


class Config(BaseModel, metaclass=_ExplainedErrors):
    """A frozen pydantic model; unknown keys are errors and defaults are validated, too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, given: Any) -> Any:
        """Expand ~/models to the home folder, as a shell does, if that path exists."""
        return {key: expand_home(value) for key, value in given.items()} if isinstance(given, Mapping) else given

    def _mistakes(self) -> Iterator[str]:
        """What is wrong with valid fields together, a message each. A subclass adds its own to those of its parent."""
        yield from ()

    @model_validator(mode="after")
    def _fields_fit_together(self, info: ValidationInfo) -> Self:
        if info.context != FIELDS_ONLY and (found := tuple(self._mistakes())):
            raise Mistakes(found)
        return self


def expand_home(value: Any) -> Any:
    """Expand a text that starts with ~/ if that path exists; any other value is returned unchanged."""
    if isinstance(value, list | tuple):
        return [expand_home(item) for item in value]
    there = os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else ""
    return there if os.path.exists(there) else value


def _not_a_bool(value: Any) -> Any:
    """YAML reads ``yes`` and ``on`` as true, which would pass as the number 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not a boolean")
    return value


def _device(given: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", given):
        raise ValueError("is not a device; write cpu, cuda, cuda:1 or mps")
    return given


DeviceName = Annotated[str, AfterValidator(_device)]
"""A device in torch's words."""

Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST_COUNT)]
"""A number of things, at least 1; not a float, string or bool."""

NonNegativeCount = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]
"""A number of things, 0 included (a seed, warm-up steps)."""

Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_a_bool)]
"""Any finite number; also "1e-5", which YAML reads as a string."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_a_bool)]
"""A finite number above 0."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_a_bool)]
"""A finite number, at least 0."""

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_not_a_bool)]
"""A number in [0, 1]."""
