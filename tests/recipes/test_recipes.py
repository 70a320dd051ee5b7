"""The shipped recipes: they load, presets merge as documented, students train on the allowed scorers only."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gdmd.config.load import ConfigError
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.recipes.read import FOLDER, family_names, method_names, read_recipe, recipe_names, shapes_names


def test_every_recipe_loads() -> None:
    recipes = {name: read_recipe(name) for name in recipe_names()}
    assert all(cfg.name == name and cfg.about for name, cfg in recipes.items())
    assert {"shapes", "shapes_demo", "shapes_smoke", "gdmd_paper", "sdxl_gdmd"} <= recipes.keys()


@pytest.mark.parametrize("family", family_names())
def test_family_recipes(family: str) -> None:
    """Every method makes 3,000 student updates with a student of 4 or 8 steps; both sides can be set to 512 pixels."""
    for method in method_names():
        cfg = read_recipe(f"{family}_{method}", ["model.height=512", "model.width=512"])
        assert isinstance(cfg.model, DiffusersModel) and family.startswith(str(cfg.model.family))
        assert cfg.method.kind.startswith(method)
        assert len(cfg.method.student_steps) == (8 if family == "z_image_turbo" else 4)
        assert cfg.loop.steps * (cfg.method.group_size if method == "gdmd" else 1) == 3000


def test_family_values_win_over_the_method_preset() -> None:
    """families/sdxl.yaml sets the guidance of all methods, and another learning rate for DMD2 only."""
    family = yaml.safe_load((FOLDER / "families" / "sdxl.yaml").read_text())
    method = yaml.safe_load((FOLDER / "methods" / "dmd2.yaml").read_text())
    special, plain = read_recipe("sdxl_dmd2"), read_recipe("sdxl_dmd")
    assert special.method.guidance == plain.method.guidance == family["method"]["guidance"]
    assert special.loop.lr_student == family["for_method"]["dmd2"]["loop"]["lr_student"] != plain.loop.lr_student
    assert special.loop.steps == method["loop"]["steps"] and special.model.lora_rank == method["model"]["lora_rank"]
    assert special.about == f"SDXL distilled with {method['about']}; needs {method['needs']}."


def test_a_turbo_pair_differs_from_its_base_in_the_student() -> None:
    """families/sdxl_lightning.yaml extends sdxl: same teacher and guidance, but not sdxl's rate for DMD2."""
    pair, base = (read_recipe(f"{name}_dmd2").model_dump() for name in ("sdxl_lightning", "sdxl"))
    changed = {f"{part}.{key}" for part in base for key in _keys(base[part]) if pair[part][key] != base[part][key]}
    assert changed == {"model.student_lora", "method.student_sampler", "loop.lr_student", "loop.lr_fake"}
    assert pair["loop"]["lr_student"] == 3e-6


def _keys(section: Any) -> Any:
    return section if isinstance(section, dict) else ()


def test_errors_in_overrides_name_the_recipe() -> None:
    with pytest.raises(ConfigError, match=r"^sdxl_gdmd \(override 'loop.stps=3'\): loop.stps: .*'steps'"):
        read_recipe("sdxl_gdmd", ["loop.stps=3"])
    with pytest.raises(ConfigError, match="unknown recipe 'sdxl_gdmdd'; did you mean 'sdxl_gdmd'"):
        read_recipe("sdxl_gdmdd")


@pytest.mark.parametrize("name", ["x" * 5000 + ".yaml", "a\0b.yaml", "x" * 100_000, "", ".yaml", "/.yaml"])
def test_names_that_cannot_be_files(name: str) -> None:
    with pytest.raises(ConfigError):
        read_recipe(name)


def test_students_train_on_the_two_seen_scorers_only() -> None:
    for name in shapes_names():
        assert {reward.kind for reward in read_recipe(name).rewards} <= {"shapes_clip", "shapes_pref"}, name


def test_gdmd_paper_is_algorithm_1() -> None:
    method = read_recipe("gdmd_paper").method
    assert isinstance(method, GDMDConfig)
    assert (method.group_size, method.collection, method.old_policy) == (4, "all", "snapshot")
    assert method.dmd_weight == method.gamma == method.beta == 1.0
    assert (method.scored_step, method.normalize) == (0.3, False)
    assert method.student_input == "simulation"


def test_wrong_dmdr_recipes_are_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="method dmdr reads rewards"):
        read_recipe("dmdr", ["rewards=[]"])
    read_recipe("dmdr", ["rewards=[]", "method.rl_weight=0", "method.tilt=0"])
    with pytest.raises(ConfigError, match="compares 8 images per prompt"):
        read_recipe("dmdr", ["method.strategy=dpo", "loop.batch_size=12"])
