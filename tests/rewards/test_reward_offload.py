"""A reward with ``offload`` is on its device while it works, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdmd.rewards.base import Placement, PretrainedReward, already
from gdmd.rewards.composite import Composite, Part
from gdmd.types import PromptBatch

SIDE = 8
PROMPTS = PromptBatch(torch.arange(2), ("a", "b"), torch.arange(2), {}, {})
AWAY, HOME = "cpu:0", "cpu"
"""The device of the rewards here is the first CPU: another name of the same memory, so that moves can be told apart."""


class Net(nn.Module):
    """A network that writes down where it is sent."""

    def __init__(self, name: str, moves: list[str]) -> None:
        super().__init__()
        self.layer, self.name, self.moves = nn.Linear(3 * SIDE * SIDE, 1), name, moves

    def to(self, *place: Any, **how: Any) -> Net:
        if place[0] in (AWAY, HOME):
            self.moves.append(f"{self.name} {place[0]}")
        return super().to(*place, **how)


class Small(PretrainedReward):
    @staticmethod
    def _image_size(net: Any) -> int:
        return SIDE

    def _formula(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        scores: Tensor = self.loaded.net.layer(pixels.flatten(1))[:, 0]
        return scores


def small(name: str, moves: list[str], *, offload: bool, chunk: int = 0) -> Small:
    torch.manual_seed(0)
    return Small(name, already(Net(name, moves), None), Placement(AWAY, offload=offload, chunk=chunk))


def images() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [0, 1])
def test_it_makes_one_visit_per_call_whatever_its_chunks(chunk: int) -> None:
    moves: list[str] = []
    reward = small("r", moves, offload=True, chunk=chunk)
    with torch.no_grad():
        first, second = (reward.score(images(), PROMPTS) for _ in range(2))
    assert moves == [f"r {AWAY}", f"r {HOME}"] * 2
    resident: list[str] = []
    stays = small("r", resident, offload=False)
    with torch.no_grad():
        third = stays.score(images(), PROMPTS)
    assert resident == [f"r {AWAY}"]
    assert torch.equal(first, second) and torch.allclose(first, third)


def test_it_stays_for_its_backward_pass_and_leaves_after_the_next_call_without() -> None:
    moves: list[str] = []
    reward, pixels = small("r", moves, offload=True), images().requires_grad_()
    reward.score(pixels, PROMPTS).sum().backward()
    assert moves == [f"r {AWAY}"] and pixels.grad is not None and pixels.grad.any()
    with torch.no_grad():
        reward.score(images(), PROMPTS)
    assert moves[1:] == [f"r {AWAY}", f"r {HOME}"]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("broken", ["network", "score"])
def test_it_leaves_after_an_error(broken: str, gradient: bool) -> None:
    moves: list[str] = []
    reward = small("r", moves, offload=True)
    layer = reward.loaded.net.layer
    if broken == "network":
        reward.loaded.net.layer = nn.Linear(1, 1)
    else:
        layer.weight.data.fill_(torch.nan)
    with torch.set_grad_enabled(gradient), pytest.raises((RuntimeError, ValueError)):
        reward.score(images(), PROMPTS)
    assert moves == [f"r {AWAY}", f"r {HOME}"]


def test_the_parts_of_a_composite_are_never_there_together() -> None:
    moves: list[str] = []
    both = Composite([Part(small(name, moves, offload=True)) for name in ("one", "two")])
    with torch.no_grad():
        both.score(images(), PROMPTS)
    assert moves == [f"one {AWAY}", f"one {HOME}", f"two {AWAY}", f"two {HOME}"]
