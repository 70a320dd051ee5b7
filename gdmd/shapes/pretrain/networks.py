"""Train the shipped networks of the Shapes world: the VAE and the teacher, each a seeded, resumable job.

Data are rendered on the fly from (seed, step), so a resumed job continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import FlowSchedule, expand, renoise
from gdmd.io import content_hash
from gdmd.runs.assets import load_asset, save_asset
from gdmd.shapes.grammar import NULL, catalog, draw_rows
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.render import draw_scenes, render

KL_WEIGHT = 3e-4
"""Small: the latents should be smooth, not Gaussian (their scale is normalized afterwards)."""
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class PretrainJob:
    """One network to train: ``loss(step)`` draws its batch and returns a scalar with gradient.

    reads: hash of the frozen network that the loss uses, if there is one. restart: a step at which training starts again
    from the averaged weights, with a new optimizer and half the rate (after arXiv 1608.03983); 0 = never.
    """

    name: str
    module: nn.Module
    loss: Callable[[int], Tensor]
    finish: Callable[[], None]
    steps: int
    seed: int
    lr: float = 2e-3
    ema: float = 0.999
    warmup: int = 100
    bf16: bool = False
    reads: str | None = None
    restart: int = 0

    @property
    def command(self) -> str:
        """The command line that runs this job."""
        return f"gdmd pretrain {self.name} --steps {self.steps} --seed {self.seed}"


def learning_rate(step: int, job: PretrainJob) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak; once more after a restart."""
    peak, end = job.lr, min(job.restart or job.steps, job.steps)
    if step >= end:
        step, end, peak = step - end, job.steps - end, job.lr / 2
    ramp = min(1.0, (step + 1) / job.warmup)
    return peak * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / end))))


class _Fit:
    """The state of a running job: network, optimizer, EMA; saved as one safetensors file next to the asset."""

    def __init__(self, job: PretrainJob) -> None:
        self.job = job
        self.params = dict(job.module.named_parameters())
        self.shadow = {k: p.detach().clone() for k, p in self.params.items()}
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.params.values(), lr=self.job.lr, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, step: int) -> Tensor:
        if step and step == self.job.restart:
            self._average()
            self.optimizer = self._new_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.job)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.bf16):
            loss = self.job.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        if not bool(torch.isfinite(norm)):
            raise ValueError(f"{self.job.name}: gradient norm is {norm.item()} at step {step}; no update was made")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.job.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.shadow.values()), list(self.params.values()), 1 - decay)
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        found = {f"net.{k}": p.detach() for k, p in self.params.items()}
        found |= {f"ema.{k}": p for k, p in self.shadow.items()}
        for name, p in self.params.items():
            found |= {f"opt.{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"net.{name}"])
                self.shadow[name].copy_(tensors[f"ema.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {k: tensors[f"opt.{k}.{name}"].clone() for k in keys}

    @torch.no_grad()
    def _average(self) -> None:
        """Give the network its averaged weights."""
        for name, p in self.params.items():
            p.copy_(self.shadow[name])

    def finish(self) -> None:
        self._average()
        self.job.finish()


def fit(job: PretrainJob, target: Path, *, resume: bool = False, save_every: int = 500) -> Iterator[tuple[int, Tensor]]:
    """Run a job to its end and write the asset ``target``; yields (step, loss) after every step.

    Until the job is finished its state is in ``<target>.part``; ``resume`` continues from there.
    """
    torch.manual_seed(job.seed)
    part, start, state = target.with_suffix(".part"), 0, _Fit(job)
    if resume and part.exists():
        saved = load_asset(part)
        mine = {"job": job.name, "seed": job.seed, "steps": job.steps, "reads": job.reads}
        found = {key: saved.metadata.get(key) for key in mine}
        if found != mine:
            raise ValueError(f"{part} is the state of {found}, not of {mine}; delete it or use its settings")
        state.load(saved.tensors)
        start = int(saved.metadata["step"])
    began = time.monotonic()
    for step in range(start, job.steps):
        yield step, state.step(step)
        if (step + 1) % save_every == 0 and step + 1 < job.steps:
            facts = {"job": job.name, "steps": job.steps, "step": step + 1, "reads": job.reads}
            save_asset(part, state.tensors(), command=job.command, seed=job.seed, metadata=facts)
    state.finish()
    facts = {"steps": job.steps, "reads": job.reads, "seconds": round(time.monotonic() - began)}
    save_asset(target, job.module.state_dict(), command=job.command, seed=job.seed, metadata=facts)
    part.unlink(missing_ok=True)


def draw_batch(seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """New training images [B, 3, 32, 32] and their catalog rows [B], from (seed, step) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = draw_rows(count, generator)
    return render(draw_scenes(rows, generator)), rows


def vae_job(steps: int = 1300, seed: int = 1, batch: int = 128) -> PretrainJob:
    """KL-VAE: mean squared error + KL_WEIGHT x KL; at the end the latents are normalized per channel."""
    torch.manual_seed(seed)
    vae = ShapesVae()

    def loss(step: int) -> Tensor:
        images, _ = draw_batch(seed, step, batch)
        mean, log_var = vae.posterior(images)
        mean, log_var = mean.float(), log_var.float()
        noise = SampleRng(seed, step, torch.arange(batch)).normal("posterior", tuple(mean.shape[1:]))
        rebuilt = (vae.decoder(mean + noise * (0.5 * log_var).exp()).float() + 1) / 2
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        return F.mse_loss(rebuilt, images) + 0.1 * F.l1_loss(rebuilt, images) + KL_WEIGHT * kl

    def finish() -> None:
        with torch.no_grad():
            means = torch.cat([vae.posterior(draw_batch(seed + 1, i, 2 * batch)[0])[0] for i in range(8)])
            vae.shift.copy_(means.mean((0, 2, 3)))
            vae.scale.copy_(means.std((0, 2, 3)))

    return PretrainJob("vae", vae, loss, finish, steps, seed, bf16=True)


def teacher_job(vae: ShapesVae, steps: int = 12000, seed: int = 2, batch: int = 64) -> PretrainJob:
    """Flow matching (velocity MSE) with logit-normal t (arXiv 2403.03206) and CAPTION_DROPOUT for guidance."""
    torch.manual_seed(seed)
    dit, schedule, tokens = ShapesDit(), FlowSchedule(), catalog().tokens

    def loss(step: int) -> Tensor:
        images, rows = draw_batch(seed, step, batch)
        rng = SampleRng(seed, step, torch.arange(batch))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x0 = vae.encode(images).float()
        eps = rng.normal("eps", tuple(x0.shape[1:]))
        t = torch.sigmoid(rng.normal("t", (1,))[:, 0])
        keep = expand(rng.uniform("dropout") > CAPTION_DROPOUT, tokens[rows])
        words = torch.where(keep, tokens[rows], NULL)
        return F.mse_loss(dit(renoise(x0, t, eps, schedule), t, words), eps - x0)

    return PretrainJob("teacher", dit, loss, lambda: None, steps, seed, reads=state_hash(vae))


def state_hash(net: nn.Module) -> str:
    """SHA-256 of a network's names and weights."""
    state = net.state_dict()
    return content_hash(*(part for name in state for part in (name, state[name].cpu().numpy().tobytes())))
