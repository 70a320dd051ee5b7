"""The shipped recipes: they load, train only on what they may, and gdmd_paper is the paper."""

import pytest

from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.config.methods.gdmd_tilted import GdmdTiltedConfig
from gdmd.recipes.read import read_recipe, recipe_names

UNSEEN = {"shapes_clip_heldout", "shapes_partial_credit"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_is_named_like_its_file(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.about


def test_the_names_that_scripts_rely_on_exist() -> None:
    assert {"shapes", "shapes_demo", "shapes_smoke", "gdmd_paper"} <= set(recipe_names())
    changed = read_recipe(
        "shapes",
        ["method.gamma=0.5", "method.group_size=2", "loop.steps=3", "loop.checkpoint_every=2", "loop.seed=9"],
    )
    assert isinstance(changed.method, GdmdTiltedConfig)
    assert (changed.method.gamma, changed.method.group_size) == (0.5, 2)
    assert (changed.loop.steps, changed.loop.checkpoint_every, changed.loop.seed) == (3, 2, 9)


@pytest.mark.parametrize(
    "name", ["shapes", "shapes_demo", "shapes_smoke", "gdmd_paper", "dmd_refl", "dmd_nft", "dmd_grpo"]
)
def test_students_are_trained_on_the_two_seen_scorers_only(name: str) -> None:
    kinds = {reward.kind for reward in read_recipe(name).rewards}
    assert kinds == {"shapes_clip", "shapes_pref"}
    assert not kinds & UNSEEN


def test_gdmd_paper_is_algorithm_1_with_its_inferred_defaults() -> None:
    method = read_recipe("gdmd_paper").method
    assert isinstance(method, GdmdConfig)
    assert (method.group_size, method.collection, method.old_policy) == (4, "all", "snapshot")
    assert method.dmd_weight == method.gamma == method.beta == 1.0
    assert (method.score_target, method.normalize) == ("normalized", True)
    assert method.student_input == "simulation"
