"""GenEval's object detector without mmdet: Mask2Former Swin-S of transformers, post-processed as in mmdet.

Input: the image resized to fit 1333 x 800 at its aspect ratio (bilinear without antialias, 8 bits), padded with gray 128
to multiples of 32, normalized. Output per image, from Q queries with class logits over C + 1 and mask logits:

    class score  softmax over C + 1 without "no object"; the best 100 of all Q x C (query, class) pairs
    mask         logits upsampled to the padded size, padding cut off, bilinear to the original size, > 0
    confidence   class score x mean of sigmoid(logits) inside the mask
    box          of the mask, its end exclusive

transformers' post-processing differs (nearest, padding kept, overlaps overwritten), so it is not used. Classes are mapped
by index, never by label. The published numbers used mmdet's weights: call your results "GenEval (HF detector)".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.base import DEFAULT_PLACEMENT, Placement
from gdmd.rewards.geneval.rules import KEEP, DetectedObject
from gdmd.rewards.preprocessing import from_pil
from gdmd.rewards.weights import DETECTOR, load_detector, locate_weights

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""GenEval's names of COCO's 80 classes, in COCO's order."""
LONG, SHORT, DIVISOR, GRAY = 1333, 800, 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_PAIRS = 100


@dataclass(frozen=True)
class Detections:
    """The objects in one image by class, and their masks, indexed by ``DetectedObject.key``."""

    objects: dict[str, list[DetectedObject]]
    masks: Tensor  # [K, H, W] bool, on the CPU


class Detector:
    """A frozen Mask2Former as image -> ``Detections``."""

    def __init__(
        self, load: Callable[[], Any], placement: Placement = DEFAULT_PLACEMENT, classes: Sequence[str] = CLASSES
    ) -> None:
        self._load, self.placement, self.classes = load, placement, tuple(classes)
        self._net: Any = None

    @classmethod
    def from_modules(
        cls, model: Any, placement: Placement = DEFAULT_PLACEMENT, classes: Sequence[str] = CLASSES
    ) -> Detector:
        """From a ``Mask2FormerForUniversalSegmentation``; classes: the names of its labels in order."""
        return cls(lambda: model, placement, classes)

    @classmethod
    def from_pretrained(
        cls, path: str | None = None, revision: str | None = None, placement: Placement = DEFAULT_PLACEMENT
    ) -> Detector:
        """From a folder (no network) or a hub id; default: the COCO instance weights with Swin-S."""
        location = locate_weights(path, revision, DETECTOR)
        return cls(lambda: load_detector(location, placement), placement)

    @property
    def net(self) -> Any:
        """The network, loaded and frozen on first use. ValueError if its classes are not COCO's."""
        if self._net is None:
            net = self._load()
            labels = int(net.config.num_labels)
            if labels != len(self.classes):
                raise ValueError(
                    f"the detector has {labels} classes, GenEval needs COCO's {len(self.classes)}; "
                    f"use {DETECTOR.name} or another COCO instance model"
                )
            self._net = net.to(self.placement.device, self.placement.dtype).eval().requires_grad_(False)
        return self._net

    @torch.no_grad()
    def __call__(self, image: Image) -> Detections:
        """Detect in one image at a time, so that the result cannot depend on other images."""
        pixels, resized = prepared(image)
        output = self.net(pixel_values=pixels.to(self.placement.device, self.placement.dtype))
        instances = read_instances(
            output.class_queries_logits[0], output.masks_queries_logits[0],
            (pixels.shape[-2], pixels.shape[-1]), resized, (image.height, image.width),
        )  # fmt: skip
        return self._named(instances)

    def _named(self, instances: Instances) -> Detections:
        """Objects by class; those below GenEval's lowest confidence threshold are dropped."""
        strong = instances.confidence > KEEP
        objects: dict[str, list[DetectedObject]] = {}
        rows = zip(
            instances.box[strong].tolist(), instances.confidence[strong].tolist(), instances.label[strong].tolist(),
            strict=True,
        )  # fmt: skip
        for key, (box, confidence, label) in enumerate(rows):
            objects.setdefault(self.classes[label], []).append(
                DetectedObject((box[0], box[1], box[2], box[3]), confidence, key)
            )
        return Detections(objects, instances.mask[strong].cpu())


@dataclass(frozen=True)
class Instances:
    """The K instance predictions for one image, as in mmdet."""

    box: Tensor  # [K, 4]
    label: Tensor  # [K] int64
    confidence: Tensor  # [K]
    mask: Tensor  # [K, H, W] bool


def prepared(image: Image) -> tuple[Tensor, tuple[int, int]]:
    """PIL image -> network input [1, 3, h, w], h and w multiples of 32; (height, width) before the padding."""
    levels = from_pil([image]) * 255
    height, width = levels.shape[-2:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = F.interpolate(levels, size, mode="bilinear", align_corners=False).round().clamp(0, 255)
    down, right = (-side % DIVISOR for side in size)
    padded = F.pad(resized, (0, right, 0, down), value=GRAY)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (padded - mean) / std, size


def read_instances(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]
) -> Instances:
    """class_logits [Q, C + 1], mask_logits [Q, h, w]; sizes of the input, of the input without padding, of the image."""
    big = F.interpolate(mask_logits[None].float(), padded, mode="bilinear", align_corners=False)
    big = F.interpolate(big[..., : resized[0], : resized[1]], size, mode="bilinear", align_corners=False)[0]
    scores = class_logits.float().softmax(-1)[:, :-1]  # [Q, C]
    best, pair = scores.flatten().topk(min(MAX_PAIRS, scores.numel()))
    query = pair // scores.shape[1]
    inside = (big > 0)[query]
    area = inside.flatten(1).sum(1)
    mean = (big.sigmoid()[query] * inside).flatten(1).sum(1) / (area + 1e-6)
    return Instances(_boxes(inside), pair % scores.shape[1], best * mean, inside)


def _boxes(masks: Tensor) -> Tensor:
    """[K, H, W] bool -> x0, y0, x1, y1 with exclusive ends, [K, 4]; zeros for an empty mask."""

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        line = line.int()
        return line.argmax(1), line.shape[1] - line.flip(1).argmax(1)

    (x0, x1), (y0, y1) = ends(masks.any(1)), ends(masks.any(2))
    boxes = torch.stack([x0, y0, x1, y1], 1).float()
    return boxes * masks.flatten(1).any(1)[:, None]
