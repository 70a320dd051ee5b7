"""Student's t, paired tests and Holm's correction against tabulated and hand-computed values."""

from __future__ import annotations

import math

import pytest

from gdmd.reporting.statistics import (
    holm,
    incomplete_beta,
    paired_t,
    summarize,
    t_cdf,
    t_quantile,
    two_sided_p,
)


@pytest.mark.parametrize(
    ("probability", "dof", "tabulated"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 4, 2.7764), (0.975, 9, 2.2622), (0.975, 30, 2.0423)]
    + [(0.95, 4, 2.1318), (0.995, 4, 4.6041), (0.9995, 10, 4.5869), (0.975, 1000, 1.9623)],
)
def test_quantiles_are_those_of_the_printed_table(probability: float, dof: int, tabulated: float) -> None:
    assert t_quantile(probability, dof) == pytest.approx(tabulated, abs=6e-5)
    assert t_quantile(1 - probability, dof) == -t_quantile(probability, dof)
    assert t_cdf(t_quantile(probability, dof), dof) == pytest.approx(probability, abs=1e-13)


@pytest.mark.parametrize("t", [-7.0, -1.3, 0.0, 0.4, 2.0, 25.0])
def test_the_distribution_agrees_with_its_elementary_forms(t: float) -> None:
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)  # Cauchy
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)
    angle = math.atan(t / 2)  # four degrees of freedom
    assert t_cdf(t, 4) == pytest.approx(0.5 + math.sin(angle) * (1 + math.cos(angle) ** 2 / 2) / 2, abs=1e-14)


def test_the_incomplete_beta_function_agrees_with_polynomials() -> None:
    for x in (0.01, 0.3, 0.5, 0.77, 0.999):
        assert incomplete_beta(1, 1, x) == pytest.approx(x, rel=1e-13)
        assert incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4, rel=1e-12)
    with pytest.raises(ValueError, match="needs a, b > 0"):
        incomplete_beta(0, 1, 0.5)


def test_an_interval_is_the_t_interval_of_the_mean() -> None:
    found = summarize([0.52, 0.55, 0.49, 0.58, 0.51])
    assert found.mean == pytest.approx(0.53)
    assert found.std == pytest.approx(0.035355339, rel=1e-8)
    assert found.high - found.mean == pytest.approx(2.7764451 * 0.035355339 / math.sqrt(5), rel=1e-7)
    assert math.isnan(summarize([0.5]).std)
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_the_paired_test_is_that_of_students_sleep_data() -> None:
    """Student (1908): extra sleep under two drugs, ten patients; t = 4.0621, p = .002833."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired_t(second, first)
    assert found is not None
    assert (found.t, found.p) == (pytest.approx(4.0621, abs=5e-5), pytest.approx(0.002833, abs=5e-7))
    assert found.difference == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))


def test_only_common_seeds_are_paired_and_two_are_needed() -> None:
    assert paired_t({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}) is None
    found = paired_t({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 0.5, 7: 0.0})
    assert found is not None and found.count == 2 and found.difference == 0.75
    constant = paired_t({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
    assert constant is not None and constant.p == 0.0 and constant.t == math.inf
    nothing = paired_t({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert nothing is not None and nothing.p == pytest.approx(1.0)
    assert two_sided_p(0.0, 3) == pytest.approx(1.0)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert list(adjusted) == ["a", "b", "c", "d"]
