"""Image preprocessing of the reward models, in two implementations.

  ``Preprocess.pil``     PIL on 8-bit images, as the models' authors ran it: for reported numbers
  ``Preprocess.tensor``  torch on floats in [0, 1], differentiable: for training

fit "crop": resize the shortest side to ``size`` (bicubic, antialias), then center crop; CLIP, PickScore, ImageReward.
fit "pad":  resize the longest side to ``size``, then pad with zeros to a square, before normalization; HPSv2.
``AreaPreprocess`` keeps the aspect ratio and bounds the area: vision-language models of the Qwen family.
For "crop" and ``AreaPreprocess`` on 8-bit images the two differ only by the rounding of PIL's two 8-bit passes (mean below
0.35/255, at most 1.5/255 per value, before the division by std), and not at all where no resize is needed; for "pad" they
are the same function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.diffusion.device import raise_where

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel mean and standard deviation of CLIP's training images (arXiv 2103.00020, the released code)."""


class ImageInput(Protocol):
    """Images to the normalized input of a vision tower, [B, 3, height, width] in fp32."""

    def tensor(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1], with gradient to the images."""

    def pil(self, images: Sequence[Image]) -> Tensor:
        """PIL images that have one size after preprocessing."""


@dataclass(frozen=True)
class Preprocess:
    """Images to the input of a vision tower, [B, 3, size, size].

    corner: rounding of the crop's offset when an odd number of pixels is cropped: "round" (half to even, as torchvision
    does for CLIP and ImageReward) or "floor" (as transformers does for PickScore). The same for even numbers.
    """

    size: int = 224
    fit: Literal["crop", "pad"] = "crop"
    corner: Literal["round", "floor"] = "round"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def tensor(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size], fp32, with gradient to the images.

        Always in fp32: the antialiased bicubic kernel has no bf16 version on the CPU.
        """
        height, width = self._resized(images.shape[-2], images.shape[-1])
        if self.fit == "pad":
            return self._normalized(_padded(_bicubic(images.float(), (height, width)), self.size))
        small = _resized_as_pil(images.float(), (height, width))
        top, left = self._corner(height), self._corner(width)
        return self._normalized(small[..., top : top + self.size, left : left + self.size])

    def pil(self, images: Sequence[Image]) -> Tensor:
        """PIL images of any size and mode -> [B, 3, size, size], fp32."""
        if self.fit == "pad":  # the original converts to a float tensor before it resizes
            return torch.cat([self.tensor(from_pil([image])) for image in images])
        return self._normalized(torch.cat([from_pil([self._cropped(image)]) for image in images]))

    def _cropped(self, image: Image) -> Image:
        height, width = self._resized(image.height, image.width)
        small = _resized_by_pil(image, (height, width))
        top, left = self._corner(height), self._corner(width)
        return small.crop((left, top, left + self.size, top + self.size))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize; sides are truncated (crop) or rounded (pad), as in the originals."""
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def _corner(self, side: int) -> int:
        spare = side - self.size
        return round(spare / 2) if self.corner == "round" else spare // 2

    def _normalized(self, images: Tensor) -> Tensor:
        return _normalized(images, self.mean, self.std)


@dataclass(frozen=True)
class AreaPreprocess:
    """Images to [B, 3, height, width] with nearly their aspect ratio (Qwen2-VL, arXiv 2409.12191, sec. 2.1).

    multiple: both sides are multiples of it: the sides of a vision token in pixels. smallest, largest: of the area, pixels.
    """

    multiple: int
    smallest: int
    largest: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize. Each side is rounded to a multiple.

        If the area is then too large or too small, both sides are scaled to the limit and rounded down or up instead.
        """
        if max(height, width) > 200 * min(height, width):
            raise ValueError(f"an image of {width} x {height} pixels is too narrow for a vision-language model")
        rounded = tuple(round(side / self.multiple) for side in (height, width))
        area = rounded[0] * rounded[1] * self.multiple**2
        if area > self.largest:
            scale = math.sqrt(height * width / self.largest)
            rounded = tuple(max(1, math.floor(side / scale / self.multiple)) for side in (height, width))
        elif area < self.smallest:
            scale = math.sqrt(self.smallest / (height * width))
            rounded = tuple(math.ceil(side * scale / self.multiple) for side in (height, width))
        return rounded[0] * self.multiple, rounded[1] * self.multiple

    def tensor(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, height, width], fp32, with gradient to the images."""
        size = self.resized(images.shape[-2], images.shape[-1])
        return _normalized(_resized_as_pil(images.float(), size), self.mean, self.std)

    def pil(self, images: Sequence[Image]) -> Tensor:
        """PIL images of one size, in any mode -> [B, 3, height, width], fp32."""
        small = [_resized_by_pil(image, self.resized(image.height, image.width)) for image in images]
        return _normalized(from_pil(small), self.mean, self.std)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    center, scale = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images - center) / scale


def _resized_as_pil(images: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL resizes rows, then columns, and clips after each: bicubic overshoots at edges, 8-bit values cannot."""
    narrow = _bicubic(images, (images.shape[-2], size[1])).clamp(0, 1)
    return _bicubic(narrow, size).clamp(0, 1)


def _resized_by_pil(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    return image.convert("RGB").resize(size[::-1], Resampling.BICUBIC)


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _padded(images: Tensor, size: int) -> Tensor:
    """Pad with zeros to a square; an odd pixel goes to the bottom and right."""
    down, right = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def from_pil(images: Sequence[Image]) -> Tensor:
    """PIL images of one size -> [B, 3, H, W] in [0, 1], fp32."""
    import numpy as np

    planes = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
    return torch.stack(planes).permute(0, 3, 1, 2).float() / 255


def to_pil(images: Tensor) -> list[Image]:
    """[B, 3, H, W] in [0, 1] -> 8-bit images as they would be saved (rounded to 256 levels)."""
    from PIL import Image as pillow

    levels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [pillow.fromarray(image) for image in levels]


def check_images(name: str, images: Tensor, prompts: int) -> None:
    """ValueError unless images are [B, 3, H, W] floats, one per prompt."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} scores images [B, 3, H, W] with values in [0, 1], got {list(images.shape)} of {images.dtype}; "
            "decode the latents and clip to [0, 1] first"
        )
    if len(images) != prompts:
        raise ValueError(f"{name} got {len(images)} images for {prompts} prompts; give one prompt per image")


def check_finite(name: str, scores: Tensor, texts: Sequence[str]) -> None:
    """ValueError that names the samples (position and prompt) whose score is NaN or infinite."""

    def error(bad: list[int]) -> ValueError:
        shown = ", ".join(f"{index} ({texts[index][:40]!r})" for index in bad[:8])
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        return ValueError(
            f"{name} gave a score that is not finite at samples {shown}{more}: their images contain NaN or infinity, or "
            "the weights overflow in their dtype. Check the decoder, and try dtype fp32"
        )

    raise_where(~torch.isfinite(scores.detach()), error)


def check_finite_images(name: str, images: Tensor) -> None:
    """ValueError that names the samples whose images contain NaN or infinity. Waits for the device."""
    if not torch.isfinite(images).all():
        bad = torch.nonzero(~torch.isfinite(images).flatten(1).all(1))[:, 0].tolist()
        raise ValueError(f"{name} got images that are not finite at samples {bad}; check the decoder")
