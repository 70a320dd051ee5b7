"""Ratios over a run, and the curves of healthy runs that reports draw behind them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gdmd.config.metric_keys import metric_keys
from gdmd.evaluation.reference_curves import FILE, RATIOS, TARGETS, compared_panels, curves_of, references
from gdmd.evaluation.run_report import write_report
from gdmd.recipes.read import read_recipe

EFFECTIVE, GRADIENT = (RATIOS[k].title for k in (2, 5))


def rows(steps: int = 40) -> list[dict[str, float]]:
    """The gap is 1 or 2, the gradient 0 or 0.5; 4 of 8 targets count."""
    return [
        {"step": step, "gap/real": 1.0 + step % 2, "gap/grad": 0.5 * (step % 2), "weight/effective": 4.0}
        for step in range(1, steps + 1)
    ]


def test_curve_is_the_ratio_of_means_over_a_part_of_the_run() -> None:
    """A part has two rows: (0.5 + 0) / (2 + 1), not the mean of 0.25 and 0."""
    cfg = read_recipe("shapes_demo", ["loop.steps=40"])
    found = curves_of(rows(), cfg)
    assert list(found) == [EFFECTIVE, GRADIENT]
    assert found[GRADIENT] == [(pytest.approx((k + 0.5) / 20), pytest.approx(0.5 / 3)) for k in range(20)]
    assert {value for _, value in found[EFFECTIVE]} == {0.5}
    half = curves_of(rows(), read_recipe("shapes_demo", ["loop.steps=80"]))
    assert max(share for share, _ in half[GRADIENT]) < 0.5, "the run is half done"


def test_parts_without_a_positive_denominator_have_no_point() -> None:
    cfg = read_recipe("shapes_demo", ["loop.steps=40"])
    negative = [row | ({"gap/real": -1.0} if row["step"] <= 20 else {}) for row in rows()]
    assert min(share for share, _ in curves_of(negative, cfg)[GRADIENT]) > 0.5
    assert GRADIENT not in curves_of([row | {"gap/grad": math.nan} for row in rows()], cfg)
    assert EFFECTIVE not in curves_of(rows(), read_recipe("gdmd_paper", ["loop.steps=40"])), "its number is not eta K"


def test_ratios_read_keys_that_are_logged() -> None:
    logged = {key for name in ("shapes_gradient", "gdmd_paper") for key in metric_keys(read_recipe(name))}
    assert {key for ratio in RATIOS for key in (ratio.over, ratio.under)} - {"", TARGETS} <= logged


def test_shipped_curves() -> None:
    """The file is small. No healthy run of Algorithm 1 or with a reward gradient is in it."""
    assert FILE.stat().st_size < 16_000 and len(references()) >= 2
    covered = set()
    for one in references():
        assert one.command.startswith("gdmd ") and "/" not in one.command
        assert all(0 < share < 1 and math.isfinite(value) for curve in one.curves.values() for share, value in curve)
        covered |= set(one.curves)
    assert covered == {ratio.title for k, ratio in enumerate(RATIOS) if k not in (3, 6)}


def test_page_draws_healthy_runs_behind_the_curves_of_the_run(tmp_path: Path) -> None:
    cfg = read_recipe("shapes_demo", ["loop.steps=40"])
    titles = [title for title, _, _ in compared_panels(rows(), cfg)]
    assert titles == [EFFECTIVE, GRADIENT]
    page = write_report(tmp_path, "run", {}, metrics={"run": rows()}, configs={"run": cfg}).read_text()
    assert "Next to healthy runs" in page and "this run" in page and references()[0].name in page
    bare = write_report(tmp_path, "run", {}, metrics={"run": rows()}).read_text()
    assert "Next to healthy runs" not in bare
