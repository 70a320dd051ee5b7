"""What every reward guarantees: shape, dtype, errors, independence of the batch, gradient, placement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from hidden_weights import hide
from tiny_rewards import PRETRAINED, REWARDS, TASK, brightness, prompt_batch, random_images, tiny_clip, tokenize

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


def test_a_composite_preprocesses_pil_images_as_its_parts_do() -> None:
    alone, saved = PRETRAINED["clip"](), to_pil(random_images())
    composite = Composite([Part(alone, weight=2.0, mean=0.2, std=0.1), Part(brightness, std=0.5)])
    raw = torch.stack([torch.tensor(alone(saved, TEXTS)), brightness(from_pil(saved), TEXTS)])
    expected = (2 * (raw[0] - 0.2) / 0.1 + raw[1] / 0.5) / 3
    torch.testing.assert_close(torch.tensor(composite(saved, TEXTS)), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(composite.score(from_pil(saved), prompts()), expected)  # the path of training


class LinearReward(CLIPScore):
    @staticmethod
    def _image_size(net: object) -> int:
        return 8

    def _formula(self, pixels: Tensor, texts: object) -> Tensor:
        return self.loaded.net.layer(pixels.flatten(1))[:, 0]


def linear(*, offload: bool = True, chunk: int = 0) -> LinearReward:
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(3 * 8 * 8, 1)})
    return LinearReward.from_modules(net, None, device="cpu", offload=offload, chunk=chunk)


def test_weights_are_loaded_on_first_use() -> None:
    loads: list[int] = []
    reward = CLIPScore()
    reward._load = lambda: loads.append(1) or Loaded(tiny_clip(), tokenize)
    assert not loads
    for _ in range(2):
        reward.score(random_images(), prompts())
    assert len(loads) == 1


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("grad", [False, True])
def test_offload_changes_neither_scores_nor_gradients(monkeypatch: pytest.MonkeyPatch, chunk: int, grad: bool) -> None:
    """The weights are copied once per call and are absent outside of it, also in the backward pass."""
    images = random_images().requires_grad_(grad)
    wanted = linear(offload=False, chunk=chunk).score(images, prompts())
    copied, reward = hide(monkeypatch), linear(chunk=chunk)
    found = [reward.score(images, prompts()) for _ in range(2)]
    assert all(torch.equal(one, wanted) for one in found) and copied == ["ModuleDict"] * 2
    assert all(weights.isnan().all() for weights in reward.loaded.net.parameters())
    if grad:
        own, other = (torch.autograd.grad(one.sum(), images)[0] for one in (found[0], wanted))
        assert torch.equal(own, other) and own.any()


def test_offload_after_an_error() -> None:
    reward = linear()
    host = reward.loaded.net.layer.weight
    host.data.fill_(torch.nan)
    with pytest.raises(ValueError):
        reward.score(random_images(), prompts())
    assert reward.loaded.net.layer.weight is host


def test_offloaded_parts_of_a_composite_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[int] = []
    hide(monkeypatch)
    both = [linear(), linear()]
    for reward in both:
        reward.loaded.net.layer.register_forward_hook(
            lambda *_: here.append(sum(bool(one.loaded.net.layer.weight.isfinite().all()) for one in both))
        )
    both[1].name = "other"
    Composite([Part(reward) for reward in both]).score(random_images(), prompts())
    assert here == [1, 1]
