"""Recipes by name or path, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from gdmd.config.load import ConfigError, load_config
from gdmd.config.names import listed, near
from gdmd.config.run import RunConfig
from gdmd.io import typed

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
    raise ConfigError([f"unknown recipe {source[:100]!r}{_meant(source)} `gdmd recipes` lists them"])


def _meant(source: str) -> str:
    """What may have been meant by an unknown name: a file, a run folder, or at most three recipes."""
    if os.path.isfile(f"{source}.yaml"):
        return f"; did you mean the file {source}.yaml?"
    if os.path.isfile(os.path.join(source, "config.yaml")):
        return f": it is a run folder; continue it with gdmd train --resume {typed(source)}."
    names = recipe_names()
    begun = sorted(
        (name for name in names if name.startswith(f"{source}_")), key=lambda name: not name.endswith("_gdmd")
    )
    meant = list(dict.fromkeys([*begun, *near(source.lower(), names, most=3)]))[:3]
    return f"; did you mean {listed(meant)}?" if meant else ";"


def read_recipe(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated recipe with ``a.b=c`` overrides applied; ConfigError lists every mistake at once."""
    path = recipe_path(source)
    return load_config(RunConfig, path, overrides, where=str(path.name))
