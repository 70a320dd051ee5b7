"""The detector of the Shapes world: images -> objects. Its role is that of Mask2Former in GenEval
(arXiv 2310.11513).

1. Unmix: every pixel is background + alpha (color - background) for the palette color that explains it best.
2. Segment: connected pixels of one color with alpha > INSIDE are one component; small ones are specks.
3. Fit: each component is compared with exact re-renders of all six shapes of the same mass and centroid; the best two
   are refined by Gauss-Newton steps on center and radius. Confidence = 1 - residual energy / component energy.

Everything is batched over images and components and runs on any device; no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdmd.shapes.grammar import ANY, COLORS, SHAPES
from gdmd.shapes.render import (
    ARM,
    BACKGROUND,
    DIAMOND,
    IMAGE_SIZE,
    RADIUS,
    RGB,
    RING_HALF,
    RING_MIDDLE,
    SQUARE,
    TRIANGLE_BASE,
    TRIANGLE_TOP,
    Scenes,
    coverage_maps,
)

SLOTS = 8
"""Maximum number of objects per image; captions ask for at most 4."""
INSIDE = 0.4
"""A pixel above this alpha belongs to an object's core; below 1/2, so that thin rings stay connected under blur."""
SPECK = 0.3
"""A component with less than this share of the smallest possible object's area is not an object."""
KEEP = 0.6
"""Minimum confidence of a detection (GenEval: 0.3, on another scale); chosen by measurement, see docs/concepts/shapes.md."""
GROWTH = 2
"""Pixels by which cores are dilated to include their anti-aliased (or blurred) edge."""
REFINED, STEPS, NUDGE = 2, 2, 0.2
"""Shapes that are refined, Gauss-Newton steps, and their finite difference in pixels."""
RING = RING_MIDDLE + RING_HALF
AREA = (
    math.pi,
    4 * SQUARE**2,
    TRIANGLE_BASE - TRIANGLE_TOP,
    2 * DIAMOND**2,
    8 * ARM - 4 * ARM**2,
    math.pi * (RING**2 - (RING_MIDDLE - RING_HALF) ** 2),
)
CENTROID_Y = (0.0, 0.0, (TRIANGLE_TOP + 2 * TRIANGLE_BASE) / 3, 0.0, 0.0, 0.0)
"""First moments of the shapes with radius 1, in the order of SHAPES (a test integrates the outlines)."""
HALF_WIDTH = (1.0, SQUARE, 1.0, DIAMOND, 1.0, RING)
TOP = (-1.0, -SQUARE, TRIANGLE_TOP, -DIAMOND, -1.0, -RING)
BOTTOM = (1.0, SQUARE, TRIANGLE_BASE, DIAMOND, 1.0, RING)
"""Bounding boxes of the shapes with radius 1, in the order of SHAPES."""


@dataclass(frozen=True)
class Detections:
    """Objects found in B images, most confident first; shape and color are ANY (-1) in empty slots, the rest 0.

    Lengths are in units of the canvas, as in ``Scenes``. ``shape_fit`` and ``color_fit`` say how well each shape and
    each color would explain the component (share of its energy, 0 ... 1): the smooth part of partial credit.
    """

    shape: Tensor  # [B, M] index into SHAPES
    color: Tensor  # [B, M] index into COLORS
    x: Tensor  # [B, M] center
    y: Tensor  # [B, M]
    radius: Tensor  # [B, M]
    confidence: Tensor  # [B, M] in [0, 1]
    shape_fit: Tensor  # [B, M, 6]
    color_fit: Tensor  # [B, M, 8]

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def present(self) -> Tensor:
        """[B, M] bool."""
        return self.shape != ANY

    @property
    def scenes(self) -> Scenes:
        """The detected scenes, ready to be rendered again."""
        return Scenes(self.shape, self.color, self.x, self.y, self.radius)

    @property
    def box(self) -> Tensor:
        """Bounding boxes: center x, center y, width, height. [B, M, 4]"""
        s = self.shape.clamp_min(0)  # an empty slot has radius 0, so any shape gives it an empty box
        half, top, bottom = self.radius.new_tensor([HALF_WIDTH, TOP, BOTTOM])
        y = self.y + self.radius * (top + bottom)[s] / 2
        return torch.stack([self.x, y, self.radius * 2 * half[s], self.radius * (bottom - top)[s]], -1)


def from_scenes(scenes: Scenes) -> Detections:
    """The output of a perfect detector: the scene itself with confidence 1 (at most SLOTS objects)."""
    missing = SLOTS - scenes.shape.shape[1]
    shape, color = (
        F.pad(torch.where(scenes.present, t, ANY), (0, missing), value=ANY) for t in (scenes.shape, scenes.color)
    )
    here = shape != ANY
    x, y, radius = (F.pad(t, (0, missing)) * here for t in (scenes.x, scenes.y, scenes.radius))
    fits = [
        F.one_hot(t.clamp_min(0), n) * here[..., None].to(x.dtype)
        for t, n in ((shape, len(SHAPES)), (color, len(COLORS)))
    ]
    return _by_confidence(Detections(shape, color, x, y, radius, here.to(x.dtype), fits[0], fits[1]))


@torch.no_grad()
def detect(images: Tensor) -> Detections:
    """The objects in images [B, 3, 32, 32] in [0, 1] (values outside are taken as they are).

    ValueError for another shape or for values that are not finite.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"detect needs images [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("detect got images with NaN or infinite values: the network that generated them has diverged")
    if not len(images):
        return _by_confidence(_detect_block(images.new_zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE).float()), slice(0))
    block = 256 if images.device.type == "cpu" else 4096  # fits into the cache, or the device's memory
    parts = [_detect_block(part) for part in torch.split(images.float(), block)]
    return Detections(*(torch.cat([getattr(p, name) for p in parts]) for name in Detections.__dataclass_fields__))


def _by_confidence(found: Detections, rows: slice = slice(None)) -> Detections:
    order = torch.where(found.present, found.confidence, -1.0).argsort(dim=1, descending=True, stable=True)
    columns = []
    for name in Detections.__dataclass_fields__:
        column = getattr(found, name)
        index = order if column.ndim == 2 else order[..., None].expand_as(column)
        columns.append(column.gather(1, index)[rows])
    return Detections(*columns)


def _detect_block(images: Tensor) -> Detections:
    size = IMAGE_SIZE
    paint = _paint(images)
    contrast = images.flatten(2) - images.new_tensor(BACKGROUND)[:, None]  # [b, 3, P], P = S * S
    alpha, color = _unmix(contrast, paint)
    label = _label(alpha.view(-1, size, size), color.view(-1, size, size))
    slot, found = _compact(label, alpha)
    parts = _cut(contrast, slot, alpha, found)
    return _fill(found, _fit(parts, paint, size))


def _paint(like: Tensor) -> Tensor:
    """Color minus background, [8, 3]."""
    return like.new_tensor(RGB) - like.new_tensor(BACKGROUND)


def _explained(contrast: Tensor, paint: Tensor) -> tuple[Tensor, Tensor]:
    """Per color: alpha in [0, 1], its energy |contrast|^2 - |contrast - alpha paint|^2; [n, 3, P] -> [n, 8, P]."""
    power = paint.square().sum(1)[:, None]
    raw = torch.matmul(paint / power, contrast)
    alpha = raw.clamp(0, 1)
    return alpha, power * alpha * (2 * raw - alpha)


def _unmix(contrast: Tensor, paint: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and index of the color that explains each pixel best, [b, P] each."""
    alpha, explained = _explained(contrast, paint)
    color = explained.argmax(1)
    return alpha.gather(1, color[:, None])[:, 0], color


def _label(alpha: Tensor, color: Tensor) -> Tensor:
    """Connected components of one color (4 neighbors): the largest pixel number in it, from 1; 0 outside. [b, P]

    Labels spread by the maximum over neighbors; then each pixel takes the label of the pixel that its label names,
    which doubles the reach.
    """
    count, size, _ = alpha.shape
    inside = alpha > INSIDE
    across = (inside[:, :, 1:] & inside[:, :, :-1] & (color[:, :, 1:] == color[:, :, :-1])).int()
    down = (inside[:, 1:] & inside[:, :-1] & (color[:, 1:] == color[:, :-1])).int()
    numbers = torch.arange(1, size * size + 1, device=alpha.device, dtype=torch.int32).view(1, size, size)
    label = torch.where(inside, numbers, 0).int()
    while True:
        before = label.clone()
        for view, link in ((label, across), (label.transpose(1, 2), down.transpose(1, 2))):
            torch.maximum(view[:, :, 1:], view[:, :, :-1] * link, out=view[:, :, 1:])
            torch.maximum(view[:, :, :-1], view[:, :, 1:] * link, out=view[:, :, :-1])
        named = F.pad(label.view(count, -1), (1, 0)).gather(1, label.view(count, -1).long())
        label = named.view_as(label)
        if torch.equal(label, before):
            return label.view(count, -1).long()


def _compact(label: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Components by mass in SLOTS slots: slot of each pixel, from 1, 0 outside [b, P] (grown); slots in use [b, M]."""
    count, pixels = label.shape
    mass = alpha.new_zeros(count, pixels + 1).scatter_add_(1, label, alpha)
    mass[:, 0] = 0
    heaviest = mass.topk(SLOTS, 1)
    found = heaviest.values > SPECK * min(AREA) * (RADIUS[0] * IMAGE_SIZE) ** 2
    numbers = torch.arange(1, SLOTS + 1, device=label.device) * found
    table = torch.zeros_like(mass).scatter_(1, heaviest.indices, numbers.to(mass.dtype))
    slot = table.gather(1, label).view(count, 1, IMAGE_SIZE, IMAGE_SIZE)
    for _ in range(GROWTH):
        slot = torch.where(slot > 0, slot, F.max_pool2d(slot, 3, 1, 1))
    return slot.view(count, pixels).long(), found


@dataclass(frozen=True)
class _Parts:
    """N components, each in a window of W x W pixels."""

    contrast: Tensor  # [N, 3, W * W]
    own: Tensor  # [N, W * W] 1 for the component's pixels
    fair: Tensor  # [N, W * W] 1 for pixels of the canvas that no other component owns
    energy: Tensor  # [N] of all the component's pixels, also outside the window
    left: Tensor  # [N] column of the window's first pixel
    top: Tensor  # [N]
    width: int


def _cut(contrast: Tensor, slot: Tensor, alpha: Tensor, found: Tensor) -> _Parts:
    """Windows around the components' centroids, large enough for the largest object and its fringe."""
    size = IMAGE_SIZE
    half = math.ceil(max(BOTTOM) * 1.1 * RADIUS[1] * size) + GROWTH
    width = 2 * half + 1
    place = torch.arange(size, device=slot.device, dtype=alpha.dtype)
    row, column = place.repeat_interleave(size), place.repeat(size)
    values = torch.stack([alpha, alpha * column, alpha * row, contrast.square().sum(1)])  # [4, b, P]
    sums = values.new_zeros(4, len(slot), SLOTS + 1).scatter_add_(2, slot.expand(4, -1, -1), values)[:, :, 1:]
    image, index = torch.nonzero(found, as_tuple=True)
    mass, x, y, energy = sums[:, image, index]
    left, top = ((moment / mass).round().long() - half for moment in (x, y))
    near = torch.arange(width, device=slot.device)
    wide = size + 2 * width
    pixel = ((top[:, None, None] + width + near[:, None]) * wide + left[:, None, None] + width + near).flatten(1)
    framed = F.pad(contrast.view(-1, 3, size, size), (width,) * 4).flatten(2)
    owner = F.pad(slot.view(-1, size, size), (width,) * 4, value=ANY).flatten(1)[image[:, None], pixel]
    own = owner == index[:, None] + 1
    colors = torch.arange(3, device=slot.device)[None, :, None]
    cut = framed[image[:, None, None], colors, pixel[:, None]]
    return _Parts(cut, own.to(alpha.dtype), (own | (owner == 0)).to(alpha.dtype), energy, left, top, width)


@dataclass(frozen=True)
class _Objects:
    """The best explanation of each of N components; lengths in units of the canvas."""

    shape: Tensor  # [N]
    color: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    confidence: Tensor
    shape_fit: Tensor  # [N, 6]
    color_fit: Tensor  # [N, 8]


@dataclass(frozen=True)
class _Target:
    """What a re-render is compared with: N alpha maps on the line of the component's color."""

    alpha: Tensor  # [N, W * W], not clipped: unbiased under noise
    own: Tensor  # [N, W * W]
    fair: Tensor  # [N, W * W]
    power: Tensor  # [N] |color - background|^2
    lost: Tensor  # [N] energy that no alpha map explains: off the color's line, or outside the window
    energy: Tensor  # [N]
    width: int

    def __getitem__(self, who: Tensor) -> _Target:
        alpha, own, fair = self.alpha[who], self.own[who], self.fair[who]
        return _Target(alpha, own, fair, self.power[who], self.lost[who], self.energy[who], self.width)


def _fit(parts: _Parts, paint: Tensor, size: int) -> _Objects:
    """Best color, then best shape and pose of each component."""
    _, explained = _explained(parts.contrast, paint)
    by_color = torch.einsum("ncp,np->nc", explained, parts.own)
    color = by_color.argmax(1)
    power = paint[color].square().sum(1)
    alpha = torch.einsum("nr,nrp->np", paint[color] / power[:, None], parts.contrast)
    lost = parts.energy - power * (alpha.square() * parts.own).sum(1)
    target = _Target(alpha, parts.own, parts.fair, power, lost, parts.energy, parts.width)
    shape, pose, residual, shape_fit = _best_shape(target)
    confidence = (1 - residual / parts.energy).clamp_min(0)  # worse than an empty re-render: no evidence
    color_fit = (by_color / parts.energy[:, None]).clamp(0, 1)
    x, y = (parts.left + pose[:, 0]) / size, (parts.top + pose[:, 1]) / size
    return _Objects(shape, color, x, y, pose[:, 2] / size, confidence, shape_fit, color_fit)


def _best_shape(target: _Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape [N], pose (x, y, radius in pixels) [N, 3], residual energy [N], and the fit of every shape [N, 6]."""
    first = _first_poses(target)  # [N, 6, 3]
    count, kinds = first.shape[:2]
    shapes = torch.arange(kinds, device=first.device)
    indices = torch.arange(count, device=first.device)
    repeated = indices.repeat_interleave(kinds)
    rough = _residual(target[repeated], _cover(shapes.repeat(count), first.flatten(0, 1), target.width))
    rough = rough.view(count, kinds)
    leaders = rough.topk(REFINED, 1, largest=False).indices  # [N, 2]
    who = indices.repeat_interleave(REFINED)
    poses, residual = _refine(
        target[who], leaders.flatten(), first[who, leaders.flatten()], rough[who, leaders.flatten()]
    )
    rough = rough.scatter(1, leaders, residual.view(count, REFINED))
    best = residual.view(count, REFINED).argmin(1)
    fit = (1 - rough / target.energy[:, None]).clamp(0, 1)
    place = indices * REFINED + best
    return leaders[indices, best], poses[place], residual[place], fit


def _first_poses(target: _Target) -> Tensor:
    """For each shape the pose with the component's mass and centroid, [N, 6, 3]."""
    near = torch.arange(target.width, device=target.alpha.device, dtype=target.alpha.dtype) + 0.5
    weight = (target.alpha * target.own).view(-1, target.width, target.width)
    mass = weight.sum((1, 2)).clamp_min(1)  # only a strongly negative edge can have less
    x = (weight.sum(1) * near).sum(1) / mass
    y = (weight.sum(2) * near).sum(1) / mass
    radius = (mass[:, None] / mass.new_tensor(AREA)).sqrt()
    return torch.stack([x[:, None].expand_as(radius), y[:, None] - radius * mass.new_tensor(CENTROID_Y), radius], -1)


def _cover(shape: Tensor, pose: Tensor, width: int) -> Tensor:
    """Exact renders in the window, shape [n], pose [n, 3] in pixels -> [n, W * W]."""
    x, y, radius = pose.T / width
    return coverage_maps(shape, x, y, radius, width).flatten(1)


def _residual(target: _Target, cover: Tensor) -> Tensor:
    """Energy that the re-render does not explain, over the component's and the re-render's pixels. [n]"""
    seen = torch.maximum(target.own, (cover > 0).to(cover.dtype)) * target.fair
    return target.lost + target.power * ((target.alpha - cover).square() * seen).sum(1)


def _refine(target: _Target, shape: Tensor, pose: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Newton steps on x, y and radius, kept if the residual falls. pose [n, 3], residual [n]."""
    ridge = 0.1 * torch.eye(3, device=pose.device)  # pixels^2; keeps a step finite if a map has no edges
    for _ in range(STEPS):
        cover = _cover(shape, pose, target.width)
        moved = pose[None] + NUDGE * torch.eye(3, device=pose.device)[:, None]  # [3, n, 3]
        gradients = (_cover(shape.repeat(3), moved.flatten(0, 1), target.width).view(3, *cover.shape) - cover) / NUDGE
        gradients = gradients * target.fair
        normal = torch.einsum("inp,jnp->nij", gradients, gradients) + ridge
        projection = torch.einsum("inp,np->ni", gradients, target.alpha - cover)
        step = torch.linalg.solve(normal, projection).clamp(-1, 1)  # a linear model holds for about a pixel
        tried = pose + step
        tried = torch.cat([tried[:, :2], tried[:, 2:].clamp_min(1)], 1)
        left = _residual(target, _cover(shape, tried, target.width))
        better = left < residual
        pose, residual = torch.where(better[:, None], tried, pose), torch.where(better, left, residual)
    return pose, residual


def _fill(found: Tensor, objects: _Objects) -> Detections:
    """Write objects with a confidence above KEEP into the slots of their images."""
    kept = objects.confidence > KEEP
    image, slot = (index[kept] for index in torch.nonzero(found, as_tuple=True))

    def column(values: Tensor, empty: float) -> Tensor:
        full = torch.full((*found.shape, *values.shape[1:]), empty, dtype=values.dtype, device=values.device)
        full[image, slot] = values[kept]
        return full

    shape, color = column(objects.shape, ANY), column(objects.color, ANY)
    rest = (objects.x, objects.y, objects.radius, objects.confidence, objects.shape_fit, objects.color_fit)
    return _by_confidence(Detections(shape, color, *(column(values, 0) for values in rest)))
