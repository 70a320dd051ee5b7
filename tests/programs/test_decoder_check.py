"""How a rough decoder's scores are compared with the full one's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdmd.programs.decoder_check import decoder_gaps
from gdmd.types import PromptBatch

NAN = float("nan")


class Offset:
    """A decoder that shifts the image."""

    def __init__(self, by: list[float]) -> None:
        self.by = torch.tensor(by).reshape(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents + self.by

    def encode(self, images: Tensor) -> Tensor:
        return images


class Mean:
    name, differentiable = "mean", True

    def __init__(self, unscored: tuple[int, ...] = ()) -> None:
        self.unscored = unscored

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        scores = 10 * images.mean((1, 2, 3))
        return torch.tensor([NAN if i in self.unscored else float(one) for i, one in enumerate(scores)])


def gap(by: list[float], unscored: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
    levels = torch.tensor([0.2, 0.4, 0.6, 0.8]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    prompts = PromptBatch(torch.arange(4), ("",) * 4, torch.arange(4), {}, {})
    (found,) = decoder_gaps(Offset([0.0] * 4), Offset(by), [Mean(unscored)], levels, prompts)
    return found


def test_constant_offset_keeps_the_order_of_images() -> None:
    found = gap([0.1] * 4)
    assert (found.reward, found.images) == ("mean", 4)
    assert found.full == pytest.approx(5) and found.rough == pytest.approx(6)
    assert found.difference == pytest.approx(1, abs=1e-4) and found.error == pytest.approx(0, abs=1e-5)
    assert found.spread == pytest.approx(torch.tensor([2.0, 4, 6, 8]).std().item())
    assert found.agreement == 1
    assert "+1 on 4 images" in found.line() and "100% of pairs" in found.line()


def test_agreement_is_the_share_of_pairs_in_the_same_order() -> None:
    found = gap([0.3, 0.0, 0.0, 0.0])
    assert found.agreement == pytest.approx(5 / 6)
    assert found.error == pytest.approx(torch.tensor([3.0, 0, 0, 0]).std().item(), abs=1e-5)


def test_unscored_images_are_left_out() -> None:
    found = gap([0.1, 0.2, 0.1, 0.1], unscored=(1,))
    assert found.images == 3 and found.difference == pytest.approx(1, abs=1e-4)
    one = gap([0.1] * 4, unscored=(0, 1, 2))
    assert (
        one.images == 1 and one.difference == pytest.approx(1, abs=1e-4) and one.error is None and one.agreement is None
    )
    none = gap([0.1] * 4, unscored=(0, 1, 2, 3))
    assert none.images == 0 and none.difference is None and "no image was scored" in none.line()
