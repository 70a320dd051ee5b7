"""From the arguments of a ``DistillationTrainer`` to a recipe: a shipped one with what the caller set on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic_core import PydanticSerializationError, to_jsonable_python

from gdmd.config.load import ConfigError, load_config
from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.base import DistillationConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import is_shapes_pipeline
from gdmd.config.training_config import TrainingConfig
from gdmd.data.prompt_files import PromptFile
from gdmd.data.prompts import prompts_from
from gdmd.diffusion.device import DTYPES
from gdmd.models.loading import family_of, family_of_pipeline, local_or_hub_index
from gdmd.recipes.build_rewards import reward_specs
from gdmd.recipes.objects import PYTHON, GivenObjects
from gdmd.recipes.read import method_names, read_recipe

T = TypeVar("T")
SHAPES = "shapes"
"""The model that ships with the package: the Shapes teacher."""
_SHAPES_RECIPES = {"gdmd": "gdmd_paper", "gdmd_tilted": "shapes_demo"}
"""Recipes of the Shapes teacher by method.kind; those of other methods have its name."""
_FAMILY_PRESETS = {"gdmd_tilted": "gdmd"}
"""Method presets of real models by method.kind; other methods have a preset of their name, or start from this one's."""
_SECTIONS = ("loop", "validation", "eval")
"""Sections without a kind, whose fields all have a default: given in part, one would silently reset the others."""
_OF_FILES = (
    *("student", "student_lora", "teacher_loras", "embeddings", "quantization", "t5", "variant", "revision"),
    *("student_revision", "student_variant"),
)
"""Fields of a model that say what is read from its files, and how: an open pipeline is used as it is."""


def recipe_from(
    model: Any,
    method: MethodConfig | None,
    reward_funcs: Sequence[Any] | Any | None,
    train_dataset: Any,
    args: TrainingConfig,
    world_size: int = 1,
) -> tuple[RunConfig, GivenObjects]:
    """The recipe and the Python objects that stand for parts of it. ConfigError lists all mistakes at once.

    model: "shapes", shapes:NAME, a folder, a hub id or an open pipeline. method: None = that of the recipe.
    reward_funcs: one or several rewards, functions or configs; None = those of the recipe. train_dataset: None = that of the
    recipe.
    """
    _check_types(method, args)
    errors: list[str] = []
    base = _tried(lambda: _base_recipe(model, method, args), errors)
    given: dict[str, Any] = {}
    functions: Mapping[str, Callable[..., Any]] = {}
    if reward_funcs is not None:
        listed = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if found := _tried(lambda: reward_specs(listed), errors):
            given["rewards"], functions = [spec.model_dump(mode="json") for spec in found[0]], found[1]
    prompts: PromptFile | None = None
    if isinstance(train_dataset, str | Path):
        given["prompts"] = {"file": str(train_dataset)}
    elif train_dataset is not None:
        given["prompts"], prompts = {}, _tried(lambda: prompts_from(train_dataset), errors)
    if base is None:
        raise ConfigError(errors)
    tree = base.model_dump(mode="json") | given
    tree["method"] = _method_section(tree["method"], method)
    tree["model"] = _model_section(tree["model"], model)
    cfg = _checked(tree, args.recipe_values(world_size), errors)
    if reward_funcs is not None and cfg.rewards and not cfg.method.rewarded:
        raise ConfigError([f"reward_funcs: method {cfg.method.kind} as set here reads no rewards; leave them out"])
    pipeline = None if isinstance(model, str | Path) else model
    if pipeline is not None and isinstance(cfg.model, DiffusersModel):
        set_ = [name for name in _OF_FILES if getattr(cfg.model, name) != DiffusersModel.model_fields[name].default]
        advice = "cannot be used with an open pipeline; give the teacher as a folder or hub id"
        mistakes = [f"model.{one}: {advice}" for one in set_]
        if cfg.needs_real:  # the open pipeline may have another VAE
            mistakes.append(f"{cfg.needs_real} reads latents of the VAE in the model's files, and {advice}")
        if mistakes:
            raise ConfigError(mistakes)
    return cfg, GivenObjects(pipeline, functions, prompts)


def _base_recipe(model: Any, method: MethodConfig | None, args: TrainingConfig) -> RunConfig:
    """The recipe to start from. ValueError if there is none for the model, or if it is for another kind of model."""
    base = read_recipe(args.recipe or _recipe_name(model, method.kind if method else "gdmd_tilted"))
    if (model == SHAPES) != (base.model.kind == "shapes"):
        raise ConfigError([f"recipe {base.name} is for a model of kind {base.model.kind}, and model is {model!r:.80}"])
    return base


def _tried(make: Callable[[], T], errors: list[str]) -> T | None:
    """What ``make`` returns; the lines of its ValueError go to ``errors``."""
    try:
        return make()
    except ValueError as error:
        errors += str(error).splitlines()
        return None


def _checked(tree: dict[Any, Any], values: Mapping[str, Any], errors: Sequence[str]) -> RunConfig:
    """The recipe with these values by their path. ConfigError with ``errors`` and all mistakes in it."""
    mistakes, overrides = [*errors], []
    for path, value in values.items():
        if path in _SECTIONS and isinstance(value, Mapping):
            mistakes.append(
                f"overrides: {path}: got {value!r:.80}: this would reset the other fields of the section to their defaults; "
                f'give each field by its path, such as "{path}.{next(iter(value), "steps")}"'
            )
            continue
        try:
            plain = to_jsonable_python(value)
        except PydanticSerializationError:
            mistakes.append(f"overrides: {path}: got {value!r:.80}: give numbers, texts, lists, mappings or configs")
            continue
        text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf, sort_keys=False).removesuffix("...\n")
        overrides.append(f"{path}={text.strip()}")
    cfg = _tried(lambda: load_config(RunConfig, tree, overrides, where="DistillationTrainer"), mistakes)
    if mistakes or cfg is None:
        raise ConfigError(mistakes)
    return cfg


def _check_types(method: Any, args: Any) -> None:
    """ConfigError for a method or args of another type than a config."""
    expected = (
        (method, DistillationConfig, "method", "GDMDConfig()"),
        (args, TrainingConfig, "args", "TrainingConfig()"),
    )
    wrong = [
        f"{name}: got {given!r:.80}: give a config object, such as {example}"
        for given, kind, name, example in expected
        if given is not None and not isinstance(given, kind)
    ]
    if wrong:
        raise ConfigError(wrong)


def _recipe_name(model: Any, kind: str) -> str:
    """The shipped recipe for this model and method."""
    if model == SHAPES:
        return _SHAPES_RECIPES.get(kind, kind)
    path = _path(model)
    if isinstance(model, str | Path):
        cfg = DiffusersModel.model_construct(path=path)
        family = family_of(local_or_hub_index(cfg), cfg).name
    else:
        found = family_of_pipeline(model)
        if found is None:
            raise ValueError(
                f"model: got {type(model).__name__}: give a hub id, a folder, or an open text-to-image pipeline of diffusers"
            )
        family = found.name
    if is_shapes_pipeline(path):
        return f"shapes_{family}"
    preset = _FAMILY_PRESETS.get(kind, kind)
    return f"{family}_{preset if preset in method_names() else 'gdmd'}"


def _path(model: Any) -> str:
    """model.path: for an open pipeline what it was loaded from, which may not be what it is now."""
    if isinstance(model, str | Path):
        return str(model)
    return str(getattr(model, "config", {}).get("_name_or_path") or f"{PYTHON}{type(model).__name__}")


def _model_section(section: Mapping[str, Any], model: Any) -> dict[str, Any]:
    if model == SHAPES:
        return dict(section)
    changed: dict[str, Any] = {"path": _path(model)}
    if not isinstance(model, str | Path):
        names = {dtype: name for name, dtype in DTYPES.items()}
        changed |= dict.fromkeys(("embeddings", "revision", "variant"))
        changed |= {"dtype": names.get(model.dtype, str(model.dtype))}
    return {**section, **changed}


def _method_section(section: Mapping[str, Any], method: MethodConfig | None) -> dict[str, Any]:
    """The recipe's method with the fields that the caller set; of another method it keeps what all methods share."""
    if method is None:
        return dict(section)
    given = method.model_dump(mode="json", include=method.model_fields_set)
    shared = section if section["kind"] == method.kind else {k: section[k] for k in DistillationConfig.model_fields}
    return {**shared, **given, "kind": method.kind}
