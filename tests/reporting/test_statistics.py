"""t intervals, paired tests, Holm's correction and clustered bootstraps against published and hand-computed values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gdmd.reporting.statistics import (
    bootstrap_means,
    clustered_mean,
    holm,
    paired_difference,
    paired_t,
    speed,
    summarize,
    t_quantile,
)


@pytest.mark.parametrize(("dof", "tabulated"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (1000, 1.9623)])
def test_t_quantile_of_the_printed_table(dof: int, tabulated: float) -> None:
    assert t_quantile(dof) == pytest.approx(tabulated, abs=6e-5)


def test_summary_is_the_t_interval_of_the_mean() -> None:
    found = summarize([0.52, 0.55, 0.49, 0.58, 0.51])
    assert found.mean == pytest.approx(0.53)
    assert found.std == pytest.approx(0.035355339, rel=1e-8)
    assert found.high - found.mean == pytest.approx(2.7764451 * 0.035355339 / math.sqrt(5), rel=1e-7)
    assert math.isnan(summarize([0.5]).std)
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_paired_t_of_students_sleep_data() -> None:
    """Student (1908): extra sleep under two drugs, ten patients; t = 4.0621, p = .002833."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired_t(second, first)
    assert found is not None
    assert (found.t, found.p) == (pytest.approx(4.0621, abs=5e-5), pytest.approx(0.002833, abs=5e-7))
    assert found.difference == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))


def test_paired_t_uses_common_seeds_and_needs_two() -> None:
    assert paired_t({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None
    found = paired_t({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 0.5, 7: 0.0})
    assert found is not None and found.count == 2 and found.difference == 0.75


@pytest.mark.parametrize(("shift", "p"), [(0.1, 0.25), (-0.1, 0.25), (0.0, 1.0)])
def test_paired_t_without_spread(shift: float, p: float) -> None:
    """Equal differences of three seeds are no proof, whatever a t test makes of a spread of 0."""
    found = paired_t(dict.fromkeys(range(3), shift), dict.fromkeys(range(3), 0.0))
    assert found is not None and found.p == p and found.difference == pytest.approx(shift)
    assert math.isnan(found.t) and math.isnan(found.low) and math.isnan(found.high)


def test_paired_t_of_means_that_are_equal_but_for_rounding() -> None:
    a, b = sum([0.1, 0.2, 0.3, 0.0]) / 6, sum([0.3, 0.3, 0.0, 0.0]) / 6
    assert a != b
    found = paired_t({0: a, 1: a}, {0: b, 1: b})
    assert found is not None and abs(found.difference) < 1e-15 and found.p == 1.0


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_clustered_mean_counts_images_and_unscored() -> None:
    found = clustered_mean({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 6.0, (1, 1): math.nan})
    assert (found.mean, found.images, found.prompts, found.unscored) == (3.0, 3, 2, 1)
    assert found.low == 1.5 and found.high == 6.0
    none = clustered_mean({(0, 0): math.nan})
    assert math.isnan(none.mean) and none.unscored == 1
    assert math.isnan(clustered_mean({(0, 0): 1.0, (0, 1): 2.0}).low)  # one prompt has no interval


def test_bootstrap_draws_whole_clusters() -> None:
    """Four equal images per prompt: the interval is that of the 60 prompts, twice as wide as that of 240 images."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=60)
    copies = clustered_mean({(p, k): float(own[p]) for p in range(60) for k in range(4)})
    free = clustered_mean({(p * 4 + k, 0): float(own[p]) for p in range(60) for k in range(4)})
    half = 1.96 * own.std() / math.sqrt(60)
    assert (copies.high - copies.low) / 2 == pytest.approx(half, rel=0.12)
    assert (copies.high - copies.low) / (free.high - free.low) == pytest.approx(2, rel=0.12)


def test_bootstrap_of_equal_cluster_sizes_has_the_variance_of_the_mean() -> None:
    """Var = var(cluster means) / clusters; labels may be any values, and the blocks do not show."""
    assert np.isnan(bootstrap_means([0.0, 1.0, 1.0], "aaa", 9, np.random.default_rng(0))).all()  # one says nothing
    drawn = bootstrap_means([0.0, 0.0, 1.0, 1.0, 3.0, 3.0], list("aabbcc"), 20_050, np.random.default_rng(0))
    assert drawn.shape == (20_050,)
    assert drawn.mean() == pytest.approx(4 / 3, abs=0.02)
    assert drawn.var() == pytest.approx(np.var([0.0, 1.0, 3.0]) / 3, rel=0.03)


def test_paired_difference_cancels_what_both_share() -> None:
    rng = np.random.default_rng(1)
    hard = {(p, k): float(v) for p, row in enumerate(rng.normal(size=(50, 2))) for k, v in enumerate(row)}
    better = {place: value + 0.1 for place, value in hard.items()}
    better[(0, 0)], better[(0, 1)] = hard[(0, 0)], hard[(0, 1)] - 1
    found = paired_difference(better, hard)
    assert found.mean == pytest.approx((98 * 0.1 - 1) / 100) and found.wins == (98 + 0.5) / 100
    assert found.images == 100 and found.low < found.mean < found.high < 0.11


def test_speed_leaves_the_warm_up_out() -> None:
    rows = [{"images": 4, "seconds": 100.0, "first": 1}, {"images": 4, "seconds": 2.0, "first": 0}]
    assert speed(rows) == 0.5 and speed(rows[:1]) is None


def test_speed_of_one_batch_size_and_device() -> None:
    def row(images: int, seconds: float, batch: int, device: str = "cpu", first: int = 0) -> dict[str, Any]:
        return {"images": images, "seconds": seconds, "first": first, "batch": batch, "device": device}

    rows = [row(8, 80.0, 8, first=1), row(8, 8.0, 8), row(6, 6.0, 8), row(2, 8.0, 2), row(10, 1.0, 8, "a GPU")]
    assert speed(rows) == 1.0 and speed(rows[3:]) == 0.1 and speed(rows[:1]) is None
