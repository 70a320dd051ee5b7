"""Draws belong to samples: pure functions of (seed, step, sample, purpose, i), and good random numbers."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gdmd
from gdmd.diffusion.rng import SampleRng, philox

SHAPE = (2, 3, 3)


def at(*index: int, seed: int = 5, step: int = 7) -> SampleRng:
    return SampleRng(seed, step, torch.tensor(index))


def draws(rng: SampleRng, i: int = 0) -> dict[str, Tensor]:
    return {
        "uniform": rng.uniform("t", i),
        "several": rng.uniform("t", i, count=7),
        "normal": rng.normal("noise", SHAPE, i),
        "integer": rng.integer("tau", 2**31, i),
    }


def words(counter: int, key: int) -> list[str]:
    cells = (torch.tensor([counter]),) * 4
    return [f"{word.item():08x}" for word in philox(cells, (key, key))]


def test_philox_gives_the_known_answers_of_random123() -> None:
    assert words(0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(0xFFFFFFFF, 0xFFFFFFFF) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = tuple(torch.tensor([w]) for w in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    found = [f"{w.item():08x}" for w in philox(pi, (0xA4093822, 0x299F31D0))]
    assert found == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_draws_belong_to_the_sample() -> None:
    """The same alone, in a batch, in any order and after a split."""
    whole = draws(at(0, 1, 2, 3, 4, 5))
    shuffled, first, second, alone = draws(at(4, 0, 3)), draws(at(0, 1, 2)), draws(at(3, 4, 5)), draws(at(4))
    for name, value in whole.items():
        assert torch.equal(shuffled[name], value[[4, 0, 3]])
        assert torch.equal(torch.cat([first[name], second[name]]), value)
        assert torch.equal(alone[name], value[4:5])


def test_draws_ignore_torch_generators_and_the_order_of_calls() -> None:
    before = draws(at(1, 2))
    torch.manual_seed(99)
    at(1, 2).normal("other", SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in draws(at(1, 2)).items())


def test_a_larger_draw_begins_with_the_smaller_one() -> None:
    assert torch.equal(at(0, 1).uniform("t", count=9)[:, :4], at(0, 1).uniform("t", count=4))
    assert torch.equal(at(0, 1).normal("n", (9,))[:, :4], at(0, 1).normal("n", (4,)))


def test_every_part_of_the_key_changes_every_draw() -> None:
    base = draws(at(3))
    others = [draws(at(4)), draws(at(3, step=8)), draws(at(3, seed=6)), draws(at(3), i=1), draws(at(3, seed=5 + 2**32))]
    for other in others:
        assert all(not torch.equal(value, base[name]) for name, value in other.items())
    assert not torch.equal(at(3).uniform("fake_t"), at(3).uniform("renoise_t"))


def test_seed_step_and_sample_do_not_stand_in_for_each_other() -> None:
    keys = [(seed, step, sample) for seed in range(6) for step in range(6) for sample in range(6)]
    drawn = {at(sample, seed=seed, step=step).integer("x", 2**31).item() for seed, step, sample in keys}
    assert len(drawn) == len(keys)


def test_another_step_is_reached_with_at() -> None:
    assert torch.equal(at(1, 2).at(40).uniform("t"), at(1, 2, step=40).uniform("t"))


def test_a_scope_gives_independent_draws() -> None:
    """The scope also applies on the host, and scopes nest."""
    base, other = draws(at(3)), draws(at(3).scoped("fake_samples/1"))
    assert all(not torch.equal(value, base[name]) for name, value in other.items())
    assert torch.equal(at(3).scoped("a").on_host().uniform("t"), at(3).scoped("a").uniform("t"))
    assert torch.equal(at(3).scoped("a").scoped("b").uniform("t"), at(3).uniform("a/b/t"))


def test_no_two_purposes_of_the_package_share_a_stream() -> None:
    """The stream number is crc32(purpose) + 0x9E3779B1 i; ``i`` stays below 256 everywhere."""
    folder = Path(gdmd.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
    found = set(re.findall(r'\.(?:uniform|normal|integer)\(\s*"(\w+)"', text))
    assert {"noise", "rollout", "tau", "fake_t", "fake_eps", "renoise_t", "renoise_eps", "prompt"} <= found
    streams = {(zlib.crc32(p.encode()) + 0x9E3779B1 * i) & 0xFFFFFFFF for p in found for i in range(256)}
    assert len(streams) == 256 * len(found)


def test_uniform_draws_are_uniform() -> None:
    unit = SampleRng(0, 0, torch.arange(2000)).uniform("t", count=32).flatten()
    assert unit.mean().item() == pytest.approx(0.5, abs=0.005)
    assert unit.var().item() == pytest.approx(1 / 12, abs=0.001)
    assert kolmogorov_smirnov(unit.double()) < 1.95  # p about 0.001
    assert kolmogorov_smirnov(SampleRng(0, 0, torch.arange(20000)).uniform("t").double()) < 1.95


def test_normal_draws_are_normal_also_across_samples_and_steps() -> None:
    drawn = SampleRng(1, 0, torch.arange(500)).normal("eps", (4, 4, 4)).double()
    other = SampleRng(1, 1, torch.arange(500)).normal("eps", (4, 4, 4)).double()
    flat = drawn.flatten()
    assert flat.mean().item() == pytest.approx(0, abs=0.02) and flat.var().item() == pytest.approx(1, abs=0.03)
    assert (flat**3).mean().item() == pytest.approx(0, abs=0.07)
    assert (flat**4).mean().item() == pytest.approx(3, abs=0.2)
    assert kolmogorov_smirnov(0.5 * (1 + torch.erf(flat / math.sqrt(2)))) < 1.95
    for second in (drawn.roll(1, 0), drawn.flatten(1).roll(1, 1).reshape(drawn.shape), other):
        assert abs((drawn * second).mean().item()) < 4 / math.sqrt(flat.numel())


def test_integers_are_uniform_and_stay_below_their_bound() -> None:
    drawn = SampleRng(2, 0, torch.arange(20000)).integer("tau", 4)
    counts = torch.bincount(drawn, minlength=4).double()
    assert len(counts) == 4 and ((counts - 5000) ** 2 / 5000).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_low_and_high_scale_the_interval() -> None:
    unit, scaled = at(0, 1, 2).uniform("t"), at(0, 1, 2).uniform("t", low=0.02, high=0.98)
    torch.testing.assert_close(scaled, 0.02 + 0.96 * unit)


@pytest.mark.parametrize("word", [0, 1, 0x7FFFFFFF, 0xFFFFFF00, 0xFFFFFFFF])
def test_draws_are_bounded(word: int) -> None:
    """No uniform draw is 0 or 1, no normal draw is infinite."""

    class Fixed(SampleRng):
        def _words(self, purpose: str, i: int, count: int) -> tuple[Tensor, ...]:
            return (torch.full((1, -(-count // 4)), word),) * 4

    rng = Fixed(0, 0, torch.zeros(1, dtype=torch.int64))
    assert 0 < rng.uniform("t").item() < 1
    assert rng.normal("n", (4,)).isfinite().all() and 0 <= rng.integer("k", 7).item() < 7


def kolmogorov_smirnov(unit: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the uniform one."""
    n = len(unit)
    ordered, steps = unit.sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
    return math.sqrt(n) * gap.item()
