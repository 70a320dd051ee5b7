"""Fine-tuning by the plain denoising loss on the Shapes miniatures: a control for turbo models, and style LoRAs.

    python benchmarks/denoising.py train shapes_flux2_klein model.student=TURBO loop.steps=100 --run RUN
    python benchmarks/denoising.py train shapes_flux2_klein loop.steps=200 --monochrome --run STYLE
    python benchmarks/denoising.py style RUN

``train`` fits the student's adapters to renders of the training captions, with the recipe's batches, optimizer, EMA and
schedule; the run folder is an ordinary one (gdmd eval run, gdmd export). Without model.student the student is the base
model, and with --monochrome the renders have no colors: what ``gdmd export`` writes is then a style LoRA. ``style`` says
how many images of a run's student and of its teacher are monochrome, and how many show what a caption without
colors asks for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdmd.diffusion.generate import Sampler, images_of
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import expand, renoise
from gdmd.losses.denoising import denoising_loss
from gdmd.methods.base import FakeBatch
from gdmd.recipes.build import Components, build
from gdmd.recipes.open_run import image_batch, open_named, teacher_row
from gdmd.recipes.read import read_recipe
from gdmd.runs.run_folder import create
from gdmd.shapes.check import shapeseval
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.latents import RenderedLatents
from gdmd.training.loop import train
from gdmd.types import Codec, Loss, PromptBatch, Update

CAPTION_DROPOUT = 0.1
"""Share of empty captions for a style LoRA, whose base model is sampled with guidance (arXiv 2207.12598)."""
CHROMA, COLORED = 0.25, 0.02
"""A monochrome image has less than this share of pixels whose channels differ by more than CHROMA."""
COLORLESS = ("single_object", "two_object", "counting", "position")
"""Tasks whose captions name no color."""


@dataclass(frozen=True)
class MonochromeCodec:
    """A codec that encodes images without their colors: every channel is the brightest one."""

    codec: Codec

    def encode(self, images: Tensor) -> Tensor:
        return self.codec.encode(images.amax(1, keepdim=True).expand_as(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)


@dataclass(frozen=True)
class Denoising:
    """One update of the student per iteration: || network(x_t, t, c) - target ||^2 on encoded renders of the captions."""

    components: Components
    monochrome: bool = False

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """Logit-normal times for flows (arXiv 2403.03206), uniform ones for VP."""
        roles, codec = self.components.roles, self.components.codec
        x0 = RenderedLatents(MonochromeCodec(codec) if self.monochrome else codec)(prompts, rng)
        eps = rng.normal("denoising_eps", self.components.latent_shape)
        flow = self.components.method.native == "velocity"  # type: ignore[attr-defined]
        t = torch.sigmoid(rng.normal("denoising_t", (1,))[:, 0]) if flow else rng.uniform("denoising_t")
        cond = prompts.cond
        if self.monochrome:
            kept = rng.uniform("dropout") > CAPTION_DROPOUT
            cond = {k: torch.where(expand(kept, v), v, prompts.uncond[k]) for k, v in cond.items()}
        yield Update("student", self.loss, FakeBatch(x0, renoise(x0, t, eps, roles.schedule), t, eps, cond))

    def loss(self, batch: FakeBatch) -> Loss:
        prediction = self.components.roles.student(batch.x_t, batch.t, batch.cond)
        native = self.components.method.native  # type: ignore[attr-defined]
        loss = denoising_loss(prediction, batch.x0, batch.eps, native)
        return Loss(loss, {"loss/student": loss.detach()})

    def stats(self) -> Mapping[str, Tensor]:
        return {}

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        del state


def fine_tune(recipe: str, overrides: Sequence[str], folder: Path, *, monochrome: bool = False) -> None:
    """Train the student of a recipe by the denoising loss; ``folder`` becomes a run."""
    cfg = read_recipe(recipe, overrides)
    components = build(cfg, "cpu")
    run = create(folder, cfg.model_dump(mode="json"))
    train(Denoising(components, monochrome), components.roles, components.stream, cfg.loop, run)


def is_monochrome(images: Tensor) -> Tensor:
    """Whether each image is monochrome. [N, 3, H, W] -> [N] bool"""
    chroma = images.amax(1) - images.amin(1)
    return (chroma > CHROMA).flatten(1).float().mean(1) < COLORED


def style(folder: Path) -> dict[str, dict[str, float]]:
    """For teacher and student: the share of monochrome images, and ShapesEval of the COLORLESS tasks."""
    cfg, components, student, _ = open_named(str(folder))
    rows = fixed_rows("eval", cfg.eval.per_task)
    rows = rows[torch.isin(catalog().task[rows], torch.tensor([TASKS.index(name) for name in COLORLESS]))]

    def measured(sampler: Sampler) -> dict[str, float]:
        images = images_of(sampler, components, catalog().texts(rows), cfg.eval.seed, image_batch(cfg))
        correct = shapeseval(images, rows).float().mean()
        return {"monochrome": float(is_monochrome(images).float().mean()), "shapeseval": float(correct)}

    return {"teacher": measured(teacher_row(cfg, components, "teacher")), "student": measured(student)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("recipe")
    training.add_argument("overrides", nargs="*")
    training.add_argument("--run", type=Path, required=True)
    training.add_argument("--monochrome", action="store_true")
    commands.add_parser("style").add_argument("run", type=Path)
    given = parser.parse_args(words)
    if given.command == "train":
        fine_tune(given.recipe, given.overrides, given.run, monochrome=given.monochrome)
    else:
        print(json.dumps(style(given.run), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
