"""Sweep configs by name or path, with the recipes of their rows, without torch; all mistakes are listed at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gdmd.config.load import ConfigError, load_config
from gdmd.config.names import listed, near
from gdmd.config.run import RunConfig
from gdmd.config.sweep import Overrides, SweepConfig
from gdmd.recipes.read import FOLDER, read_recipe

SWEEPS = FOLDER / "sweeps"


@dataclass(frozen=True)
class Sweep:
    """A sweep config and the resolved recipe of each of its student rows."""

    config: SweepConfig
    recipes: Mapping[str, RunConfig]  # row name -> recipe; seed and steps are still those of the recipe

    @property
    def headline(self) -> RunConfig:
        """The recipe of the headline row; its guidance is the default of the teacher rows."""
        return self.recipes[self.config.headline]


def sweep_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read_sweep(source: str) -> Sweep:
    """The validated sweep with all its recipes; ConfigError lists the mistakes of every row."""
    path = _path_of(source)
    config = load_config(SweepConfig, path, where=path.name)
    recipes: dict[str, RunConfig] = {}
    errors: list[str] = []
    for row in config.rows:
        overrides = _arguments({**config.overrides, **row.overrides})
        try:
            recipes[row.name] = read_recipe(row.recipe or config.base, overrides)
        except ConfigError as error:
            errors += [f"{path.name}, row '{row.name}': {line}" for line in error.errors]
    errors += [
        f"{path.name}, row '{name}': a sweep measures ShapesEval, but {cfg.name} trains a real model; train it with gdmd "
        "train and compare the runs with gdmd eval compare"
        for name, cfg in recipes.items()
        if cfg.model.kind != "shapes"
    ]
    if errors:
        raise ConfigError(errors)
    return Sweep(config, recipes)


def _path_of(source: str) -> Path:
    """The file of a shipped sweep, or of a path that ends in .yaml or .yml. ConfigError for anything else."""
    if source.endswith((".yaml", ".yml")):
        if not os.path.isfile(source):  # False for a name that is too long; Path.is_file raises
            raise ConfigError([f"sweep config {source}: no such file"])
        return Path(source)
    names = sweep_names()
    if source in names:
        return SWEEPS / f"{source}.yaml"
    meant = near(source, names, most=3) or names[:3]
    raise ConfigError([f"unknown sweep {source[:100]!r}; did you mean {listed(meant)}? Or give a .yaml file"])


def _arguments(overrides: Overrides) -> list[str]:
    """As ``a.b=c``; JSON is YAML, except for escaped surrogate pairs."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
