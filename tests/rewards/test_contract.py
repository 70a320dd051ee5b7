"""What every reward promises: shape, dtype, errors, independence of the batch, gradient, placement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tiny_rewards import PRETRAINED, REWARDS, TASK, prompt_batch, random_images, tiny_clip, tokenize

from gdmd.rewards.base import Loaded
from gdmd.rewards.clip import CLIPScore
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.preprocessing import from_pil, to_pil
from gdmd.types import PromptBatch, Reward

TEXTS = ('a sign "OPEN"', 'two "cats"', 'a "bench"', 'a "blue car" left of a tree')
CLOSE = {"rtol": 0, "atol": 2e-5}


def prompts(order: slice = slice(None)) -> PromptBatch:
    return prompt_batch(TEXTS[order], [TASK] * len(TEXTS[order]))


@pytest.fixture(params=REWARDS)
def reward(request: pytest.FixtureRequest) -> Reward:
    return REWARDS[request.param]()


def test_one_fp32_score_per_image(reward: Reward) -> None:
    scores = reward.score(random_images(), prompts())
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scores.isfinite().all()


def test_scores_do_not_depend_on_the_batch(reward: Reward) -> None:
    images = random_images()
    images[0], images[1] = 1.0, 0.0  # so that ocr and geneval tell images apart
    together = reward.score(images, prompts())
    alone = torch.cat([reward.score(images[i : i + 1], prompts(slice(i, i + 1))) for i in range(4)])
    reversed_ = reward.score(images.flip(0), prompts(slice(None, None, -1))).flip(0)
    torch.testing.assert_close(alone, together, **CLOSE)
    torch.testing.assert_close(reversed_, together, **CLOSE)
    assert together.std() > 0


def test_gradient(reward: Reward) -> None:
    """Differentiable rewards: a gradient for every image that agrees with finite differences; others: none."""
    images = random_images().requires_grad_()
    scores = reward.score(images, prompts())
    if not reward.differentiable:
        assert not scores.requires_grad
        return
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward.score(images + sign * step, prompts()).double().sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (gradient * step).sum().double(), rtol=0.05, atol=1e-5)


def test_images_with_nan_are_an_error_that_names_them(reward: Reward) -> None:
    images = random_images()
    images[2, 0, 30, 40] = float("nan")
    if reward.name == "brightness":  # a function decides itself; NaN means "not scored"
        assert reward.score(images, prompts()).isnan().tolist() == [False, False, True, False]
        return
    name = "clip" if reward.name == "composite" else reward.name
    with pytest.raises(
        ValueError, match=rf"{name} (got images that are|gave a score that is) not finite at samples \[?2"
    ):
        reward.score(images, prompts())


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (random_images()[:, :1], 4, r"images \[B, 3, H, W\].*got \[4, 1, 61, 83\]"),
        (random_images(), 3, "4 images for 3 prompts"),
        ((random_images() * 255).byte(), 4, "torch.uint8"),
    ],
)
def test_wrong_shapes_and_counts(reward: Reward, images: Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward.score(images, prompts(slice(count)))


# ---------------------------------------------------------------- pretrained rewards


@pytest.mark.parametrize("kind", PRETRAINED)
def test_dtype_chunks_autocast_and_pil(kind: str) -> None:
    images = random_images()
    reward = PRETRAINED[kind]()
    full = reward.score(images, prompts())
    assert not any(p.requires_grad for p in reward.loaded.net.parameters())
    torch.testing.assert_close(PRETRAINED[kind](chunk=3).score(images, prompts()), full, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.score(images, prompts()), full)
    bf16 = PRETRAINED[kind](dtype="bf16").score(images, prompts())
    torch.testing.assert_close(bf16, full, rtol=0.03, atol=0.03 * max(1.0, float(full.abs().max())))
    saved = to_pil(images)
    torch.testing.assert_close(
        reward.score_pil(saved, TEXTS, [TASK] * 4), reward.score(from_pil(saved), prompts()), rtol=2e-3, atol=2e-3
    )


DEVICE, CPU = "cpu:0", "cpu"
"""Another name of the CPU as the device, so that moves can be told apart."""


class RecordingNet(nn.Module):
    """Records the devices that it is moved to."""

    def __init__(self, name: str, moves: list[str]) -> None:
        super().__init__()
        self.layer, self.name, self.moves = nn.Linear(3 * 8 * 8, 1), name, moves

    def to(self, *args: object, **kwargs: object) -> RecordingNet:
        if args[0] in (DEVICE, CPU):
            self.moves.append(f"{self.name} {args[0]}")
        return super().to(*args, **kwargs)  # type: ignore[arg-type]


class LinearReward(CLIPScore):
    @staticmethod
    def _image_size(net: object) -> int:
        return 8

    def _formula(self, pixels: Tensor, texts: object) -> Tensor:
        return self.loaded.net.layer(pixels.flatten(1))[:, 0]


def linear(name: str, moves: list[str], *, offload: bool = True, chunk: int = 0) -> LinearReward:
    torch.manual_seed(0)
    options = {"device": DEVICE, "offload": offload, "chunk": chunk}
    reward = LinearReward.from_modules(RecordingNet(name, moves), None, **options)
    reward.name = name
    return reward


def test_weights_are_loaded_on_first_use() -> None:
    loads: list[int] = []
    reward = CLIPScore()
    reward._load = lambda: loads.append(1) or Loaded(tiny_clip(), tokenize)
    assert not loads
    for _ in range(2):
        reward.score(random_images(), prompts())
    assert len(loads) == 1


@pytest.mark.parametrize("chunk", [0, 1])
def test_offload_moves_the_network_once_per_call(chunk: int) -> None:
    moves: list[str] = []
    resident: list[str] = []
    reward, stays = linear("r", moves, chunk=chunk), linear("r", resident, offload=False)
    with torch.no_grad():
        first, second = (reward.score(random_images(), prompts()) for _ in range(2))
        third = stays.score(random_images(), prompts())
    assert moves == [f"r {DEVICE}", f"r {CPU}"] * 2 and resident == [f"r {DEVICE}"]
    assert torch.equal(first, second) and torch.allclose(first, third)


def test_offload_waits_for_the_backward_pass() -> None:
    moves: list[str] = []
    reward, images = linear("r", moves), random_images().requires_grad_()
    reward.score(images, prompts()).sum().backward()
    assert moves == [f"r {DEVICE}"] and images.grad is not None and images.grad.any()
    with torch.no_grad():
        reward.score(random_images(), prompts())
    assert moves[1:] == [f"r {DEVICE}", f"r {CPU}"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("broken", ["network", "score"])
def test_offload_after_an_error(broken: str, grad: bool) -> None:
    moves: list[str] = []
    reward = linear("r", moves)
    if broken == "network":
        reward.loaded.net.layer = nn.Linear(1, 1)
    else:
        reward.loaded.net.layer.weight.data.fill_(torch.nan)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
        reward.score(random_images(), prompts())
    assert moves == [f"r {DEVICE}", f"r {CPU}"]


def test_offloaded_parts_of_a_composite_take_turns() -> None:
    moves: list[str] = []
    with torch.no_grad():
        Composite([Part(linear(name, moves)) for name in ("one", "two")]).score(random_images(), prompts())
    assert moves == [f"one {DEVICE}", f"one {CPU}", f"two {DEVICE}", f"two {CPU}"]
