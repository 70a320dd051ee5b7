"""Training data of the Shapes scorers: hard negatives, which captions are true of a scene, and graded corruptions.

Every label comes from the scene that was drawn and the corruption that was applied, never from the image itself. All
draws come from one generator that the caller keys by (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.shapes.grammar import ANY, COLORS, INVERSE, SHAPES, SPLITS, TASKS, Caption, Split, catalog, draw_rows
from gdmd.shapes.render import BACKGROUND, RADIUS, Scenes, draw_scenes, render

COUNTING, POSITION = TASKS.index("counting"), TASKS.index("position")
AXIS = 0.45  # a relation may hold above this direction cosine (the checker's rule: 0.5); below it, it does not


@lru_cache(maxsize=8)
def hard_negatives(split: Split | None = "train") -> tuple[Tensor, Tensor]:
    """Rows of captions of the same task with one attribute, count or relation changed, or two attributes swapped.

    split: the negatives belong to this split or to all splits; None allows any. Returns ([P, N], count [P]),
    the rows padded with ANY.
    """
    table = catalog()
    place = {_asked(c): row for row, c in enumerate(table.captions)}
    near: list[list[int]] = []
    for caption in table.captions:
        found = dict.fromkeys(place[other] for other in _variants(caption) if other in place)
        ok = [r for r in found if split is None or int(table.split[r]) in (ANY, SPLITS.index(split))]
        near.append([r for r in ok if table.captions[r].key != caption.key])
    width = max(map(len, near))
    rows = torch.tensor([n + [ANY] * (width - len(n)) for n in near])
    return rows, (rows != ANY).sum(1)


_Asked = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def _asked(caption: Caption) -> _Asked:
    return (caption.task, caption.shape, caption.color, caption.count, caption.relation)


def _changed(values: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """``values`` with one entry replaced by each other value below ``count``."""
    return [(*values[:k], v, *values[k + 1 :]) for k in range(len(values)) for v in range(count) if v != values[k]]


def _variants(caption: Caption) -> list[_Asked]:
    task, shape, color, count, relation = _asked(caption)
    found = [(task, s, color, count, relation) for s in _changed(shape, len(SHAPES))]
    if color[0] != ANY:
        found += [(task, shape, c, count, relation) for c in _changed(color, len(COLORS))]
        found.append((task, shape, color[::-1], count, relation))
    if task == COUNTING:
        found += [(task, shape, color, n, relation) for n in _changed(count, 10)]
    if task == POSITION:
        others = [(task, shape, color, count, r) for r in range(len(INVERSE)) if r != relation]
        found += [*others, (task, shape[::-1], color, count, relation)]
    return found


def draw_negatives(rows: Tensor, generator: torch.Generator, split: Split | None = "train") -> Tensor:
    """One uniformly drawn hard negative of each row, [B]; a row that has none in the split is an error."""
    near, count = hard_negatives(split)
    if bool((count[rows] == 0).any()):
        lonely = [catalog().captions[int(r)].text for r in rows if count[r] == 0]
        raise ValueError(f"captions without a hard negative in split {split!r}: {lonely}; draw them from another split")
    choice = (torch.rand(len(rows), generator=generator) * count[rows]).long()
    return near[rows, choice]


def may_be_true(scenes: Scenes, rows: Tensor) -> Tensor:
    """Whether a caption may be true of a scene, [B, N] bool; such a pair must not be used as a negative.

    Lenient: a count must be exact, any other object must occur at least once, a relation needs a direction cosine of
    AXIS.
    """
    table = catalog()
    shape, color, wanted = table.shape[rows], table.color[rows], table.count[rows]  # [N, 2]
    same = (scenes.shape[:, None, None] == shape[None, ..., None]) & scenes.present[:, None, None]  # [B, N, 2, K]
    same &= (color == ANY)[None, ..., None] | (scenes.color[:, None, None] == color[None, ..., None])
    number = same.sum(-1)
    enough = torch.where(wanted > 1, number == wanted, (number >= wanted)).all(-1)  # [B, N]
    relation = table.relation[rows]
    dx = scenes.x[:, :, None] - scenes.x[:, None]  # [B, K, K]: first minus second
    dy = scenes.y[:, :, None] - scenes.y[:, None]
    along = torch.stack([-dx, dx, -dy, dy], 1) / torch.hypot(dx, dy).clamp_min(1e-6)[:, None]  # [B, 4, K, K]
    holds = (along >= AXIS)[:, relation.clamp_min(0)]  # [B, N, K, K]
    related = (holds & same[:, :, 0, :, None] & same[:, :, 1, None]).flatten(2).any(-1)
    return enough & ((relation == ANY) | related)


def minimal_pair(scenes: Scenes, rows: Tensor, generator: torch.Generator) -> Scenes:
    """Scenes of the captions ``rows`` that copy everything from ``scenes`` that these captions leave open or share."""
    table = catalog()
    fresh = draw_scenes(rows, generator)
    slots = fresh.shape.shape[1]
    second = (torch.arange(slots)[None] >= table.count[rows, :1]).long()
    asked = table.color[rows].gather(1, second)
    color = torch.where(asked == ANY, scenes.color, fresh.color)
    still = (fresh.present == scenes.present).all(1) & (table.relation[rows] == ANY)
    x, y, radius = (
        torch.where(still[:, None], old, new)
        for old, new in ((scenes.x, fresh.x), (scenes.y, fresh.y), (scenes.radius, fresh.radius))
    )
    return Scenes(fresh.shape, color, x, y, radius)


def joined(*parts: Scenes) -> Scenes:
    """Concatenate batches of scenes."""
    fields = ("shape", "color", "x", "y", "radius")
    return Scenes(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def choose(mask: Tensor, yes: Scenes, no: Scenes) -> Scenes:
    """``yes`` where mask [B] is true, else ``no``, per scene."""
    pick = torch.where(mask, torch.arange(len(mask)), torch.arange(len(mask)) + len(mask))
    return joined(yes, no)[pick]


@dataclass(frozen=True)
class SceneBatch:
    """n captions, a hard negative of each, and two scenes for both: ``true``/``wrong`` and ``again``/``wrong_again`` are
    minimal pairs."""

    rows: Tensor  # [n]
    near: Tensor  # [n]
    true: Scenes
    again: Scenes
    wrong: Scenes
    wrong_again: Scenes

    def __getitem__(self, part: slice) -> SceneBatch:
        return SceneBatch(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def draw_scene_batch(count: int, generator: torch.Generator) -> SceneBatch:
    """Scenes for captions of the train split. Rejection sampling of places is cheaper for many scenes at once."""
    rows = draw_rows(count, generator)
    near = draw_negatives(rows, generator)
    true, again = draw_scenes(rows, generator), draw_scenes(rows, generator)
    return SceneBatch(
        rows, near, true, again, minimal_pair(true, near, generator), minimal_pair(again, near, generator)
    )


CORRUPTIONS = ("none", "blur", "noise", "tint", "faint", "ghost", "deform", "overlap", "extra")
"""Kinds of corruption, each with a level in [0, 1]."""
WORST = (0.0, 1.2, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 1.0)  # severity at level 1, in wrong attributes


@dataclass(frozen=True)
class Corruption:
    """How B images are corrupted: kind [B] index into CORRUPTIONS, level [B] in [0, 1]."""

    kind: Tensor
    level: Tensor

    @property
    def severity(self) -> Tensor:
        """[B], in units of one wrong attribute."""
        return torch.tensor(WORST)[self.kind] * self.level


def corrupt(scenes: Scenes, others: Scenes, corruption: Corruption, generator: torch.Generator) -> Tensor:
    """Corrupted images of ``scenes`` ([B]), [B, 3, 32, 32]; the difference grows with the level.

    others: [B] scenes of the same captions, which the kind "ghost" blends in.
    """
    images = render(_overlapped(scenes, corruption))
    for index, name in enumerate(CORRUPTIONS):
        mine = torch.nonzero(corruption.kind == index)[:, 0]
        if len(mine):
            images[mine] = _corrupt_one(
                name, images[mine], scenes[mine], others[mine], corruption.level[mine], generator
            )
    return images.clamp(0, 1)


def _corrupt_one(
    name: str, images: Tensor, scenes: Scenes, others: Scenes, level: Tensor, generator: torch.Generator
) -> Tensor:
    """Apply one kind of corruption to n images, [n, 3, 32, 32]."""
    share = level[:, None, None, None]
    match name:
        case "blur":
            return _blurred(images, 2.5 * level)
        case "noise":
            fine = torch.randn(images.shape, generator=generator)
            coarse = torch.rand(len(images), 3, 4, 4, generator=generator) - 0.5
            return images + 0.3 * share * (0.5 * fine + 1.5 * F.interpolate(coarse, size=32, mode="bicubic"))
        case "tint":
            return images.lerp(torch.rand(len(images), 3, 1, 1, generator=generator), 0.5 * share)
        case "faint":
            return images.lerp(torch.tensor(BACKGROUND)[:, None, None], 0.9 * share)
        case "ghost":
            return images.lerp(render(others), 0.5 * share)
        case "deform":
            return _warped(images, share, generator)
        case "extra":
            return images.lerp(render(_with_extra(scenes, generator)), share)
    return images  # "none", and "overlap", which moves objects before rendering


def _overlapped(scenes: Scenes, corruption: Corruption) -> Scenes:
    """Corruption "overlap": the second object (if any) slides onto the first, up to 0.7 of the way."""
    mine = (corruption.kind == CORRUPTIONS.index("overlap")) & scenes.present[:, 1]
    share = torch.where(mine, 0.7 * corruption.level, 0.0)
    x, y = scenes.x.clone(), scenes.y.clone()
    x[:, 1] = x[:, 1].lerp(x[:, 0], share)
    y[:, 1] = y[:, 1].lerp(y[:, 0], share)
    return replace(scenes, x=x, y=y)


def _with_extra(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """The scenes with one more object of an existing shape at a random place (it may overlap), [B, K + 1]."""
    unit = torch.rand(4, len(scenes), 1, generator=generator)
    low, high = RADIUS
    color = torch.where(unit[0] < 0.5, scenes.color[:, :1], (unit[1] * len(COLORS)).long())
    x, y, radius = 0.15 + 0.7 * unit[2], 0.15 + 0.7 * unit[3], low + (high - low) * unit[1]
    added = (scenes.shape[:, :1], color, x, y, radius)
    own = (scenes.shape, scenes.color, scenes.x, scenes.y, scenes.radius)
    return Scenes(*(torch.cat([old, new], 1) for old, new in zip(own, added, strict=True)))


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of width sigma [B] in pixels, separable, renormalized at the edges."""
    place = torch.arange(float(images.shape[-1]))
    apart = (place[:, None] - place) / sigma[:, None, None].clamp_min(0.05)
    rows = torch.softmax(-0.5 * apart**2, -1)[:, None]  # [B, 1, 32, 32]
    return rows @ images @ rows.mT


def _warped(images: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to about 3 pixels at level 1."""
    knots = torch.rand(len(images), 2, 6, 6, generator=generator) - 0.5
    shift = 0.5 * level * F.interpolate(knots, size=32, mode="bicubic", align_corners=True)
    axis = torch.linspace(-1, 1, 32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return F.grid_sample(images, grid + shift.permute(0, 2, 3, 1), padding_mode="border", align_corners=True)
