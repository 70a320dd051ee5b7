"""Image preprocessing of the reward models, in two implementations.

  ``Preprocess.pil``     PIL on 8-bit images, as the models' authors ran it: for reported numbers
  ``Preprocess.tensor``  torch on floats in [0, 1], differentiable: for training

fit "crop": resize the shortest side to ``size`` (bicubic, antialias), then center crop; CLIP, PickScore, ImageReward.
fit "pad":  resize the longest side to ``size``, then pad with zeros to a square, before normalization; HPSv2.
For "crop" on 8-bit images the two differ only by the rounding of PIL's two 8-bit passes (mean below 0.35/255, at most
1.5/255 per value, before the division by std); for "pad" they are the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.diffusion.device import raise_where

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel mean and standard deviation of CLIP's training images (arXiv 2103.00020, the released code)."""


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
        # PIL resizes rows, then columns, and clips after each: bicubic overshoots at edges, 8-bit values cannot
        narrow = _bicubic(images.float(), (images.shape[-2], width)).clamp(0, 1)
        small = _bicubic(narrow, (height, width)).clamp(0, 1)
        top, left = self._corner(height), self._corner(width)
        return self._normalized(small[..., top : top + self.size, left : left + self.size])

    def pil(self, images: Sequence[Image]) -> Tensor:
        """PIL images of any size and mode -> [B, 3, size, size], fp32."""
        if self.fit == "pad":  # the original converts to a float tensor before it resizes
            return torch.cat([self.tensor(from_pil([image])) for image in images])
        return self._normalized(torch.cat([from_pil([self._cropped(image)]) for image in images]))

    def _cropped(self, image: Image) -> Image:
        from PIL.Image import Resampling

        height, width = self._resized(image.height, image.width)
        small = image.convert("RGB").resize((width, height), Resampling.BICUBIC)
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
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


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
