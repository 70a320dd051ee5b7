"""ShapesEval: does an image show what its caption asks for? GenEval's logic (arXiv 2310.11513) on exact detections.

Strict: every requirement must hold. Counting is exact and needs a higher confidence. Colors are read from the most
confident objects of the shape. A relation must hold for every pair of detected objects, after 0.1 of both widths
(heights) is subtracted from the offset. ``partial_credit`` is a different, smooth score: a reward, never reported as
ShapesEval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.shapes.detect import Detections, detect
from gdmd.shapes.grammar import ANY, TASKS, catalog

COUNT_KEEP = 0.6
"""Minimum confidence of a counted object (GenEval: 0.9, on another scale); see docs/concepts/shapes.md."""
SLACK, DIRECTION = 0.1, 0.5
"""GenEval's position rule: share of the boxes' sizes subtracted from the offset, and the minimum direction cosine."""


def shapeseval(images: Tensor | Detections, rows: Tensor) -> Tensor:
    """Strict correctness, images [B, 3, S, S] (or what ``detect`` found in them), catalog rows [B] -> [B] bool."""
    found = _found(images, rows)
    table = catalog()
    rows = rows.to(found.shape.device)
    task = table.task.to(rows.device)[rows]
    first, second = (_requested(found, rows, side) for side in (0, 1))
    present = _right(found, first, rows, 0) & _right(found, second, rows, 1)
    counting = task == TASKS.index("counting")
    shape, count = (c.to(rows.device)[rows, 0] for c in (table.shape, table.count))
    number = ((found.shape == shape[:, None]) & (found.confidence > COUNT_KEEP)).sum(1)
    relation = table.relation.to(rows.device)[rows]
    pairs = first[:, :, None] & second[:, None, :]
    along = _along(found, relation) > DIRECTION
    related = (relation == ANY) | (along | ~pairs).all((1, 2))
    return torch.where(counting, number == count, present & related)


def partial_credit(images: Tensor | Detections, rows: Tensor) -> Tensor:
    """Mean degree to which the caption's requirements are met, smooth in confidences and positions. [B] in [0, 1]

    Presence: confidence of the best object of the shape, or half the best fit of that shape to another object.
    Color: the same times the object's fit to that color, halved if it was detected in another color.
    Number: 1 - |sum of confidences - count| / count, at least 0.
    Relation: (cosine + 1) / 1.5, at most 1, for the chosen pair; 0 if one is missing.
    """
    found = _found(images, rows)
    table = catalog()
    device = found.shape.device
    rows = rows.to(device)
    degrees, weights = [], []
    for side in (0, 1):
        shape, color, count = (c.to(device)[rows, side] for c in (table.shape, table.color, table.count))
        degree, chosen = _presence(found, shape)
        own = found.color_fit.gather(1, chosen[:, None, None].expand(-1, -1, found.color_fit.shape[2]))[:, 0]
        right = found.color.gather(1, chosen[:, None])[:, 0] == color
        fit = own.gather(1, color.clamp_min(0)[:, None])[:, 0]
        number = ((found.shape == shape[:, None]) * found.confidence).sum(1)
        enough = (1 - (number - count).abs() / count.clamp_min(1)).clamp_min(0)
        degrees += [torch.where(count > 1, enough, degree), degree * fit * torch.where(right, 1.0, 0.5)]
        weights += [count > 0, color != ANY]
    relation = table.relation.to(device)[rows]
    degrees.append(_relation_degree(found, rows, relation))
    weights.append(relation != ANY)
    weight = torch.stack(weights).float()
    return (torch.stack(degrees) * weight).sum(0) / weight.sum(0)


def summarize(correct: Tensor, task: Tensor) -> dict[str, float]:
    """Means per task and ``overall``, their unweighted mean; correct, task [B]. Tasks without images are left out."""
    if correct.shape != task.shape or not len(task):
        got = f"{list(correct.shape)} and {list(task.shape)}"
        raise ValueError(f"summarize needs correct [B] and task [B] with B > 0, got {got}; pass one task per image")
    scores = {
        name: correct[task == index].double().mean().item() for index, name in enumerate(TASKS) if (task == index).any()
    }
    return {"overall": sum(scores.values()) / len(scores), **scores}


def matched(found: Detections, rows: Tensor) -> Tensor:
    """The objects that the captions ask for: the most confident ``count`` of each requested shape. [B, M] bool"""
    return _requested(found, rows, 0) | _requested(found, rows, 1)


def _found(images: Tensor | Detections, rows: Tensor) -> Detections:
    if len(images) != len(rows):
        raise ValueError(f"got {len(images)} images and {len(rows)} rows; pass the catalog row of every image")
    return images if isinstance(images, Detections) else detect(images)


def _requested(found: Detections, rows: Tensor, side: int) -> Tensor:
    """The top ``count`` objects of the caption's first (side 0) or second shape, by confidence. [B, M] bool"""
    table = catalog()
    shape, count = (c.to(rows.device)[rows, side].to(found.shape.device) for c in (table.shape, table.count))
    same = (found.shape == shape[:, None]) & found.present  # detections are sorted by confidence
    return same & (same.cumsum(1) <= count[:, None])


def _right(found: Detections, asked: Tensor, rows: Tensor, side: int) -> Tensor:
    """Whether there are enough objects of a shape, all in the right color. [B] bool"""
    table = catalog()
    color, count = (c.to(rows.device)[rows, side] for c in (table.color, table.count))
    painted = (color[:, None] == ANY) | (found.color == color[:, None]) | ~asked
    return (asked.sum(1) >= count) & painted.all(1)


def _along(found: Detections, relation: Tensor) -> Tensor:
    """GenEval's direction cosine of object i from object j along the caption's relation, 0 if there is none. [B, M, M]"""
    box = found.box
    offset = box[:, :, None, :2] - box[:, None, :, :2]  # [B, M, M, 2]
    slack = SLACK * (box[:, :, None, 2:] + box[:, None, :, 2:])
    revised = (offset.abs() - slack).clamp_min(0) * offset.sign()
    direction = revised / offset.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    dx, dy = direction.unbind(-1)
    by_relation = torch.stack([-dx, dx, -dy, dy])  # in the order of RELATIONS
    return by_relation[relation.clamp_min(0), torch.arange(len(relation), device=relation.device)]


def _presence(found: Detections, shape: Tensor) -> tuple[Tensor, Tensor]:
    """Degree of presence of a shape and the slot that gives it, [B] each."""
    same = (found.shape == shape[:, None]) & found.present
    index = shape.clamp_min(0)[:, None, None].expand(-1, found.shape.shape[1], 1)
    degree = torch.where(same, found.confidence, 0.5 * found.shape_fit.gather(2, index)[..., 0])
    best, chosen = (torch.where(same, degree + 1, degree)).max(1)  # a real object comes before any lookalike
    return torch.where(best > 1, best - 1, best), chosen


def _relation_degree(found: Detections, rows: Tensor, relation: Tensor) -> Tensor:
    first, second = (_requested(found, rows, side) for side in (0, 1))
    both = first.any(1) & second.any(1)
    i, j = first.int().argmax(1), second.int().argmax(1)
    along = _along(found, relation)[torch.arange(len(rows), device=rows.device), i, j]
    return ((along + 1) / (1 + DIRECTION)).clamp(0, 1) * both
