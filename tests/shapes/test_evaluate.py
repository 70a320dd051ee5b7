"""The evaluation on the Shapes world measures the samplers' images and reports its uncertainty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gdmd.config.run import EvalConfig
from gdmd.diffusion.generate import Sampler
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import times
from gdmd.shapes.evaluate import bootstrap_interval, evaluate, mean_score
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.networks import ShapesDit
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.rewards import ShapesClip
from gdmd.shapes.roles import ShapesRoles, ShapesTextEncoder
from gdmd.shapes.scorer_networks import build_net
from gdmd.types import PromptBatch

CFG = EvalConfig(per_task=6, images=2, seed=5)
HELDOUT = ShapesClip("shapes_clip_heldout", build_net("shapes_clip_heldout"))


class NoCodec:
    """Latents are the images themselves."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, images: Tensor) -> Tensor:
        return images


@dataclass(frozen=True)
class PixelComponents:
    roles: ShapesRoles
    codec: NoCodec
    encoder: ShapesTextEncoder
    latent_shape: tuple[int, int, int] = (3, 32, 32)
    teacher_times: Callable[[int], Tensor] = times


class HalfScored:
    """1 on every second image, NaN on the others."""

    name, differentiable = "half", False

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        assert len(images) == len(prompts)
        return torch.where(torch.arange(len(images)) % 2 == 0, 1.0, torch.nan)


def pixel_components() -> PixelComponents:
    return PixelComponents(ShapesRoles(ShapesDit(width=16, depth=1, heads=2)), NoCodec(), ShapesTextEncoder())


def truth(texts: tuple[str, ...], rng: SampleRng) -> Tensor:
    """True renders of the captions."""
    rows = torch.tensor([catalog().row(text) for text in texts])
    return render(draw_scenes(rows, torch.Generator().manual_seed(int(rng.index[0]))))


def gray(texts: tuple[str, ...], rng: SampleRng) -> Tensor:
    return torch.full((len(texts), 3, 32, 32), 0.1)


def test_truth_beats_gray() -> None:
    best = evaluate(Sampler("truth", 1, truth), pixel_components(), CFG, [HELDOUT])
    worst = evaluate(Sampler("gray", 1, gray), pixel_components(), CFG, [HELDOUT])
    assert best.shapeseval["overall"] > 0.97 and best.fidelity > 0.98 and best.interval[1] > 0.99
    assert worst.shapeseval["overall"] == 0 and worst.fidelity == 0 and worst.interval == (0, 0)
    assert best.coverage > worst.coverage and best.diversity > 10 * abs(worst.diversity)
    assert best.frechet < worst.frechet


def test_json_has_the_public_fields() -> None:
    made = evaluate(Sampler("truth", 4, truth), pixel_components(), CFG, [HELDOUT, HalfScored()])
    public = made.json()
    assert set(public) == {
        "shapeseval", "rewards", "fidelity", "coverage", "diversity", "frechet", "nfe",
        "images_per_s", "images_per_s_decoded", "interval", "images",
    }  # fmt: skip
    assert list(public["shapeseval"]) == ["overall", *TASKS]
    assert public["rewards"].keys() == {"shapes_clip_heldout", "half"}
    assert public["images"] == 6 * 6 * 2 == len(made.images) == len(made.texts) == len(made.correct)
    assert public["nfe"] == 4
    json.dumps(public, allow_nan=False)


def test_fixed_prompts_of_the_split() -> None:
    asked: list[str] = []

    def note(texts: tuple[str, ...], rng: SampleRng) -> Tensor:
        asked.extend(texts)
        return gray(texts, rng)

    for split in ("eval", "dev"):
        asked.clear()
        evaluate(Sampler("note", 1, note), pixel_components(), CFG, [HELDOUT], split)
        wanted = [catalog().captions[row].text for row in fixed_rows(split, 6).tolist() for _ in range(2)]
        assert asked[-72:] == wanted


def test_unscored_images_do_not_count() -> None:
    images, texts = torch.zeros(600, 3, 4, 4), ["a ring"] * 600
    assert mean_score(HalfScored(), images, texts, ShapesTextEncoder()) == 1


def test_diversity_needs_pairs() -> None:
    made = evaluate(Sampler("truth", 1, truth), pixel_components(), EvalConfig(per_task=5, images=1), [HELDOUT])
    assert math.isnan(made.diversity) and made.json()["diversity"] is None


def test_missing_scorer_and_broken_images_are_errors() -> None:
    with pytest.raises(ValueError, match="shapes_clip_heldout"):
        evaluate(Sampler("gray", 1, gray), pixel_components(), CFG, [HalfScored()])
    broken = Sampler("sick", 1, lambda texts, rng: gray(texts, rng) * torch.nan)
    with pytest.raises(ValueError, match="72 of 72 images of 'sick' are not finite"):
        evaluate(broken, pixel_components(), CFG, [HELDOUT])


def test_interval_resamples_captions() -> None:
    """Images of one caption that agree are one observation: 20 observations, not 2,000."""
    votes = torch.rand(20) < 0.5
    texts = [f"caption {k}" for k in range(20) for _ in range(100)]
    low, high = bootstrap_interval(votes.repeat_interleave(100), torch.zeros(2000, dtype=torch.int64), texts)
    p = float(votes.float().mean())
    wanted = 2 * 1.96 * math.sqrt(p * (1 - p) / 20)
    assert high - low == pytest.approx(wanted, rel=0.2)
    assert low < p < high


def test_interval_weights_tasks_equally() -> None:
    """A task that always succeeds and one that never does: 1/2, whatever their sizes."""
    task = torch.tensor([0] * 90 + [1] * 10)
    texts = [f"{int(t)}/{i // 2}" for i, t in enumerate(task)]
    assert bootstrap_interval(task == 0, task, texts) == (0.5, 0.5)
