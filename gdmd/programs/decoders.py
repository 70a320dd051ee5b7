"""What a run says of its scoring decoder: how its rewards differ from those through the model's own decoder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import ode_sample
from gdmd.evaluation.decoders import DecoderGap, decoder_gaps
from gdmd.io import RunError, content_hash, write_atomic
from gdmd.programs.contents import base_content
from gdmd.programs.scorers import scorer_identity
from gdmd.recipes.build import Lab
from gdmd.rewards.sources import weights_content

FILE = "scoring_decoder.json"


def check_decoder(cfg: RunConfig, lab: Lab, run: Path, console: Console) -> None:
    """Measure, print, and write RUN/scoring_decoder.json, where it does not hold these numbers already.

    Nothing for a run without a scoring decoder.
    """
    model, file = cfg.model, run / FILE
    if not isinstance(model, DiffusersModel) or lab.scoring is None or not model.scoring_check or not lab.rewards:
        return
    key = _key(cfg, model, lab.stream.at(0, 0, model.scoring_check).text)
    if file.exists() and _read(file).get("key") == key:
        return
    gaps = measured_gaps(cfg, lab, model.scoring_check)
    steps = cfg.eval.teacher_steps
    found = {
        "key": key,
        "decoder": model.scoring_decoder,
        "teacher_steps": steps,
        "rewards": [dataclasses.asdict(g) for g in gaps],
    }
    write_atomic(file, json.dumps(found, indent=2) + "\n", "what the scoring decoder costs")
    console.print(f"rewards through {model.scoring_decoder} instead of the model's decoder:", markup=False)
    for gap in gaps:
        console.print(f"  {gap.line()}", markup=False, highlight=False)


@torch.no_grad()
def measured_gaps(cfg: RunConfig, lab: Lab, images: int) -> tuple[DecoderGap, ...]:
    """On the teacher's guided samples for the first prompts of the run, at most a batch."""
    assert lab.scoring is not None
    prompts = lab.stream.at(0, 0, images)
    noise = SampleRng(cfg.eval.seed, 0, prompts.index).normal("eval_noise", lab.latent_shape)
    guided = Guided(lab.roles.teacher, cfg.method.guidance, prompts.uncond, lab.roles.guide)
    path = lab.teacher_times(cfg.eval.teacher_steps).to(noise.device)
    latents = ode_sample(guided, noise, path, prompts.cond, lab.roles.schedule)
    return decoder_gaps(lab.codec, lab.scoring, lab.rewards, latents, prompts)


def _key(cfg: RunConfig, model: DiffusersModel, texts: Sequence[str]) -> str:
    """What the numbers depend on: networks, decoder, rewards, prompts, and how the teacher draws."""
    assert model.scoring_decoder is not None
    given = (model.dtype, model.height, model.width, cfg.eval.seed, cfg.eval.teacher_steps, cfg.method.guidance)
    weights = weights_content(model.scoring_decoder, model.scoring_decoder_revision)
    identities = [scorer_identity(spec) for spec in cfg.rewards]
    return content_hash(json.dumps([given, texts]), base_content(model), weights, *identities)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete it: a resumed run measures again") from error


def read_gaps(run: Path) -> dict[str, Any] | None:
    """What ``check_decoder`` wrote; None for a run without it. RunError for a damaged file."""
    file = run / FILE
    if not file.is_file():
        return None
    found = _read(file)
    try:
        lines = [DecoderGap(**gap).line() for gap in found["rewards"]]
        return {"decoder": str(found["decoder"]), "lines": lines}
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete it: a resumed run measures again") from error
