"""gdmd runs and the rows of the Shapes teacher as sources of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gdmd.config.rewards import CompositeReward, RemoteReward
from gdmd.config.run import RewardConfig, RunConfig
from gdmd.config.sources import SourceConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.evaluation.sample import Sampler
from gdmd.programs.evaluate import image_batch, open_named
from gdmd.programs.folders import TEACHERS
from gdmd.programs.sources import Facts, Place, to_images
from gdmd.recipes.build import Lab
from gdmd.runs.rundir import config_hash
from gdmd.shapes.grammar import tokenize

if TYPE_CHECKING:
    from PIL.Image import Image


class RunSource:
    """The EMA student of a run (or a row of the teacher) with its own sampler and codec."""

    def __init__(self, facts: Facts, lab: Lab, sampler: Sampler) -> None:
        self.facts, self.lab, self.sampler = facts, lab, sampler

    @classmethod
    def open(cls, cfg: SourceConfig) -> RunSource:
        """Checkpoint ``cfg.checkpoint`` of the run in ``cfg.where``."""
        recipe, lab, sampler, step = open_named(cfg.where, cfg.checkpoint, cfg.base)
        teacher = cfg.where in TEACHERS
        facts = Facts(
            name=cfg.name,
            kind="teacher" if teacher else "run",
            where=cfg.where,
            shapes=recipe.model.kind == "shapes",
            nfe=sampler.nfe,
            step=None if teacher else step,
            trained=() if teacher else trained_rewards(recipe),
            batch=cfg.batch or image_batch(recipe),
            identity={
                "kind": "run",
                "config": config_hash(recipe.model_dump(mode="json")),
                "sampler": sampler.name,
                "step": step,
            },
        )
        return cls(facts, lab, sampler)

    def check(self, texts: Sequence[str]) -> None:
        for text in texts if self.facts.shapes else ():
            tokenize(text)

    @torch.no_grad()
    def make(self, places: Sequence[Place], seed: int) -> list[Image]:
        device = next(iter(self.lab.roles.parameters("student").values())).device
        rng = SampleRng(seed, 0, torch.tensor([place.key for place in places], device=device))
        latents = self.sampler.latents([place.text for place in places], rng)
        return to_images(self.lab.codec.decode(latents).float(), self.facts.name)


def trained_rewards(cfg: RunConfig) -> tuple[str, ...]:
    """Labels of the rewards that a run is trained on, the parts of composites included."""
    return tuple(label for spec in cfg.rewards for label in labels_of(spec)) if cfg.method.rewarded else ()


def labels_of(spec: RewardConfig) -> tuple[str, ...]:
    """A reward's label; a composite's and those of its parts; of a remote one also its name on the server."""
    if isinstance(spec, CompositeReward):
        return (spec.label, *(label for part in spec.parts for label in labels_of(part.reward)))
    return (spec.label, spec.reward) if isinstance(spec, RemoteReward) else (spec.label,)
