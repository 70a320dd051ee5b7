"""The Shapes scorers as rewards: gradients, independence of the batch, errors for bad input; their training data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdmd.shapes.grammar import ANY, SPLITS, TASKS, catalog, draw_rows
from gdmd.shapes.pretrain.scorer_data import (
    CORRUPTIONS,
    Corruption,
    corrupt,
    draw_negatives,
    draw_scene_batch,
    hard_negatives,
    may_be_true,
)
from gdmd.shapes.render import Scenes, draw_scenes, render
from gdmd.shapes.rewards import ShapesClip, from_asset, load_scorer
from gdmd.shapes.scorer_networks import KINDS, Kind, Preference, build_net
from gdmd.types import PromptBatch

ASSETS = Path(__file__).parents[2] / "gdmd" / "assets"
TEXTS = ("a red circle", "two squares", "a ring above a cross", "a blue ring and a white diamond")


def batch_of(texts: tuple[str, ...]) -> PromptBatch:
    index = torch.arange(len(texts))
    return PromptBatch(index, texts, index, {}, {})


def renders(texts: tuple[str, ...] = TEXTS, seed: int = 0) -> Tensor:
    rows = torch.tensor([catalog().row(text) for text in texts])
    return render(draw_scenes(rows, torch.Generator().manual_seed(seed)))


def untrained(kind: Kind):
    return load_scorer(kind, build_net(kind, seed=3).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_a_gradient_to_the_images_only(kind: Kind):
    scorer, images = untrained(kind), renders().requires_grad_()
    scores = scorer.score(images, batch_of(TEXTS))
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scorer.differentiable and scorer.name == kind
    (grad,) = torch.autograd.grad(scores.sum(), images)
    assert (grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in scorer.net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_encoded_once(kind: Kind):
    scorer, images = untrained(kind), renders()
    read: list[int] = []
    encoder = scorer.net.match if isinstance(scorer.net, Preference) else scorer.net
    encoder.text.register_forward_hook(lambda net, given, answer: read.append(len(given[0])))
    first = scorer.score(images, batch_of(TEXTS))
    turned = scorer.score(images.flip(0), batch_of(TEXTS[::-1])).flip(0)
    assert read == [1, 1, 1, 1]  # alone, so that its bits do not depend on the other captions
    torch.testing.assert_close(turned, first, rtol=0, atol=1e-5)  # of scores near 1: a hundred roundings of fp32
    said = scorer.net.text_features(catalog().tokens[torch.tensor([catalog().row(text) for text in TEXTS])])
    torch.testing.assert_close(first, scorer.net(images, said), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch(kind: Kind):
    scorer, images = untrained(kind), renders()
    together = scorer.score(images, batch_of(TEXTS))
    alone = torch.cat([scorer.score(images[i : i + 1], batch_of(TEXTS[i : i + 1])) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_fp32_inside_autocast(kind: Kind):
    scorer, images = untrained(kind), renders()
    with torch.autocast("cpu", torch.bfloat16):
        inside = scorer.score(images, batch_of(TEXTS))
    assert torch.equal(inside, scorer.score(images, batch_of(TEXTS)))


@pytest.mark.parametrize("kind", KINDS)
def test_broken_image_is_named(kind: Kind):
    images = renders()
    images[2, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"not finite at samples \[2\]"):
        untrained(kind).score(images, batch_of(TEXTS))


def test_wrong_inputs_are_errors():
    scorer = untrained("shapes_clip")
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\], got \[4, 3, 64, 64\]"):
        scorer.score(torch.zeros(4, 3, 64, 64), batch_of(TEXTS))
    with pytest.raises(ValueError, match="4 images for 3 prompts"):
        scorer.score(renders(), batch_of(TEXTS[:3]))
    with pytest.raises(ValueError, match="unknown word 'dog'"):
        scorer.score(renders()[:1], batch_of(("a dog",)))


def test_clip_score_is_a_cosine():
    scorer = untrained("shapes_clip_heldout")
    assert isinstance(scorer, ShapesClip)
    features = scorer.image_features(renders())
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert scorer.score(renders(), batch_of(TEXTS)).abs().max() <= 1


def test_wrong_assets_are_errors(tmp_path: Path):
    with pytest.raises(ValueError, match="these tensors are not a shapes_pref"):
        load_scorer("shapes_pref", build_net("shapes_clip").state_dict())
    with pytest.raises(ValueError, match="cannot be read"):
        from_asset(tmp_path / "shapes_clip.safetensors")
    (tmp_path / "shapes_clip.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="make it again with gdmd pretrain scorers"):
        from_asset(tmp_path / "shapes_clip.safetensors")


def test_hard_negatives_share_task_and_split():
    table = catalog()
    near, count = hard_negatives("train")
    train = torch.nonzero((table.split == SPLITS.index("train")) | (table.split == ANY))[:, 0]
    assert (count[train] > 0).all()
    for row in train.tolist():
        for other in near[row, : count[row]].tolist():
            assert table.task[other] == table.task[row] and table.captions[other].key != table.captions[row].key
            assert table.split[other] in (ANY, SPLITS.index("train"))


def test_no_dev_or_eval_captions_in_training():
    batch = draw_scene_batch(256, torch.Generator().manual_seed(1))
    split = catalog().split[torch.cat([batch.rows, batch.near])]
    assert set(split.tolist()) <= {ANY, SPLITS.index("train")}


def test_may_be_true_of_drawn_scenes():
    generator = torch.Generator().manual_seed(2)
    rows = draw_rows(300, generator)
    scenes = draw_scenes(rows, generator)
    assert may_be_true(scenes, rows).diagonal().all()
    near = draw_negatives(rows, generator)
    placed = catalog().task[rows] == TASKS.index("position")  # "left of" and "above" may hold at once
    assert not may_be_true(scenes, near).diagonal()[~placed].any()


def test_may_be_true_is_lenient():
    table = catalog()
    scene = Scenes(
        *(torch.tensor([v]) for v in ([1, 0], [0, 5])),
        *(torch.tensor([v]) for v in ([0.2, 0.8], [0.5, 0.5], [0.1, 0.1])),
    )
    true = ("a square", "a red square", "a square and a circle", "a circle right of a square")
    false = ("a blue square", "two squares", "a square right of a circle", "a ring", "a square above a circle")
    rows = torch.tensor([table.row(text) for text in true + false])
    assert may_be_true(scene, rows)[0].tolist() == [True] * len(true) + [False] * len(false)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_grows_with_level(name: str):
    generator = torch.Generator().manual_seed(3)
    rows = torch.tensor([catalog().row("a red circle and a blue square")] * 6)
    scenes, others = draw_scenes(rows, generator), draw_scenes(rows, generator)
    kind = torch.full((6,), CORRUPTIONS.index(name))
    away = []
    for level in (0.0, 0.3, 1.0):
        corruption = Corruption(kind, torch.full((6,), level))
        images = corrupt(scenes, others, corruption, torch.Generator().manual_seed(0))
        away.append(float((images - render(scenes)).square().mean()))
    assert away[0] < 1e-6
    if name == "none":
        assert away[2] == 0
    else:
        assert away[0] < away[1] < away[2]


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_scorers_generalize(kind: Kind):
    from gdmd.shapes.pretrain.scorer_accuracy import measure

    scorer = from_asset(ASSETS / f"{kind}.safetensors")
    report = measure(scorer.net, per_task=40)
    assert report["train"]["image"]["mean"] > 0.93
    assert report["eval"]["image"]["mean"] > 0.93 and report["eval"]["caption"]["mean"] > 0.93


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_scorers_record_their_command(kind: Kind):
    from gdmd.runs.assets import load_asset

    path = ASSETS / f"{kind}.safetensors"
    facts = load_asset(path).metadata
    assert path.stat().st_size <= 1.5e6
    assert facts["command"].startswith(f"gdmd pretrain scorers --kind {kind}") and facts["accuracy"]["eval"]


def test_preference_falls_with_corruption():
    scorer = from_asset(ASSETS / "shapes_pref.safetensors")
    generator = torch.Generator().manual_seed(4)
    rows = draw_rows(64, generator)
    scenes, others = draw_scenes(rows, generator), draw_scenes(rows, generator)
    prompts = batch_of(tuple(catalog().captions[int(r)].text for r in rows))
    means = []
    for level in (0.0, 0.4, 0.8):
        blur = Corruption(torch.full((64,), CORRUPTIONS.index("blur")), torch.full((64,), level))
        means.append(float(scorer.score(corrupt(scenes, others, blur, generator), prompts).mean()))
    assert abs(means[0] - 1) < 0.3 and means[0] > means[1] + 0.1 > means[2] + 0.2
