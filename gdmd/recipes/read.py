"""Recipes by name or path, without torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gdmd.config.load import ConfigError, load_config
from gdmd.config.run import RunConfig

FOLDER = Path(str(resources.files("gdmd.recipes")))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(source: str) -> Path:
    """The file of a shipped recipe, or of a path ending in .yaml / .yml. ConfigError for neither."""
    if source.endswith((".yaml", ".yml")):
        if not os.path.isfile(source):  # False, where Path.is_file raises for a name too long
            raise ConfigError([f"recipe file {source}: there is no such file"])
        return Path(source)
    if source in recipe_names():
        return FOLDER / f"{source}.yaml"
    near = difflib.get_close_matches(source[:100], recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        [f"unknown recipe {source[:100]!r}: {hint}shipped are {', '.join(recipe_names())}; or give a .yaml file"]
    )


def read_recipe(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated recipe with ``a.b=c`` overrides applied; ConfigError lists every mistake at once."""
    path = recipe_path(source)
    return load_config(RunConfig, path, overrides, where=str(path.name))
