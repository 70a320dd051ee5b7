"""Vision-language models of the Qwen family as rewards: what the processors of transformers do, with gradient to the images.

Image [3, h, w] -> patches of ``patch_size`` pixels, each repeated for the ``temporal_patch_size`` frames that a patch of a
video has; the patches of a block of ``spatial_merge_size`` x ``spatial_merge_size`` are neighbors, because the vision tower
makes one token of them. The text has one placeholder per token of the image. (arXiv 2409.12191, sec. 2.1.)

The processors themselves need torchvision, which gdmd does not install; tests compare with transformers' PIL classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.rewards.base import PretrainedReward
from gdmd.rewards.preprocessing import CLIP_MEAN, CLIP_STD, AreaPreprocess

IMAGE = "<|image_pad|>"
"""The placeholder of one token of the image."""
SEEN = f"<|vision_start|>{IMAGE}<|vision_end|>"
"""The image in a message."""


@dataclass(frozen=True)
class ChatTokenizer:
    """Chat messages to token ids, padded on the right: later tokens do not change the states of earlier ones."""

    tokenizer: Any

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L], L the length of the longest text; nothing is truncated."""
        rows = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}

    def first_token(self, text: str) -> int:
        """The id of the first token of a text."""
        return int(self.tokenizer.encode(text, add_special_tokens=False)[0])


class VisionLanguageReward(PretrainedReward):
    """A score of the hidden states of a vision-language model that reads an image and a text."""

    smallest = largest = 0
    """Area of the resized image in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def preprocess(self) -> AreaPreprocess:
        """Sides that are multiples of the pixels of a vision token."""
        net: Any = self.loaded.net
        multiple = net.config.vision_config.patch_size * net.config.vision_config.spatial_merge_size
        return AreaPreprocess(int(multiple), self.smallest, self.largest, self.mean, self.std)

    def _states(
        self, model: Any, pixels: Tensor, messages: Sequence[str], *, flat: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The last hidden states [b, L, D] of a Qwen ``*VLModel``, and the tokens (``ChatTokenizer``).

        pixels [b, 3, h, w]: normalized; messages: one per image, with one IMAGE each. flat: the positions of the tokens
        are 0, 1, 2, ... as in a text, not ``image_positions``.
        """
        vision = model.config.vision_config
        grid = tuple(side // vision.patch_size for side in pixels.shape[-2:])
        merged = tuple(side // vision.spatial_merge_size for side in grid)
        placeholders = IMAGE * (merged[0] * merged[1])
        tokens = self._tokens([text.replace(IMAGE, placeholders, 1) for text in messages])
        length = tokens["input_ids"].shape[1]
        positions = (
            torch.arange(length).expand(3, len(pixels), -1)
            if flat
            else image_positions(tokens["input_ids"] == model.config.image_token_id, merged)
        )
        states: Tensor = model(
            **tokens,
            pixel_values=patches(pixels.to(self.placement.dtype), vision).flatten(0, 1),
            image_grid_thw=to_device_async(torch.tensor([(1, *grid)] * len(pixels)), pixels.device),
            position_ids=to_device_async(positions, pixels.device),
            use_cache=False,
        ).last_hidden_state
        return states, tokens


def patches(pixels: Tensor, vision: Any) -> Tensor:
    """pixels [B, C, H, W] -> patches [B, N, C * frames * P * P], in the order of the module docstring.

    vision: the ``vision_config`` of the model.
    """
    size, merge = vision.patch_size, vision.spatial_merge_size
    count, channels, height, width = pixels.shape
    rows, columns = height // (size * merge), width // (size * merge)
    blocks = pixels.reshape(count, channels, rows, merge, size, columns, merge, size)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, merge, merge, C, P, P]
    frames = blocks.unsqueeze(6).expand(*(-1,) * 6, vision.temporal_patch_size, -1, -1)
    return frames.reshape(count, rows * columns * merge**2, -1)


def image_positions(image: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Positions [3, B, L] of multimodal rotary embeddings (arXiv 2409.12191, sec. 2.1): time, row and column of each token.

    image [B, L]: which tokens are the image's, ``grid`` rows and columns of them. Before it the three positions are 0, 1,
    ...; inside they are s, s + row, s + column with s its start; after it they continue from s + max(grid).
    """
    height, width = grid
    index = torch.arange(image.shape[1], device=image.device).expand(*image.shape)
    start = image.int().argmax(1, keepdim=True)
    place = index - start
    after = place >= height * width
    text = torch.where(after, index - height * width + max(grid), index)
    inside = torch.stack((start + 0 * place, start + place // width, start + place % width))
    return torch.where(image, inside, text)
