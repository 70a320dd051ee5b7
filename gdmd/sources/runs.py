"""gdmd runs and the Shapes teacher as sources of images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gdmd.config.image_source import SourceConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.diffusion.generate import Sampler
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import Components
from gdmd.recipes.contents import base_content, checkpoint_content
from gdmd.recipes.long_prompts import warn_long_prompts
from gdmd.recipes.open_run import image_batch, open_named, student_row
from gdmd.recipes.run_folders import TEACHERS
from gdmd.runs.run_folder import config_hash
from gdmd.runs.trained_on import trained_on
from gdmd.shapes.grammar import tokenize
from gdmd.sources.base import ImageSlot, SourceInfo, device_name, to_images

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)


class RunSource:
    """The EMA student of a run, or the teacher, with its sampler and codec."""

    def __init__(self, info: SourceInfo, components: Components, sampler: Sampler) -> None:
        self.info, self.components, self.sampler = info, components, sampler
        self.device = next(iter(components.roles.parameters("student").values())).device

    @classmethod
    def open(cls, cfg: SourceConfig) -> RunSource:
        """Load the teacher, or checkpoint ``cfg.checkpoint`` of the run in ``cfg.where``."""
        recipe, components, sampler, step = open_named(cfg.where, cfg.checkpoint, cfg.base, cfg.device)
        teacher = cfg.where in TEACHERS
        if cfg.height or cfg.width:
            components = _at_size(cfg, recipe, components)
            sampler = student_row(recipe, components)
        if isinstance(recipe.model, DiffusersModel):
            from gdmd.models.loading import checker_off, local_or_hub_index

            if message := checker_off(local_or_hub_index(recipe.model), recipe.model.path):
                log.warning("%s", message)
        device = next(iter(components.roles.parameters("student").values())).device
        own = () if teacher else trained_on(recipe, Path(cfg.where))
        info = SourceInfo(
            name=cfg.name,
            kind="teacher" if teacher else "run",
            where=cfg.where,
            shapes=recipe.shapes_world,
            nfe=sampler.nfe,
            step=None if teacher else step,
            trained=tuple(dict.fromkeys((*own, *cfg.trained))),
            batch=cfg.batch or image_batch(recipe),
            device=device_name(device),
            identity={
                "kind": "run",
                "config": config_hash(recipe.model_dump(mode="json")),
                "sampler": sampler.name,
                "step": step,
                "base": base_content(recipe.model),
                "size": [cfg.height, cfg.width] if cfg.height or cfg.width else None,
                "weights": None if teacher else checkpoint_content(Path(cfg.where), step),
            },
        )
        return cls(info, components, sampler)

    def check(self, texts: Sequence[str]) -> None:
        for text in texts if self.info.shapes else ():
            tokenize(text)
        warn_long_prompts(self.components, texts)

    @torch.no_grad()
    def generate(self, slots: Sequence[ImageSlot], seed: int) -> list[Image]:
        rng = SampleRng(seed, 0, torch.tensor([slot.key for slot in slots], device=self.device))
        latents = self.sampler.latents([slot.text for slot in slots], rng)
        return to_images(self.components.codec.decode(latents).float(), self.info.name)


def _at_size(cfg: SourceConfig, recipe: RunConfig, components: Components) -> Components:
    """The components for another of the run's image sizes. ValueError for a size that it was not trained at."""
    model = recipe.model
    if not isinstance(model, DiffusersModel):
        raise ValueError(f"source {cfg.where!r}: the Shapes networks have one image size; leave height and width out")
    known = {(size.height, size.width): own for size, own in zip(components.sizes, components.at_sizes(), strict=False)}
    known = known or {(model.height, model.width): components}
    wanted = (cfg.height or model.height, cfg.width or model.width)
    if wanted not in known:
        sizes = ", ".join(f"height={height},width={width}" for height, width in known)
        raise ValueError(
            f"source {cfg.where!r}: height = {wanted[0]}, width = {wanted[1]}, but the run was trained at {sizes}; give "
            f"{'one of them' if len(known) > 1 else 'these'}, or leave both out"
        )
    return known[wanted]
