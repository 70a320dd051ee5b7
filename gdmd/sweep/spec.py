"""Comparisons by name or path, and the recipes of their rows, without torch; every mistake is listed at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gdmd.config.load import ConfigError, load_config
from gdmd.config.names import listed, near
from gdmd.config.run import RunConfig
from gdmd.config.sweep import CompareSpec, Overrides
from gdmd.recipes.read import FOLDER, read_recipe

COMPARISONS = FOLDER / "sweeps"


@dataclass(frozen=True)
class Comparison:
    """A specification and the resolved recipe of each of its student rows."""

    spec: CompareSpec
    recipes: Mapping[str, RunConfig]  # row name -> recipe, seed and steps still those of the recipe

    @property
    def headline(self) -> RunConfig:
        """The recipe of the headline row; its guidance is the teacher rows' default."""
        return self.recipes[self.spec.headline]


def comparison_names() -> list[str]:
    """Names of the shipped comparisons."""
    return sorted(path.stem for path in COMPARISONS.glob("*.yaml"))


def comparison_path(source: str) -> Path:
    """The file of a shipped comparison, or of a path ending in .yaml / .yml. ConfigError for neither."""
    if source.endswith((".yaml", ".yml")):
        if not os.path.isfile(source):  # False, where Path.is_file raises for a name too long
            raise ConfigError([f"comparison file {source}: there is no such file"])
        return Path(source)
    names = comparison_names()
    if source in names:
        return COMPARISONS / f"{source}.yaml"
    meant = near(source, names, most=3) or names[:3]
    raise ConfigError([f"unknown comparison {source[:100]!r}; did you mean {listed(meant)}? Or give a .yaml file"])


def read_comparison(source: str) -> Comparison:
    """The validated comparison with all its recipes; ConfigError lists the mistakes of every row."""
    path = comparison_path(source)
    spec = load_config(CompareSpec, path, where=path.name)
    recipes: dict[str, RunConfig] = {}
    errors: list[str] = []
    for row in spec.rows:
        overrides = _words({**spec.overrides, **row.overrides})
        try:
            recipes[row.name] = read_recipe(row.recipe or spec.base, overrides)
        except ConfigError as error:
            errors += [f"{path.name}, row '{row.name}': {line}" for line in error.errors]
    errors += [
        f"{path.name}, row '{name}': a comparison measures ShapesEval, and {cfg.name} trains a real model; train it with "
        "gdmd train, and compare the runs with gdmd eval compare"
        for name, cfg in recipes.items()
        if cfg.model.kind != "shapes"
    ]
    if errors:
        raise ConfigError(errors)
    return Comparison(spec, recipes)


def _words(overrides: Overrides) -> list[str]:
    """As ``a.b=c``; JSON is YAML, but for escaped pairs of surrogates."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
