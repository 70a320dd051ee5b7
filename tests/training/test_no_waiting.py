"""The host waits for a GPU once per optimizer step (bad numbers stop there) and nowhere else in an iteration.

Without a GPU only the parts are tested; ``gdmd profile`` counts the waits of any recipe on a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from gdmd.diffusion import device
from gdmd.diffusion.device import confirmed, deferred_checks, raise_where, to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.rewards.preprocessing import check_finite
from gdmd.training.role_state import role_states

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("recipe", ["shapes", "gdmd_paper", "dmd", "dmd2", "dmdr", "dmd_refl", "dmd_grpo", "dmd_nft"])
def test_one_wait_per_update(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """Every other synchronization raises an error."""
    cfg = read_recipe(recipe, ["loop.batch_size=8", "loop.threads=1"])
    components, read, reads = build(cfg, "cuda"), device._read, []
    states = role_states(components.roles, cfg.loop)
    batches = [components.stream.at(step) for step in range(2)]

    def iterate(step: int) -> int:
        """One outer iteration; the number of its updates."""
        before, prompts = sum(state.updates for state in states.values()), batches[step]
        with deferred_checks():
            for update in components.method.iteration(step, prompts, SampleRng(0, step, prompts.index, prompts.host)):
                states[update.role].apply(update)
        return sum(state.updates for state in states.values()) - before

    def allowed(*given: Any) -> list[bool]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            reads.append(read(*given))
        finally:
            torch.cuda.set_sync_debug_mode("error")
        return reads[-1]

    iterate(0)  # moves tables to the device
    monkeypatch.setattr(device, "_read", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        updates = iterate(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert updates >= 2 and len([values for values in reads if values]) == updates


@gpu
def test_deferred_checks_stop_before_the_step() -> None:
    """A score that is not finite is reported by the next read, or at the end of the block."""
    scores = torch.tensor([0.0, torch.nan], device="cuda")
    endings: list[Callable[[], Any]] = [
        lambda: confirmed(torch.ones((), dtype=torch.bool, device="cuda")),
        lambda: confirmed(torch.ones((), dtype=torch.bool)),  # a student on the host, a reward on the GPU
        lambda: None,
    ]
    for ending in endings:
        with pytest.raises(ValueError, match=r"aesthetic gave a score .* at samples 1 \('b'\)"), deferred_checks():
            check_finite("aesthetic", scores, ("a", "b"))  # only noted
            ending()
    with pytest.raises(ValueError, match="aesthetic"):
        check_finite("aesthetic", scores, ("a", "b"))


def test_a_copy_to_the_host_blocks() -> None:
    """A reward function on a GPU scores images on the host: its scores are read as soon as they are there."""
    scores = Mock(device=torch.device("cuda"))
    to_device_async(scores, "cpu")
    scores.to.assert_called_once_with(torch.device("cpu"), non_blocking=False)
    images = Mock(device=torch.device("cpu"))
    to_device_async(images, "cuda")
    images.pin_memory().to.assert_called_once_with(torch.device("cuda"), non_blocking=True)


def test_checks_on_the_host_are_immediate() -> None:
    with deferred_checks(), pytest.raises(ValueError, match=r"\[2\]"):
        raise_where(torch.tensor([False, False, True]), lambda bad: ValueError(str(bad)))


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=gpu)])
def test_host_draws_equal_device_draws(place: str) -> None:
    index = torch.tensor([5, 0, 7])
    rng = SampleRng(3, 4, index.to(place), index)
    drawn = rng.at(9).on_host().integer("tau", 4)
    assert drawn.device.type == "cpu" and rng.at(9).integer("tau", 4).cpu().tolist() == drawn.tolist()
