"""benchmarks/reward_gradients.py on one update."""

from __future__ import annotations

import pytest

from benchmarks.reward_gradients import sizes


def test_the_ratio_is_proportional_to_the_weight() -> None:
    (one,), (two,) = (sizes("dmd_refl", ("loop.batch_size=4", f"method.rl_weight={w}"), 1) for w in (0.6, 1.2))
    assert 0 < one == pytest.approx(two / 2, rel=1e-3)
