"""GenEval's detector and color classifier on tiny random networks, and mmdet's post-processing of Mask2Former."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gdmd.config.rewards import CompositeConfig, GenEvalConfig
from gdmd.recipes.build_rewards import check_prompts
from gdmd.rewards.geneval import detector as geneval_detector
from gdmd.rewards.geneval.colors import ColorClassifier, cut_out
from gdmd.rewards.geneval.detector import CLASSES, Detector, prepared, read_instances
from gdmd.rewards.geneval.reward import GenEval
from gdmd.rewards.geneval.rules import COLORS, DetectedObject
from gdmd.types import PromptBatch

transformers = pytest.importorskip("transformers")

from tiny_images import noise
from tiny_rewards import RedPixelDetector


def test_classes_are_those_of_coco_in_order() -> None:
    assert len(set(CLASSES)) == len(CLASSES) == 80
    assert (CLASSES[0], CLASSES[16], CLASSES[63], CLASSES[79]) == ("person", "dog", "laptop", "toothbrush")
    assert {"computer mouse", "tv remote", "computer keyboard"} < set(CLASSES)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 512), (1333, 667), (1344, 672)),
        ((300, 400), (800, 1067), (800, 1088)),
    ],
)
def test_preprocessing_resizes_and_pads_with_gray(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels, inner = prepared(Image.new("RGB", size[::-1], (255, 0, 128)))
    assert inner == resized and tuple(pixels.shape) == (1, 3, *padded)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    inside = pixels[0, :, : resized[0], : resized[1]].double()
    want = torch.from_numpy((np.array([255, 0, 128]) - mean) / std)[:, None, None]
    torch.testing.assert_close(inside, want.expand_as(inside), rtol=0, atol=1e-5)
    if padded != resized:
        torch.testing.assert_close(
            pixels[0, :, -1, -1].double(), torch.from_numpy((128 - mean) / std), rtol=0, atol=1e-5
        )


def slow_instances(classes: np.ndarray, logits: np.ndarray) -> list[tuple[int, float, list[int]]]:
    """mmdet's rules by loops, for masks that need no resize: (label, confidence, box) of the 100 best pairs."""
    exp = np.exp(classes - classes.max(1, keepdims=True))
    scores = (exp / exp.sum(1, keepdims=True))[:, :-1]
    pairs = sorted(((scores[q, c], q, c) for q in range(len(scores)) for c in range(scores.shape[1])), reverse=True)
    rows = []
    for score, query, label in pairs[:100]:
        inside = logits[query] > 0
        values = 1 / (1 + np.exp(-logits[query][inside]))
        ys, xs = np.nonzero(inside)
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
        rows.append((label, score * values.sum() / (len(values) + 1e-6), box))
    return rows


def test_post_processing_against_loops() -> None:
    rng = np.random.default_rng(0)
    classes, logits = rng.normal(size=(20, 8)) * 3, rng.normal(size=(20, 6, 9)) - 1
    logits[3] = -1  # an empty mask
    found = read_instances(torch.tensor(classes), torch.tensor(logits), (6, 9), (6, 9), (6, 9))
    want = slow_instances(classes, logits)
    assert len(found.label) == len(want) == 100
    for k, (label, confidence, box) in enumerate(want):
        assert found.label[k] == label and found.box[k].tolist() == box
        assert float(found.confidence[k]) == pytest.approx(confidence, abs=1e-6)


def test_padding_is_cut_off() -> None:
    logits = torch.full((1, 4, 8), -5.0)
    logits[..., 4:] = 5.0  # the right half of the padded input, all of it padding but one column of four
    classes = torch.tensor([[9.0, 0.0]])
    found = read_instances(classes, logits, (16, 32), (16, 20), (160, 200))
    x0, y0, x1, y1 = found.box[0].tolist()
    assert (y0, x1, y1) == (0, 200, 160) and 150 <= x0 <= 162


def tiny_detector(labels: int = 80) -> Any:
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6, num_labels=labels,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def test_detections_of_a_tiny_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geneval_detector, "SHORT", 96)  # a ninth of the pixels
    net = tiny_detector()
    torch.nn.init.normal_(net.class_predictor.weight, std=2.0)  # confident, so that something is found
    found = Detector.from_modules(net)(noise(40, 52))
    assert found.objects and set(found.objects) <= set(CLASSES)
    everything = [one for ones in found.objects.values() for one in ones]
    assert found.masks.shape == (len(everything), 40, 52) and found.masks.dtype == torch.bool
    for one in everything:
        ys, xs = torch.nonzero(found.masks[one.key], as_tuple=True)
        assert one.box == (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        assert 0.3 < one.confidence <= 1
    assert not any(p.requires_grad for p in net.parameters())


def test_weights_load_from_a_folder(tmp_path: Path) -> None:
    net = tiny_detector()
    net.save_pretrained(tmp_path)
    again = Detector.from_pretrained(str(tmp_path))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.net.state_dict().items())


def test_other_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match="has 5 classes, GenEval needs COCO's 80"):
        Detector.from_modules(tiny_detector(5))(noise(40, 52))


# ---------------------------------------------------------------- colors


def test_cut_out_objects_are_masked_and_cropped() -> None:
    image = Image.new("RGB", (20, 10), "red")
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2:6, 5:12] = True
    mask[2, 5] = False
    piece = np.asarray(cut_out(image, DetectedObject((5.0, 2.0, 12.0, 6.0), 0.9), mask))
    assert piece.shape == (4, 7, 3) and (piece[1:] == [255, 0, 0]).all()
    assert piece[0, 0].tolist() == [153, 153, 153]


class ColorSpace(torch.nn.Module):
    """A CLIP whose image embedding is the mean color and whose text embedding is the color of the word, for tests."""

    class Answer:
        def __init__(self, features: Tensor) -> None:
            self.pooler_output = features

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.CLIPConfig(vision_config={"image_size": 16})
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1000, 3, generator=generator) * 0.05

    def get_image_features(self, pixel_values: Tensor) -> ColorSpace.Answer:
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        return self.Answer(pixel_values.mean((2, 3)) * std + mean - 0.4)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> ColorSpace.Answer:
        table = {"red": (1, 0, 0), "green": (0, 0.5, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "yellow": (1, 1, 0)}
        near = torch.tensor([table.get(color, (0.1, 0.1, 0.1)) for color in COLORS]).float() - 0.4
        return self.Answer(near[input_ids[:, 0]] + self.noise[input_ids[:, 1]])


def words(texts: Sequence[str]) -> Mapping[str, Tensor]:
    """(index of the color, length of the text)"""
    rows = [(next(i for i, color in enumerate(COLORS) if color in text), len(text)) for text in texts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 2)}


def test_color_inside_the_mask() -> None:
    image = Image.new("RGB", (40, 40), "blue")
    image.paste("red", (5, 5, 15, 15))
    image.paste("yellow", (20, 20, 35, 35))
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    masks[0, 5:15, 5:15] = masks[1, 20:35, 20:35] = True
    objects = [DetectedObject((20, 20, 35, 35), 0.9, 1), DetectedObject((5, 5, 15, 15), 0.8, 0)]
    classifier = ColorClassifier.from_modules(ColorSpace(), words)
    assert classifier.of(image, masks)("apple", objects) == ["yellow", "red"]
    assert classifier.colors(image, "apple", [], masks) == []


def test_text_embeddings_of_the_colors() -> None:
    net = ColorSpace()
    found = ColorClassifier.from_modules(net, words)._texts("dog")
    for row, color in enumerate(COLORS):
        lines = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        vectors = net.get_text_features(**words(lines)).pooler_output.double()
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(found[row].double(), mean / mean.norm(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the reward


def test_reward_reads_the_metadata() -> None:
    reward = GenEval.from_modules(RedPixelDetector(), ColorClassifier.from_modules(ColorSpace(), words))
    images = torch.zeros(3, 3, 32, 32)
    images[:2, 0, 4:20, 6:20] = 1.0
    task = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    green = task | {"include": [{"class": "dog", "count": 1, "color": "green"}]}
    index = torch.arange(3)
    scores = reward.score(images, PromptBatch(index, ("a", "b", "c"), index, {}, {}, (task, green, task)))
    assert scores.tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="GenEval metadata with every prompt, got 0 for 3"):
        reward.score(images, PromptBatch(index, ("a", "b", "c"), index, {}, {}))
    with pytest.raises(ValueError, match="prompt 1: not GenEval metadata"):
        reward.score(images, PromptBatch(index, ("a", "b", "c"), index, {}, {}, (task, {}, task)))


def test_a_prompt_without_metadata_is_found_before_training() -> None:
    """Its batch may come at the end of the run."""
    task = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    alone, prompts = (GenEvalConfig(),), ("a photo of a dog", "a photo of a cat")
    check_prompts(alone, prompts, (task, task))
    part = (CompositeConfig.model_validate({"parts": [{"reward": {"kind": "geneval"}}]}),)
    for specs, rows in ((alone, (task, {"prompt": "a photo of a cat"})), (part, None)):
        with pytest.raises(ValueError, match="reward geneval: prompt 'a photo of a .*': not GenEval metadata"):
            check_prompts(specs, prompts, rows)
