"""How often a scorer ranks the truth above a hard negative, per task, for the train and the eval split.

Scenes are new in both splits; captions of the eval split were never trained on. Labels come from the drawn scenes.
"""

from __future__ import annotations

from typing import Any

import torch

from gdmd.shapes.grammar import TASKS, Split, catalog
from gdmd.shapes.pretrain.scorer_data import CORRUPTIONS, Corruption, corrupt, draw_negatives, may_be_true, minimal_pair
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.scorer_networks import DualEncoder, Preference

_SEED = 4711  # of the test sets; different from every training seed's (seed, step) keys


@torch.no_grad()
def measure(net: DualEncoder | Preference, per_task: int = 500) -> dict[str, Any]:
    """Shares of correct orders: {split: {"caption" | "image": {task or "mean": share}}, "damage": {kind: share}}.

    caption: score(true image, true caption) > score(true image, hard negative caption).
    image: score(true image, caption) > score(image of the hard negative, caption).
    damage: score(level a) > score(level b) for a + 0.25 <= b, same scene, by kind of corruption.
    Each split also has "true_score": mean and std on true renders.
    """
    report: dict[str, Any] = {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        cells = [_hard(net, split, task, per_task) for task in range(len(TASKS))]
        report[split] = {name: _with_mean([cell[name] for cell in cells]) for name in ("caption", "image")}
        truth = torch.cat([cell["scores"] for cell in cells])
        report[split]["true_score"] = [round(float(truth.mean()), 4), round(float(truth.std()), 4)]
    report["damage"] = {
        name: _corruption_order(net, kind, per_task) for kind, name in enumerate(CORRUPTIONS) if name != "none"
    }
    return report


def _with_mean(shares: list[float]) -> dict[str, float]:
    cells = dict(zip(TASKS, shares, strict=True))
    return {name: round(share, 4) for name, share in {**cells, "mean": sum(shares) / len(shares)}.items()}


def _hard(net: DualEncoder | Preference, split: Split, task: int, count: int) -> dict[str, Any]:
    """Accuracy of one task; negatives may come from any split."""
    generator = torch.Generator().manual_seed(_SEED + task)
    table = catalog()
    own = table.rows(split, task)
    rows = own[(torch.rand(count, generator=generator) * len(own)).long()]
    scenes = draw_scenes(rows, generator)
    near = draw_negatives(rows, generator, split=None)
    images, others = render(scenes), render(minimal_pair(scenes, near, generator))
    truly_wrong = ~may_be_true(scenes, near).diagonal()
    text = net.text_features(table.tokens[rows])
    truth = net(images, text)
    caption = (truth > net(images, net.text_features(table.tokens[near])))[truly_wrong].float().mean()
    image = (truth > net(others, text)).float().mean()
    return {"caption": float(caption), "image": float(image), "scores": truth}


def _corruption_order(net: DualEncoder | Preference, kind: int, count: int) -> float:
    """Share of correct orders between two levels of one corruption of a scene, on two-object captions of eval."""
    generator = torch.Generator().manual_seed(_SEED + 100 + kind)
    table = catalog()
    own = table.rows("eval", TASKS.index("two_object"))
    rows = own[(torch.rand(count, generator=generator) * len(own)).long()]
    scenes, others = draw_scenes(rows, generator), draw_scenes(rows, generator)
    low = 0.75 * torch.rand(count, generator=generator)
    high = low + 0.25 + (0.75 - low) * torch.rand(count, generator=generator)
    scores = []
    for level in (low, high):
        same = torch.Generator().manual_seed(_SEED)  # the same noise, ghost and extra object for both
        images = corrupt(scenes, others, Corruption(torch.full((count,), kind), level), same)
        scores.append(net(images, net.text_features(table.tokens[rows])))
    return round(float((scores[0] > scores[1]).float().mean()), 4)
