"""The checker of the Shapes world is right on images whose truth is known, in both directions."""

import math

import pytest
import torch
import torch.nn.functional as F

from gdmd.shapes import detect as detector
from gdmd.shapes.check import partial_credit, shapeseval, summarize
from gdmd.shapes.detect import detect, from_scenes
from gdmd.shapes.grammar import SHAPES, TASKS, catalog, draw_rows
from gdmd.shapes.measures import coverage, coverage_by_attribute, fidelity
from gdmd.shapes.pretrain.scorer_data import draw_negatives, may_be_true
from gdmd.shapes.render import Scenes, coverage_maps, draw_scenes, render

torch.set_num_threads(1)


def drawn(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = draw_rows(count, generator)
    scenes = draw_scenes(rows, generator)
    return rows, scenes, render(scenes), generator


def blurred(images, width=0.6):
    near = torch.exp(-(torch.arange(-3, 4).float() ** 2) / (2 * width**2))
    kernel = (near / near.sum())[None] * (near / near.sum())[:, None]
    return F.conv2d(F.pad(images, (3,) * 4, mode="replicate"), kernel.expand(3, 1, 7, 7), groups=3)


def scene(*objects):
    columns = list(zip(*objects, strict=True))
    return Scenes(*(torch.tensor([c]) for c in columns))


def verdict(text, *objects):
    return shapeseval(from_scenes(scene(*objects)), torch.tensor([catalog().row(text)])).item()


CIRCLE, SQUARE, TRIANGLE = (SHAPES.index(n) for n in ("circle", "square", "triangle"))
RED, BLUE = 0, 5


@pytest.fixture(scope="module")
def true_renders():
    rows, scenes, images, generator = drawn(1200)
    return rows, scenes, images, detect(images), generator


def test_area_and_centroid_constants_match_the_outlines():
    half = torch.full((6,), 0.5, dtype=torch.float64)
    maps = coverage_maps(torch.arange(6), half, half, half * 0.6, 600)
    place = (torch.arange(600, dtype=torch.float64) + 0.5) / 600 - 0.5
    area = maps.sum((1, 2)) / 600**2 / 0.09
    centroid = (maps.sum(2) * place).sum(1) / maps.sum((1, 2)) / 0.3
    assert torch.allclose(area, torch.tensor(detector.AREA, dtype=torch.float64), atol=2e-3)
    assert torch.allclose(centroid, torch.tensor(detector.CENTROID_Y, dtype=torch.float64), atol=2e-3)


def test_detections_equal_the_scenes(true_renders):
    _, scenes, _, found, _ = true_renders
    truth = from_scenes(scenes)

    def key(d):
        return (d.shape * 100 + d.color * 10 + d.x) * d.present

    pick, want = key(found).argsort(dim=1), key(truth).argsort(dim=1)
    for name in ("shape", "color"):
        same = getattr(found, name).gather(1, pick) == getattr(truth, name).gather(1, want)
        assert same.all(1).float().mean() >= 0.995, name
    for name in ("x", "y", "radius"):
        error = (getattr(found, name).gather(1, pick) - getattr(truth, name).gather(1, want)).abs()
        assert error.quantile(0.99) < 0.1 / 32, name  # a tenth of a pixel


def test_true_renders_pass(true_renders):
    rows, _, _, found, _ = true_renders
    scores = summarize(shapeseval(found, rows), catalog().task[rows])
    assert set(scores) == {"overall", *TASKS} and min(scores.values()) >= 0.99


def test_hard_negatives_fail(true_renders):
    rows, _, _, found, generator = true_renders
    other = draw_negatives(rows, generator)
    scenes = draw_scenes(other, generator)
    wrong = ~torch.cat(
        [may_be_true(part, own).diagonal() for part, own in zip(parts(scenes), rows.split(64), strict=True)]
    )
    assert (rows != other).all() and wrong.float().mean() > 0.8
    negatives = detect(render(scenes))
    assert shapeseval(negatives, other).float().mean() >= 0.99
    scores = summarize(shapeseval(negatives, rows)[wrong], catalog().task[rows][wrong])
    assert max(scores.values()) <= 0.01
    less = partial_credit(negatives, rows) < partial_credit(found, rows)
    assert less[wrong].float().mean() >= 0.99


def parts(scenes):
    return [scenes[slice(start, start + 64)] for start in range(0, len(scenes.shape), 64)]


def test_blur_and_noise_keep_verdicts():
    rows, _, images, generator = drawn(300, seed=2)
    noise = 0.03 * torch.randn(images.shape, generator=generator)
    for name, proxy in {"noise": images + noise, "blur": blurred(images), "both": blurred(images) + noise}.items():
        assert shapeseval(proxy, rows).float().mean() >= 0.97, name


def test_geneval_logic_by_hand():
    left, right = (CIRCLE, RED, 0.25, 0.5, 0.13), (SQUARE, BLUE, 0.75, 0.5, 0.13)
    assert verdict("a circle", left, right) and not verdict("a triangle", left, right)
    assert verdict("a circle", left, (CIRCLE, BLUE, 0.75, 0.5, 0.13))  # two circles hold a circle
    assert verdict("a circle and a square", left, right) and not verdict("a circle and a square", left)
    assert verdict("a red circle and a blue square", left, right)
    assert not verdict("a blue circle and a red square", left, right)
    assert verdict("a circle left of a square", left, right) and verdict("a square right of a circle", left, right)
    for relation in ("right of", "above", "below"):
        assert not verdict(f"a circle {relation} a square", left, right)
    third = (CIRCLE, RED, 0.5, 0.85, 0.11)
    assert verdict("two circles", left, third) and not verdict("two circles", left)
    assert not verdict("two circles", left, third, (CIRCLE, RED, 0.75, 0.3, 0.11))


def test_position_rule_subtracts_the_slack():
    below = (SQUARE, BLUE, 0.5, 0.5, 0.16)
    near = (CIRCLE, RED, 0.5 - 0.15, 0.5 - 0.24, 0.16)  # cosine 0.53 before the slack, 0.32 after it
    assert not verdict("a circle left of a square", near, below)
    assert verdict("a circle above a square", near, below)


def test_empty_image_scores_zero():
    images = torch.tensor([0.10, 0.11, 0.14])[None, :, None, None].expand(6, 3, 32, 32)
    rows = torch.stack([catalog().rows("train", task)[0] for task in range(6)])
    found = detect(images)
    assert not found.present.any() and not shapeseval(found, rows).any()
    assert (fidelity(images, found) == 0).all() and (partial_credit(found, rows) == 0).all()


def test_detect_refuses_bad_input():
    with pytest.raises(ValueError, match="32, 32"):
        detect(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="NaN"):
        detect(torch.full((1, 3, 32, 32), math.nan))
    assert len(detect(torch.zeros(0, 3, 32, 32))) == 0


def test_fidelity_falls_with_noise(true_renders):
    _, _, images, found, generator = true_renders
    clean = fidelity(images, found)
    assert (clean > 0.97).float().mean() >= 0.995 and clean.max() <= 1  # 0 where the detector found nothing
    rough = images[:300] + 0.1 * torch.randn(300, 3, 32, 32, generator=generator)
    assert fidelity(rough, detect(rough)).mean() < clean.mean() - 0.05


def test_coverage_detects_collapse(true_renders):
    rows, scenes, _, found, _ = true_renders
    correct = shapeseval(found, rows)
    whole = coverage_by_attribute(found, rows, correct)
    assert set(whole) == {"color", "place", "size"} and min(whole.values()) > 0.99
    changed = {"color": ("color", torch.zeros_like(scenes.color)), "size": ("radius", scenes.radius * 0 + 0.12)}
    changed["place"] = ("x", scenes.x * 0.5)
    for attribute, (column, values) in changed.items():
        parts = {name: getattr(scenes, name) for name in Scenes.__dataclass_fields__} | {column: values}
        collapsed = coverage_by_attribute(from_scenes(Scenes(**parts)), rows, correct)
        assert collapsed[attribute] < whole[attribute] - 0.1, attribute
    assert coverage(found, rows, torch.zeros_like(correct)) == 0


def test_named_colors_are_not_free():
    rows = catalog().rows("train", TASKS.index("colors"))
    found = from_scenes(draw_scenes(rows, torch.Generator().manual_seed(0)))
    assert set(coverage_by_attribute(found, rows, torch.ones(len(rows), dtype=torch.bool))) == {"place", "size"}
