"""Guidance that keeps the norm of every token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdmd.diffusion.guidance import KeepTokenNorm
from gdmd.diffusion.schedule import FlowSchedule, from_velocity
from gdmd.types import Prediction

T = torch.tensor([0.2, 0.9], dtype=torch.float64)
SHAPE = (2, 3, 4, 6)


def answers(seed: int = 0) -> tuple[Tensor, Prediction, Prediction]:
    draw = torch.Generator().manual_seed(seed)
    x_t, cond, uncond = (torch.randn(SHAPE, dtype=torch.float64, generator=draw) for _ in range(3))
    schedule = FlowSchedule()
    return x_t, from_velocity(cond, x_t, T, schedule), from_velocity(uncond, x_t, T, schedule)


def tokens(v: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, tokens, values], written independently of the code under test."""
    return torch.nn.functional.unfold(v, patch, stride=patch).transpose(1, 2)


@pytest.mark.parametrize("patch", [1, 2])
def test_token_norms(patch: int) -> None:
    """Each token keeps its direction and has the norm of the conditional one."""
    _, cond, uncond = answers()
    v = tokens(KeepTokenNorm(patch)(cond, uncond, 4.0, T).velocity, patch)
    mixed = tokens(uncond.velocity + 4.0 * (cond.velocity - uncond.velocity), patch)
    own = tokens(cond.velocity, patch)
    wanted = mixed * own.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(v, wanted)
    assert (v - mixed).abs().mean() > 0.1


def test_both_parts_of_the_answer_still_make_the_noisy_latent() -> None:
    x_t, cond, uncond = answers()
    guided = KeepTokenNorm(2)(cond, uncond, 4.0, T)
    t = T.view(-1, 1, 1, 1)
    torch.testing.assert_close((1 - t) * guided.x0 + t * guided.eps, x_t)
