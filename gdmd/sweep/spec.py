"""Sweep configs by name or path, with the recipes of their rows, without torch; all mistakes are listed at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gdmd.config.load import ConfigError, load_config
from gdmd.config.names import listed, near
from gdmd.config.run import RunConfig
from gdmd.config.sweep import Overrides, SweepConfig
from gdmd.recipes.read import FOLDER, read_recipe

SWEEPS = FOLDER / "sweeps"


@dataclass(frozen=True)
class Sweep:
    """A sweep config and the resolved recipe of each of its student and teacher rows."""

    config: SweepConfig
    recipes: Mapping[str, RunConfig]  # row name -> recipe; seed and steps are still those of the recipe
    teachers: Mapping[str, RunConfig] = field(default_factory=dict)  # of the teacher rows that name a recipe

    @property
    def headline(self) -> RunConfig:
        """The recipe of the headline row; its guidance is the default of the teacher rows."""
        return self.recipes[self.config.headline]

    @property
    def of_pipelines(self) -> bool:
        """Whether its students are diffusers pipelines."""
        return self.headline.model.kind == "diffusers"

    def teacher(self, name: str) -> RunConfig:
        """The recipe whose teacher a row measures."""
        return self.teachers.get(name, self.headline)


def sweep_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read_sweep(source: str) -> Sweep:
    """The validated sweep with all its recipes; ConfigError lists the mistakes of every row."""
    path = _path_of(source)
    config = load_config(SweepConfig, path, where=path.name)
    students = {row.name: (row.recipe or config.base, {**config.overrides, **row.overrides}) for row in config.rows}
    teachers = {row.name: (row.recipe, config.overrides) for row in config.teachers if row.recipe}
    recipes: dict[str, RunConfig] = {}
    errors: list[str] = []
    for name, (recipe, overrides) in (students | teachers).items():
        try:
            recipes[name] = read_recipe(recipe, _arguments(overrides))
        except ConfigError as error:
            errors += [f"row '{name}': {line}" for line in error.errors]
    errors += _model_problems(config, recipes)
    if errors:
        raise ConfigError([f"{path.name}, {line}" for line in errors])
    own = {name: recipes[name] for name in students}
    return Sweep(config, own, {name: recipes[name] for name in teachers})


def _model_problems(config: SweepConfig, recipes: Mapping[str, RunConfig]) -> list[str]:
    """Rows that ShapesEval cannot judge, of two kinds of model, or with a budget not shown; exports without a LoRA."""
    found = [
        f"row '{name}': a sweep measures ShapesEval, but {cfg.name} distills a pipeline outside the Shapes world; "
        "train it with gdmd train and compare the runs with gdmd eval compare"
        for name, cfg in recipes.items()
        if not cfg.shapes_world
    ]
    kinds = {cfg.model.kind: name for name, cfg in recipes.items()}
    if len(kinds) > 1:
        found.append(
            f"rows '{kinds['shapes']}' and '{kinds['diffusers']}': one distills the Shapes networks, the other a pipeline, "
            "which do not fit on one page; write two sweeps"
        )
    found += [
        f"row '{row.name}': the page of a sweep over pipelines compares equal student updates and does not show the budget "
        "passes; leave it out of budgets"
        for row in config.rows
        if row.name in recipes and recipes[row.name].model.kind == "diffusers" and "passes" in config.budgets_of(row)
    ]
    for row in config.exports:
        student = recipes.get(row.student)
        if student and (student.model.kind == "shapes" or student.model.full in ("student", "both")):
            found.append(
                f"row '{row.name}': {row.student} does not train the LoRA of a pipeline, so there is none to export"
            )
    return found


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
    """Overrides as ``a.b=c``, in JSON, which is YAML except for escaped surrogate pairs."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
