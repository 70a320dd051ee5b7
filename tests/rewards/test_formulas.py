"""Preprocessing, and the formula of each reward computed again in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tiny_images import noise
from tiny_rewards import END, PRETRAINED, prompt_batch, random_images, tiny_clip, tokenize

from gdmd.recipes.build_rewards import reward_stats
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocess, from_pil, to_pil

TEXTS = ("a red dog", "two cats", "a photo of a bench", "a blue car left of a tree")
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (301, 413), (64, 96), (225, 227), "noise"])
def test_crop_differs_from_pil_by_8_bit_rounding_only(size: Any) -> None:
    image = noise(448, 512) if size == "noise" else to_pil(random_images(1, *size))[0]
    difference = (Preprocess().pil([image]) - Preprocess().tensor(from_pil([image]))) * STD * 255
    assert difference.abs().mean() < 0.35 and difference.abs().max() <= 1.5


@pytest.mark.parametrize("size", [(512, 512), (300, 411), (411, 300), (100, 224)])
def test_pil_equals_the_clip_processor_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil()(noise(*size), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preprocess(corner="floor").pil([noise(*size)]), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("corner", "left"), [("round", 2), ("floor", 1)])
def test_offset_of_an_odd_crop(corner: Any, left: int) -> None:
    """3 pixels are cropped: round(1.5) = 2, 3 // 2 = 1."""
    image = noise(224, 227)
    expected = (from_pil([image])[..., left : left + 224] - MEAN) / STD
    torch.testing.assert_close(Preprocess(corner=corner).pil([image]), expected)
    torch.testing.assert_close(Preprocess(corner=corner).tensor(from_pil([image])), expected)


def test_padding_is_black_and_keeps_the_whole_image() -> None:
    preprocess, image = Preprocess(fit="pad"), random_images(1, 112, 224)
    pixels = preprocess.tensor(image)
    torch.testing.assert_close(pixels[..., 56:168, :], (image - MEAN) / STD)  # longest side is 224: no resize
    torch.testing.assert_close(pixels[..., :56, :], (-MEAN / STD).expand(1, 3, 56, 224))
    tall = noise(301, 77)
    assert preprocess.pil([tall]).shape == (1, 3, 224, 224)
    assert torch.equal(preprocess.pil([tall]), preprocess.tensor(from_pil([tall])))


def test_8_bit_images_survive_to_pil() -> None:
    assert np.array_equal(np.asarray(to_pil(from_pil([noise(20, 30)]))[0]), np.asarray(noise(20, 30)))


# ---------------------------------------------------------------- formulas


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum(-1, keepdim=True).sqrt()


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    return unit(model.vision_model(pixel_values=pixels.double()).pooler_output @ model.visual_projection.weight.T)


def text_embeddings(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    states = model.text_model(**tokens).last_hidden_state
    ends = (tokens["input_ids"] == END).int().argmax(1)
    return unit(states[torch.arange(len(ends)), ends] @ model.text_projection.weight.T)


def affine(head: Any, x: Tensor) -> Tensor:
    for layer in head.children():
        x = x @ layer.weight.double().T + layer.bias.double()
    return x[:, 0]


@pytest.mark.parametrize(("kind", "scale"), [("clip", 1.0), ("hps", 1.0), ("pickscore", math.exp(2.6592))])
@torch.no_grad()
def test_cosine_rewards(kind: str, scale: float) -> None:
    """exp(2.6592) = 1 / 0.07 is CLIP's initial logit scale."""
    reward, images, model = PRETRAINED[kind](), random_images(), tiny_clip().double()
    scores = reward.score(images, prompt_batch(TEXTS))
    embeddings = image_embeddings(model, reward.preprocess.tensor(images))
    expected = scale * (embeddings * text_embeddings(model, tokenize(TEXTS))).sum(-1)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6 * max(1, 1.5 * scale))


@torch.no_grad()
def test_aesthetic_score_is_its_formula() -> None:
    reward, images = PRETRAINED["aesthetic"](), random_images()
    scores = reward.score(images, prompt_batch(TEXTS))
    expected = affine(reward.loaded.head, image_embeddings(tiny_clip().double(), reward.preprocess.tensor(images)))
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(scores, reward.score(images, prompt_batch(TEXTS[::-1])))


@torch.no_grad()
def test_imagereward_score_is_its_formula() -> None:
    reward, images = PRETRAINED["imagereward"](), random_images()
    scores = reward.score(images, prompt_batch(TEXTS))
    towers = reward.loaded.net.double()
    patches = towers.vision(reward.preprocess.tensor(images).double()).last_hidden_state
    states = towers.text(**tokenize(TEXTS), encoder_hidden_states=patches, is_decoder=False).last_hidden_state
    expected = (affine(reward.loaded.head, states[:, 0]) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


def red(images: Tensor, prompts: Any) -> Tensor:
    return images[:, 0].mean((1, 2))


def wide(images: Tensor, prompts: Any) -> Tensor:
    return 100 + 10 * images[:, 1].mean((1, 2))


def test_composite_is_the_weighted_mean_of_standardized_scores() -> None:
    parts = [
        Part(CallableReward(red, "red", True), 1.0, 0.5, 0.1),
        Part(CallableReward(wide, "wide", True), 3.0, 105, 2),
    ]
    reward, images = Composite(parts), random_images(4, 8, 8).requires_grad_()
    scores = reward.score(images, prompt_batch(TEXTS))
    r, w = red(images.detach(), ()).double(), wide(images.detach(), ()).double()
    torch.testing.assert_close(scores.double(), ((r - 0.5) / 0.1 + 3 * (w - 105) / 2) / 4, rtol=1e-5, atol=1e-5)
    logged = reward_stats([reward])
    assert float(logged["reward/composite/red"]) == pytest.approx(float(r.mean()))
    assert float(logged["reward/composite/wide"]) == pytest.approx(float(w.mean()))
    assert not reward.stats(), "the log reads each score once"
    for part in (slice(1), slice(1, 4)):  # micro-batches of different sizes
        reward.score(images[part], prompt_batch(TEXTS[part]))
    assert float(reward_stats([reward])["reward/composite/wide"]) == pytest.approx(float(w.mean()))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient[:, :2] != 0).all() and (gradient[:, 2] == 0).all()


def test_composite_with_unscored_images() -> None:
    half = CallableReward(lambda images, prompts: [1.0, float("nan"), 1.0, 1.0], "half")
    reward = Composite([Part(CallableReward(red, "red", True)), Part(half)])
    assert reward.score(random_images(), prompt_batch(TEXTS)).isnan().tolist() == [False, True, False, False]
    assert not reward.differentiable and float(reward.stats()["reward/composite/half"]) == 1.0
    with pytest.raises(ValueError, match="different names"):
        Composite([Part(half), Part(half)])
    with pytest.raises(ValueError, match="weights and stds above 0"):
        Composite([Part(half, std=0.0)])
    with pytest.raises(ValueError, match="cannot be a part of another, got inner; give its own parts instead"):
        Composite([Part(Composite([Part(half)], name="inner")), Part(half)])
