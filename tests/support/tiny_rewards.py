"""Tiny reward models with random weights, tiny CLIP folders like the published ones, and a prompt batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tiny_vlms import tiny_geneval2, tiny_hpsv3
from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.aesthetic import Aesthetic, linear_head
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.clip import CLIPScore
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.geneval.colors import ColorClassifier
from gdmd.rewards.geneval.detector import Detections, Detector
from gdmd.rewards.geneval.reward import GenEval
from gdmd.rewards.geneval.rules import DetectedObject
from gdmd.rewards.hps import HPSv2
from gdmd.rewards.imagereward import TEXT, VISION, ImageReward, ImageRewardTowers
from gdmd.rewards.ocr import OCR
from gdmd.rewards.pickscore import PickScore
from gdmd.types import PromptBatch, Reward

WORDS = 50
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH, START, END = 9, 62, 63
"""For ``tokenize``: tokens per text, start and end token."""
TASK = {
    "tag": "single_object",
    "prompt": "a dog",
    "include": [{"class": "dog", "count": 1}],
    "vqa_list": [["How many dogs are in the image?", "one"], ["Are there any dogs in the image?", "Yes"]],
}


def prompt_batch(texts: Sequence[str], meta: Sequence[Mapping[str, Any]] = ()) -> PromptBatch:
    index = torch.arange(len(texts))
    return PromptBatch(index, tuple(texts), index, {}, {}, tuple(meta))


def random_images(count: int = 4, height: int = 61, width: int = 83, seed: int = 0) -> Tensor:
    """Smooth random images in [0, 1]."""
    coarse = torch.rand(count, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")


def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
    """One token per letter, with start and end tokens, padded with the end token as by CLIP's tokenizer."""
    rows = [[START] + [ord(letter) % 60 for letter in text[: LENGTH - 2]] + [END] for text in texts]
    ids = torch.tensor([row + [END] * (LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def tiny_clip(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    text = SMALL | {"vocab_size": 64, "max_position_embeddings": LENGTH, "eos_token_id": END}
    vision = SMALL | {"image_size": 224, "patch_size": 56}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).eval()


def _imagereward(**options: Any) -> Reward:
    torch.manual_seed(3)
    text = TEXT | SMALL | {"vocab_size": 64, "encoder_hidden_size": 32}
    towers = ImageRewardTowers(VISION | SMALL | {"patch_size": 56}, text)
    return ImageReward.from_modules(towers, tokenize, linear_head(32), **options)


def _aesthetic(**options: Any) -> Reward:
    torch.manual_seed(4)
    return Aesthetic.from_modules(tiny_clip(), None, linear_head(16), **options)


PRETRAINED: dict[str, Callable[..., Any]] = {
    "clip": lambda **options: CLIPScore.from_modules(tiny_clip(), tokenize, **options),
    "hps": lambda **options: HPSv2.from_modules(tiny_clip(), tokenize, **options),
    "pickscore": lambda **options: PickScore.from_modules(tiny_clip(), tokenize, **options),
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "hpsv3": tiny_hpsv3,
    "geneval2": tiny_geneval2,
}


class RedPixelDetector(Detector):
    """Detects the red pixels of an image as one dog."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def __call__(self, image: Image.Image) -> Detections:
        import numpy as np

        mask = torch.from_numpy(np.asarray(image)[..., 0] > 200)
        if not mask.any():
            return Detections({}, mask[None][:0])
        ys, xs = torch.nonzero(mask, as_tuple=True)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        return Detections({"dog": [DetectedObject(box, 0.95, 0)]}, mask[None])


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of the image plus the length of the prompt."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(text)) for text in prompts])


REWARDS: dict[str, Callable[[], Reward]] = {
    **PRETRAINED,
    "callable": lambda: CallableReward(brightness, "brightness", differentiable=True),
    "composite": lambda: Composite(
        [Part(PRETRAINED["clip"](), 2.0, 0.1, 0.5), Part(CallableReward(brightness, "brightness", True))]
    ),
    "ocr": lambda: OCR.from_modules(lambda image: "OPEN" if image.getpixel((0, 0))[0] > 127 else "closed"),
    "geneval": lambda: GenEval.from_modules(RedPixelDetector(), ColorClassifier.from_modules(None, tokenize)),
}
"""Every kind of reward with tiny weights: the cases of tests/rewards/test_contract.py."""


def words_of_clip(folder: Path) -> None:
    """Save a CLIP tokenizer of 13 letters, and a config with its model type if there is none."""
    signs = [chr(code) for code in range(97, 110)]
    vocab = {sign: i for i, sign in enumerate(signs + [sign + "</w>" for sign in signs])}
    vocab |= {"<|startoftext|>": WORDS - 2, "<|endoftext|>": WORDS - 1}
    transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "clip"}')


def clip(folder: Path, positions: int = 77) -> None:
    """Save a tiny ``CLIPModel``."""
    small = SMALL | {"num_hidden_layers": 1}
    text = small | {"vocab_size": WORDS, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
    config = transformers.CLIPConfig(
        text_config=text | {"max_position_embeddings": positions},
        vision_config=small | {"patch_size": 56},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
