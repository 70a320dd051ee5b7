"""The moving average follows its formula, keeps fp32, and restores the parameters it was swapped in for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from gdmd.training.ema import Ema


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Parameter]:
    return {"a": Parameter(torch.tensor([1.0, -2.0], dtype=dtype)), "b": Parameter(torch.tensor(3.0, dtype=dtype))}


@torch.no_grad()
def set_all(named: dict[str, Parameter], value: float) -> None:
    for parameter in named.values():
        parameter.fill_(value)


def test_starts_as_a_copy() -> None:
    named = parameters()
    ema = Ema(named, 0.9)
    set_all(named, 7.0)
    assert ema.shadow["a"].tolist() == [1.0, -2.0]


def test_updates_follow_the_formula() -> None:
    named = parameters()
    ema, expected = Ema(named, 0.9), torch.tensor([1.0, -2.0], dtype=torch.float64)
    for value in (5.0, 6.0, -1.0):
        set_all(named, value)
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    assert torch.allclose(ema.shadow["a"], expected, rtol=0, atol=1e-14)
    assert ema.updates == 3


def test_warmup_limits_the_first_decays() -> None:
    ema = Ema(parameters(), 0.99, warmup=True)
    assert ema.decay_at(0) == pytest.approx(1 / 10)
    assert ema.decay_at(90) == pytest.approx(91 / 100)
    assert ema.decay_at(10_000) == 0.99
    assert Ema(parameters(), 0.99).decay_at(0) == 0.99


def test_half_precision_weights_have_an_fp32_average() -> None:
    named = parameters(torch.bfloat16)
    ema = Ema(named, 0.999)
    set_all(named, 1.5)
    ema.update()
    assert ema.shadow["a"].dtype == torch.float32
    assert 1.0 < ema.shadow["a"][0].item() < 1.001


def test_swapped_in_restores_the_parameters_after_an_error() -> None:
    named = parameters()
    ema = Ema(named, 0.5)
    set_all(named, 4.1)
    ema.update()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        assert torch.equal(named["a"], ema.shadow["a"])
        raise RuntimeError("inside")
    assert all(torch.equal(named[name], before[name]) for name in named)
    assert not torch.equal(named["a"], ema.shadow["a"])


def test_loaded_average_continues() -> None:
    named = parameters()
    first = Ema(named, 0.99, warmup=True)
    set_all(named, 5.0)
    first.update()
    second = Ema(named, 0.99, warmup=True)
    second.load(first.shadow, first.updates)
    for ema in (first, second):
        ema.update()
    assert torch.equal(first.shadow["a"], second.shadow["a"])


def test_average_of_another_network() -> None:
    ema = Ema(parameters(), 0.9)
    with pytest.raises(ValueError, match=r"the EMA: missing \['b'\], unknown \['c'\]"):
        ema.load({"a": torch.zeros(2), "c": torch.zeros(())}, 1)
    with pytest.raises(ValueError, match=r"a has shape \(2,\), the saved one \(3,\)"):
        ema.load({"a": torch.zeros(3), "b": torch.zeros(())}, 1)
