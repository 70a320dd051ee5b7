"""Read a recipe by name or path, without importing torch.

A Shapes recipe is one file, NAME.yaml. A recipe for a real model is FAMILY_METHOD, such as sdxl_gdmd: the preset
methods/METHOD.yaml (``about`` and ``needs`` are for people) with the values of families/FAMILY.yaml on top. A family
preset may extend another one: a model of the same family, or a turbo model with its teacher.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gdmd.config.load import ConfigError, load_config, read_yaml
from gdmd.config.names import listed, near
from gdmd.config.run import RunConfig
from gdmd.io import typed

FOLDER = Path(str(resources.files("gdmd.recipes")))


def family_names() -> list[str]:
    """Names of the family presets, families/NAME.yaml."""
    return sorted(path.stem for path in (FOLDER / "families").glob("*.yaml"))


def method_names() -> list[str]:
    """Names of the method presets, methods/NAME.yaml."""
    return sorted(path.stem for path in (FOLDER / "methods").glob("*.yaml"))


def method_about(method: str) -> str:
    """What a method preset is, and which fields the user must set."""
    preset = read_yaml(FOLDER / "methods" / f"{method}.yaml")
    return f"{preset['about']}; needs {preset['needs']}."


def shapes_names() -> list[str]:
    """Names of the recipes for the Shapes world."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_names() -> list[str]:
    """Names of all shipped recipes: the Shapes recipes and every FAMILY_METHOD."""
    return sorted([*shapes_names(), *_presets()])


def read_recipe(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated recipe with ``a.b=c`` overrides applied.

    source: a shipped recipe's name, or a path that ends in .yaml or .yml. ConfigError lists every mistake at once.
    """
    if source.endswith((".yaml", ".yml")):
        if not os.path.isfile(source):  # False, where Path.is_file raises for a name too long
            raise ConfigError([f"recipe file {source}: there is no such file"])
        return load_config(RunConfig, Path(source), overrides, where=Path(source).name)
    if source in shapes_names():
        return load_config(RunConfig, FOLDER / f"{source}.yaml", overrides, where=f"{source}.yaml")
    if preset := _presets().get(source):
        return load_config(RunConfig, _merged(source, *preset), overrides, where=source)
    raise ConfigError([f"unknown recipe {source[:100]!r}{_meant(source)} `gdmd recipes` lists them"])


def _presets() -> dict[str, tuple[str, str]]:
    """Recipe name -> (family, method)."""
    return {f"{family}_{method}": (family, method) for family in family_names() for method in method_names()}


def _merged(name: str, family: str, method: str) -> dict[Any, Any]:
    """The config of FAMILY_METHOD: the method's preset, then the family's values, then those for this method only."""
    tree = read_yaml(FOLDER / "methods" / f"{method}.yaml")
    values = _family(family)
    about = f"{values.pop('title')} distilled with {tree.pop('about')}; needs {tree.pop('needs')}."
    special = values.pop("for_method", {}).get(method, {})
    return {"name": name, "about": about, **_updated(_updated(tree, values), special)}


def _family(name: str) -> dict[Any, Any]:
    """The values of families/NAME.yaml, on top of those of the preset that it extends, but for its ``for_method``."""
    values = read_yaml(FOLDER / "families" / f"{name}.yaml")
    if "extends" not in values:
        return values
    base = _family(values.pop("extends"))
    base.pop("for_method", None)
    return _updated(base, values)


def _updated(tree: dict[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """``tree`` with ``values`` set, section by section."""
    both = {key: _updated(tree[key], value) for key, value in values.items() if isinstance(tree.get(key), dict)}
    return tree | values | both


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
