"""The scoring decoder of a run: how far its rewards differ from those through the model's own decoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import ode_sample
from gdmd.io import RunError, content_hash, write_atomic
from gdmd.methods.scorer import Scorer
from gdmd.recipes.build import Components
from gdmd.recipes.build_rewards import without_stats
from gdmd.recipes.contents import base_content
from gdmd.recipes.objects import NOTHING_GIVEN, GivenObjects
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.rewards.weights import weights_content
from gdmd.types import Codec, PromptBatch, Reward

FILE = "scoring_decoder.json"


def check_decoder(
    cfg: RunConfig, components: Components, run: Path, console: Console, given: GivenObjects = NOTHING_GIVEN
) -> None:
    """Measure, print and write RUN/scoring_decoder.json, unless it is up to date.

    Does nothing for a run without a scoring decoder.
    """
    model, file = cfg.model, run / FILE
    if (
        not isinstance(model, DiffusersModel)
        or components.scoring is None
        or not model.scoring_check
        or not components.rewards
    ):
        return
    key = _key(cfg, model, components.stream.at(0, 0, model.scoring_check).text, given)
    if file.exists() and _read(file).get("key") == key:
        return
    gaps = measured_gaps(cfg, components, model.scoring_check)
    steps = cfg.eval.teacher_steps
    found = {
        "key": key,
        "decoder": model.scoring_decoder,
        "teacher_steps": steps,
        "rewards": [dataclasses.asdict(g) for g in gaps],
    }
    write_atomic(file, json.dumps(found, indent=2) + "\n", "the check of the scoring decoder")
    console.print(f"rewards through {model.scoring_decoder} instead of the model's decoder:", markup=False)
    for gap in gaps:
        console.print(f"  {gap.line()}", markup=False, highlight=False)


@torch.no_grad()
def measured_gaps(cfg: RunConfig, components: Components, images: int) -> tuple[DecoderGap, ...]:
    """The gaps on the teacher's guided samples for the run's first prompts, at most one batch."""
    assert components.scoring is not None
    prompts = components.stream.at(0, 0, images)
    noise = SampleRng(cfg.eval.seed, 0, prompts.index).normal("eval_noise", components.latent_shape)
    guided = Guided(components.roles.teacher, cfg.method.guidance, prompts.uncond, components.roles.guide)
    path = components.teacher_times(cfg.eval.teacher_steps).to(noise.device)
    latents = ode_sample(guided, noise, path, prompts.cond, components.roles.schedule)
    with without_stats(components.rewards):
        return decoder_gaps(components.codec, components.scoring, components.rewards, latents, prompts)


def _key(cfg: RunConfig, model: DiffusersModel, texts: Sequence[str], given: GivenObjects) -> str:
    """A hash of everything the numbers depend on: networks, decoder, rewards, prompts, sampling."""
    assert model.scoring_decoder is not None
    settings = (model.dtype, model.height, model.width, cfg.eval.seed, cfg.eval.teacher_steps, cfg.method.guidance)
    base = base_content(model) if given.pipeline is None else given.pipeline_content
    weights = weights_content(model.scoring_decoder, model.scoring_decoder_revision)
    identities = [scorer_identity(spec) for spec in cfg.rewards]
    return content_hash(json.dumps([settings, texts]), base, weights, *identities)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete it: a resumed run measures again") from error


def read_gaps(run: Path) -> dict[str, Any] | None:
    """What ``check_decoder`` wrote; None if the run has no such file. RunError for a damaged file."""
    file = run / FILE
    if not file.is_file():
        return None
    found = _read(file)
    try:
        lines = [DecoderGap(**gap).line() for gap in found["rewards"]]
        return {"decoder": str(found["decoder"]), "lines": lines}
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete it: a resumed run measures again") from error


@dataclass(frozen=True)
class DecoderGap:
    """One reward, in its own units, over the images that were scored through both decoders.

    difference: mean of rough - full; error: standard deviation of rough - full; spread: that of the full scores;
    agreement: share of image pairs, unequal with the full decoder, that the rough one orders the same way. A value is None
    if too few images were scored.
    """

    reward: str
    images: int
    full: float | None
    rough: float | None
    difference: float | None
    error: float | None
    spread: float | None
    agreement: float | None

    def line(self) -> str:
        """A line for the terminal and the report."""
        if self.difference is None:
            return f"{self.reward}: no image was scored through both decoders"
        text = f"{self.reward}: {self.difference:+.4g} on {self.images} images (full decoder {self.full:.4g}"
        if self.error is None or self.agreement is None:
            return f"{text})"
        return f"{text}, spread {self.spread:.3g}; error {self.error:.3g}; {self.agreement:.0%} of pairs in the same order)"


def decoder_gaps(
    full: Codec, rough: Codec, rewards: Sequence[Reward], latents: Tensor, prompts: PromptBatch
) -> tuple[DecoderGap, ...]:
    """The gap of every reward on ``latents`` [B, C, H, W]."""
    through = [Scorer(codec, rewards)(latents, prompts).double().cpu() for codec in (full, rough)]
    return tuple(_gap(reward.name, *pair) for reward, *pair in zip(rewards, *through, strict=True))


def _gap(name: str, full: Tensor, rough: Tensor) -> DecoderGap:
    """full, rough: [B]"""
    scored = ~(full.isnan() | rough.isnan())
    full, rough = full[scored], rough[scored]
    count, difference = len(full), rough - full
    if count == 0:
        return DecoderGap(name, 0, None, None, None, None, None, None)
    means = [float(values.mean()) for values in (full, rough, difference)]
    if count == 1:
        return DecoderGap(name, 1, *means, None, None, None)
    first, second = torch.triu_indices(count, count, 1)
    order, found = (full[first] - full[second]).sign(), (rough[first] - rough[second]).sign()
    unequal = order != 0
    agreement = float((order == found)[unequal].double().mean()) if unequal.any() else None
    return DecoderGap(name, count, *means, float(difference.std()), float(full.std()), agreement)
