"""Scenes and their anti-aliased images: vectorized, seeded, on any device.

A scene is a set of objects that do not touch, on a plain background. Lengths are in units of the canvas (0 ... 1,
x to the right, y down); an object's ``radius`` is about its half extent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.shapes.grammar import ANY, COLORS, MAX_COUNT, SHAPES, catalog

IMAGE_SIZE = 32
"""Pixels along a side."""
RADIUS = (0.13, 0.19)
CROWD = 0.0175
"""The largest radius falls by this for every object beyond the second: four large ones would not fit."""
GAP = 0.05
"""Minimum free space between two objects; half of it at the border."""
AXIS = 0.75
"""Minimum direction cosine of a relation in the data; the checker requires 0.5 (GenEval's rule)."""
BACKGROUND = (0.10, 0.11, 0.14)
RGB = (
    (0.90, 0.16, 0.18),  # red
    (0.98, 0.55, 0.10),  # orange
    (0.98, 0.90, 0.22),  # yellow
    (0.16, 0.70, 0.25),  # green
    (0.20, 0.85, 0.90),  # cyan
    (0.22, 0.38, 0.98),  # blue
    (0.66, 0.24, 0.86),  # purple
    (0.96, 0.96, 0.96),  # white
)
SQUARE, DIAMOND, ARM, RING_MIDDLE, RING_HALF = 0.88, 1.15, 0.36, 0.75, 0.27
TRIANGLE_TOP, TRIANGLE_BASE = -1.05, 0.80


@dataclass(frozen=True)
class Scenes:
    """B scenes of up to K objects; shape is ANY (-1) in empty places."""

    shape: Tensor  # [B, K] index into SHAPES
    color: Tensor  # [B, K] index into COLORS
    x: Tensor  # [B, K] center
    y: Tensor  # [B, K]
    radius: Tensor  # [B, K]

    def __len__(self) -> int:
        return len(self.shape)

    @property
    def present(self) -> Tensor:
        """[B, K] bool."""
        return self.shape != ANY

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(t.to(device) for t in (self.shape, self.color, self.x, self.y, self.radius)))

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(self.shape[rows], self.color[rows], self.x[rows], self.y[rows], self.radius[rows])


def draw_scenes(rows: Tensor, generator: torch.Generator) -> Scenes:
    """Random scenes that satisfy the captions ``rows`` ([B] of the catalog); free attributes are uniform."""
    table = catalog()
    count = table.count[rows]  # [B, 2]
    slots = torch.arange(MAX_COUNT)[None]  # [1, K]
    first = slots < count[:, :1]
    second = (slots >= count[:, :1]) & (slots < count.sum(1, keepdim=True))
    which = second.long()
    present = first | second
    shape = torch.where(present, table.shape[rows].gather(1, which), ANY)
    asked = table.color[rows].gather(1, which)
    free = torch.randint(len(COLORS), shape.shape, generator=generator)
    color = torch.where(asked == ANY, free, asked)
    low, high = RADIUS
    top = high - CROWD * (count.sum(1, keepdim=True) - 2).clamp_min(0)  # [B, 1]
    radius = low + (top - low) * torch.rand(shape.shape, generator=generator)
    x, y = _place(radius, present, table.relation[rows], generator)
    return Scenes(shape, color, x, y, radius)


def _place(radius: Tensor, present: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rejection sampling: draw all centers of a scene until no two objects touch and the relation holds."""
    x, y = torch.zeros_like(radius), torch.zeros_like(radius)
    todo = torch.arange(len(radius))
    while len(todo):
        tries = min(512, max(8, 4096 // len(todo)))  # more tries at once for the last few scenes
        r = radius[todo, None]  # [n, 1, K]
        edge = 1.15 * r + GAP / 2
        unit = torch.rand(2, len(todo), tries, r.shape[-1], generator=generator)
        xs, ys = edge + unit * (1 - 2 * edge)  # [n, tries, K] each
        good = _apart(xs, ys, r, present[todo]) & _related(xs, ys, relation[todo])  # [n, tries]
        hit, choice = good.max(1)
        done, pick = todo[hit], choice[hit]
        kept = torch.arange(len(todo))[hit]
        x[done], y[done] = xs[kept, pick], ys[kept, pick]
        todo = todo[~hit]
    return x, y


def _apart(xs: Tensor, ys: Tensor, r: Tensor, present: Tensor) -> Tensor:
    good = torch.ones(xs.shape[:2], dtype=torch.bool)
    for i in range(xs.shape[-1]):
        for j in range(i):
            distance = torch.hypot(xs[..., i] - xs[..., j], ys[..., i] - ys[..., j])
            both = (present[:, i] & present[:, j])[:, None]
            good &= ~both | (distance >= 1.1 * (r[..., i] + r[..., j]) + GAP)
    return good


def _related(xs: Tensor, ys: Tensor, relation: Tensor) -> Tensor:
    dx, dy = xs[..., 0] - xs[..., 1], ys[..., 0] - ys[..., 1]
    distance = torch.hypot(dx, dy).clamp_min(1e-6)
    along = torch.stack([-dx, dx, -dy, dy], -1) / distance[..., None]  # in the order of RELATIONS
    wanted = relation.clamp_min(0)[:, None, None].expand(*dx.shape, 1)
    return (relation == ANY)[:, None] | (along.gather(-1, wanted)[..., 0] >= AXIS)


def signed_distance(shape: int, ux: Tensor, uy: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of radius 1, negative inside (exact but for corners)."""
    ax, ay = ux.abs(), uy.abs()
    match SHAPES[shape]:
        case "circle":
            return torch.hypot(ux, uy) - 1
        case "square":
            return torch.maximum(ax, ay) - SQUARE
        case "triangle":
            height = TRIANGLE_BASE - TRIANGLE_TOP
            side = (height * ax - (uy - TRIANGLE_TOP)) / math.hypot(height, 1)
            return torch.maximum(side, uy - TRIANGLE_BASE)
        case "diamond":
            return (ax + ay - DIAMOND) / math.sqrt(2)
        case "cross":
            return torch.minimum(torch.maximum(ax - ARM, ay - 1), torch.maximum(ax - 1, ay - ARM))
        case "ring":
            return (torch.hypot(ux, uy) - RING_MIDDLE).abs() - RING_HALF
    raise AssertionError(f"no outline for shape {shape}")


def coverage_maps(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """How much of each pixel an object covers: shape, x, y, radius [N] -> [N, size, size] in [0, 1].

    Objects are grouped by shape, so that only one outline is computed for each. Differentiable in x, y and radius.
    """
    centers = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size
    order = torch.argsort(shape, stable=True)
    pieces: list[Tensor] = []
    for index, share in enumerate(torch.bincount(shape, minlength=len(SHAPES)).tolist()):
        start = sum(p.shape[0] for p in pieces)
        own = order[start : start + share]
        r = radius[own, None, None]
        ux = (centers[None, None, :] - x[own, None, None]) / r
        uy = (centers[None, :, None] - y[own, None, None]) / r
        pieces.append((0.5 - signed_distance(index, ux, uy) * (r * size)).clamp(0, 1).expand(share, size, size))
    return torch.cat(pieces)[torch.argsort(order)]


def render(scenes: Scenes) -> Tensor:
    """Images of the scenes, [B, 3, 32, 32] in [0, 1]: background plus coverage times (color - background)."""
    device = scenes.x.device
    background = torch.tensor(BACKGROUND, device=device)
    scene, slot = torch.nonzero(scenes.present, as_tuple=True)
    picked = [t[scene, slot] for t in (scenes.shape, scenes.x, scenes.y, scenes.radius)]
    cover = coverage_maps(picked[0], picked[1], picked[2], picked[3], IMAGE_SIZE)  # [N, H, W]
    paint = torch.tensor(RGB, device=device)[scenes.color[scene, slot]] - background  # [N, 3]
    images = background[None, :, None, None].repeat(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE)
    images.index_add_(0, scene, cover[:, None] * paint[:, :, None, None])
    return images
