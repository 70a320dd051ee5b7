"""gdmd runs and the rows of the Shapes teacher as sources of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeReward, RemoteReward
from gdmd.config.run import RewardConfig, RunConfig, ShapesModel
from gdmd.config.sources import SourceConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.evaluation.sample import Sampler
from gdmd.io import content_hash, file_hash
from gdmd.programs.evaluate import image_batch, open_named
from gdmd.programs.folders import TEACHERS
from gdmd.programs.sources import Facts, Place, device_name, to_images
from gdmd.recipes.build import Lab
from gdmd.rewards.sources import weights_content
from gdmd.runs.assets import asset_path
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
        recipe, lab, sampler, step = open_named(cfg.where, cfg.checkpoint)
        teacher = cfg.where in TEACHERS
        device = next(iter(lab.roles.parameters("student").values())).device
        facts = Facts(
            name=cfg.name,
            kind="teacher" if teacher else "run",
            where=cfg.where,
            shapes=recipe.model.kind == "shapes",
            nfe=sampler.nfe,
            step=None if teacher else step,
            trained=() if teacher else trained_rewards(recipe),
            batch=cfg.batch or image_batch(recipe),
            device=device_name(device),
            identity={
                "kind": "run",
                "config": config_hash(recipe.model_dump(mode="json")),
                "sampler": sampler.name,
                "step": step,
                "base": base_content(recipe.model),
                "weights": None if teacher else checkpoint_content(Path(cfg.where), step),
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


def base_content(model: DiffusersModel | ShapesModel) -> str:
    """A hash of the frozen weights below a student, or the hub's commit."""
    if isinstance(model, ShapesModel):
        given = {"shapes_teacher": model.teacher, "shapes_vae": model.vae}
        return content_hash(*(file_hash(Path(path or asset_path(name))) for name, path in given.items()))
    return weights_content(model.path, model.revision, model.variant)


def checkpoint_content(run: Path, step: int) -> str:
    """A hash of a checkpoint: its state.json holds those of all its files."""
    return file_hash(run / "checkpoints" / f"step_{step:06d}" / "state.json")


def trained_rewards(cfg: RunConfig) -> tuple[str, ...]:
    """Labels of the rewards that a run is trained on, the parts of composites included."""
    return tuple(label for spec in cfg.rewards for label in labels_of(spec)) if cfg.method.rewarded else ()


def labels_of(spec: RewardConfig) -> tuple[str, ...]:
    """A reward's label; a composite's and those of its parts; of a remote one also its name on the server."""
    if isinstance(spec, CompositeReward):
        return (spec.label, *(label for part in spec.parts for label in labels_of(part.reward)))
    return (spec.label, spec.reward) if isinstance(spec, RemoteReward) else (spec.label,)
