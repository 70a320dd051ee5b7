"""How large a baseline's reward or GAN gradient is next to L_DMD's, and how far DMDR's tilt spreads, on Shapes.

    python benchmarks/reward_gradients.py                  # every setting, some minutes on one core
    python benchmarks/reward_gradients.py --only refl

The first student updates, starting from the teacher: batch 64, student 3e-4, fake score 1e-3. Printed per update, over
the student's weights: |g - g_DMD| / |g_DMD| of the mean losses, or std / mean of the tilt's weights. A weight that is
right for one DMD loss is not right for another: with DMD2's normalizer, L_DMD's gradient is about three times as long
on Shapes.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.methods.dmdr import TiltedBatch
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.types import Role, Roles, Update

NORMALIZED, PLAIN = "method.normalize=true", "method.normalize=false"
SETTINGS = {
    "refl 1.2, normalized": ("dmd_refl", "method.rl_weight=1.2", NORMALIZED),
    "refl 1.2": ("dmd_refl", "method.rl_weight=1.2", PLAIN),
    "dmd2 .01, normalized": ("dmd2", "method.gan_weight=0.01", NORMALIZED),
    "dmd2 .01": ("dmd2", "method.gan_weight=0.01", PLAIN),
    "nft .15, normalized": ("dmd_nft", "method.rl_weight=0.15", NORMALIZED),
    "nft .15": ("dmd_nft", "method.rl_weight=0.15", PLAIN),
    "grpo 10, normalized": ("dmd_grpo", "method.rl_weight=10", NORMALIZED),
    "grpo 10": ("dmd_grpo", "method.rl_weight=10", PLAIN),
    "tilt by std": ("dmdr", "method.anneal=0", "method.tilt_unit=std"),
    "tilt by norm": ("dmdr", "method.anneal=0", "method.tilt_unit=norm"),
}
RATES: dict[Role, float] = {"student": 3e-4, "fake": 1e-3}


def gradient(loss: Tensor, weights: list[Parameter]) -> Tensor:
    """The gradient of the mean loss, with all weights in one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), weights)])


def size(update: Update, roles: Roles) -> float:
    """The ratio of the two gradients, or the spread of the tilt."""
    batch, weights = update.batch, list(roles.parameters("student").values())
    if isinstance(batch, TiltedBatch):
        return float(batch.weight.std() / batch.weight.mean())
    plain = gradient(dmd_loss(roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar), weights)
    return float((gradient(update.loss(batch).per_sample, weights) - plain).norm() / plain.norm())


def sizes(recipe: str, overrides: tuple[str, ...], steps: int) -> list[float]:
    """One number per student update."""
    cfg = read_recipe(recipe, ["loop.batch_size=64", "validation.every=0", "method.fake_updates=2", *overrides])
    lab, found = build(cfg, device="cpu"), []
    weights = {role: list(lab.roles.parameters(role).values()) for role in RATES}
    optimizers = {role: torch.optim.AdamW(own, RATES[role], weight_decay=0) for role, own in weights.items()}
    for step in range(steps):
        prompts = lab.stream.at(step)
        for update in lab.method.iteration(step, prompts, SampleRng(1, step, prompts.index, prompts.host)):
            if update.role == "student":
                found.append(size(update, lab.roles))
            optimizers[update.role].zero_grad()
            update.loss(update.batch).per_sample.mean().backward()
            optimizers[update.role].step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings that start with this")
    parser.add_argument("--steps", type=int, default=6, help="student updates")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, (recipe, *overrides) in SETTINGS.items():
        if name.startswith(given.only):
            numbers = " ".join(f"{value:.3f}" for value in sizes(recipe, tuple(overrides), given.steps))
            print(f"{name:22s} {numbers}", flush=True)


if __name__ == "__main__":
    main()
