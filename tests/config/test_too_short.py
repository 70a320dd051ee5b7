"""Warnings about runs that are too short for what they set."""

from __future__ import annotations

import pytest
from cli_world import Gdmd

from gdmd.config.too_short import too_short
from gdmd.recipes.read import read_recipe


@pytest.mark.parametrize(
    ("recipe", "words", "messages"),
    [
        ("dmdr", (), []),
        ("dmdr", ("loop.steps=201",), []),
        ("dmdr", ("loop.steps=200",), ["stage 2 is not reached, and the refl loss never acts"]),
        ("dmdr", ("loop.steps=199", "method.rl_weight=0"), ["DynaDG and DynaRS are not annealed"]),
        ("dmdr", ("loop.steps=9",), ["method.cold_start = 200, but the run makes 9", "method.anneal = 200"]),
        ("shapes_smoke", ("loop.warmup=24",), []),
        ("shapes_smoke", ("loop.warmup=48",), ["24 student updates (loop.steps = 12): the learning rates rise to 50%"]),
        ("shapes_smoke", ("loop.steps=50", "loop.ema=0.999"), ["will hold 90% of the initial weights"]),
        ("shapes_smoke", ("loop.steps=50", "loop.ema=0.999", "loop.ema_warmup=true"), []),
        ("shapes_smoke", ("loop.steps=50",), []),
    ],
)  # fmt: skip
def test_what_a_run_does_not_reach(recipe: str, words: tuple[str, ...], messages: list[str]) -> None:
    found = list(too_short(read_recipe(recipe, words)))
    assert len(found) == len(messages)
    assert all(message in one for message, one in zip(messages, found, strict=True))


def test_training_prints_the_warning(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.warmup=1000", "--run", "run")
    assert finished.code == 0 and "warning: loop.warmup = 1000, but the run makes" in finished.err
