"""The jobs of ``gdmd pretrain pipeline``: a KL-VAE that all families share, then the denoiser of one family.

A denoiser is trained by its family adapter's own call, with the loss of its native prediction, so that what is trained is
what ``gdmd train`` distills.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdmd.config.model import DiffusersModel
from gdmd.config.shapes_pipeline import MARKER
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import expand, renoise
from gdmd.io import follow_umask, writing
from gdmd.losses.denoising import Target, denoising_loss
from gdmd.models.families.base import Family
from gdmd.shapes.grammar import catalog
from gdmd.shapes.pretrain.miniatures import MINIATURES, SIZE, build_miniature
from gdmd.shapes.pretrain.networks import CAPTION_DROPOUT, KL_WEIGHT, PretrainJob, draw_batch, state_hash
from gdmd.types import Cond

EMBEDDED = 512
"""Captions per call of the text encoders."""


def kl_vae_job(steps: int = 2000, seed: int = 1, batch: int = 64) -> PretrainJob:
    """The AutoencoderKL of all families, trained like the Shapes VAE: mean squared error + KL_WEIGHT x KL.

    At the end the encoder's last layer and the decoder's first are rescaled, so that each channel of the latents has a
    standard deviation of 1.
    """
    vae = build_miniature("sdxl", seed).vae

    def loss(step: int) -> Tensor:
        images, _ = draw_batch(seed, step, batch)
        mean, log_var = vae.encoder(2 * images - 1).float().chunk(2, 1)
        log_var = log_var.clamp(-12, 4)
        noise = SampleRng(seed, step, torch.arange(batch)).normal("posterior", tuple(mean.shape[1:]))
        rebuilt = (vae.decoder(mean + noise * (0.5 * log_var).exp()).float() + 1) / 2
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        total: Tensor = F.mse_loss(rebuilt, images) + 0.1 * F.l1_loss(rebuilt, images) + KL_WEIGHT * kl
        return total

    def finish() -> None:
        with torch.no_grad():
            std = _latents(vae, seed + 1).std((0, 2, 3))
            last, first = vae.encoder.conv_out, vae.decoder.conv_in
            means, log_vars = last.weight.chunk(2)[0], last.bias.chunk(2)[1]
            means /= std[:, None, None, None]
            last.bias.chunk(2)[0].div_(std)
            log_vars -= 2 * std.log()
            first.weight *= std[:, None, None]

    return PretrainJob("kl_vae", vae, loss, finish, steps, seed, bf16=True)


@torch.no_grad()
def _latents(vae: Any, seed: int) -> Tensor:
    """Latents of new images, [2048, C, h, w]."""
    parts: list[Tensor] = [vae.encode(2 * draw_batch(seed, i, 256)[0] - 1).latent_dist.mean for i in range(8)]
    return torch.cat(parts)


def denoiser_job(pipe: Any, steps: int, seed: int, batch: int = 64) -> PretrainJob:
    """The native denoising loss of the pipeline's family, with CAPTION_DROPOUT for guidance.

    Flow families draw logit-normal times (arXiv 2403.03206), VP families uniform training steps (arXiv 2006.11239).
    """
    family = family_of(pipe)
    one = MINIATURES[family.name]
    embeddings, null = _embedded(family)
    net, target = family.net.requires_grad_(True), _target(family)

    def loss(step: int) -> Tensor:
        images, rows = draw_batch(seed, step, batch)
        rng = SampleRng(seed, step, torch.arange(batch))
        x0 = family.codec.encode(images)
        eps = rng.normal("eps", tuple(x0.shape[1:]))
        t = _times(family, rng)
        kept = rng.uniform("dropout") > CAPTION_DROPOUT
        cond = {k: torch.where(expand(kept, v[rows]), v[rows], null[k]) for k, v in embeddings.items()}
        prediction = family.predict(net, renoise(x0, t, eps, family.schedule), t, cond)
        return denoising_loss(prediction, x0, eps, target).mean()

    name, reads = f"pipeline {family.name}", state_hash(pipe.vae)
    return PretrainJob(name, net, loss, lambda: None, steps, seed, lr=one.lr, reads=reads, restart=one.restart)


def set_vae(pipe: Any, tensors: Mapping[str, Tensor], seed: int) -> None:
    """Give a miniature the trained VAE. FLUX.2's also gets the statistics of its batch norm, from new images."""
    pipe.vae.load_state_dict(tensors, strict=not hasattr(pipe.vae, "bn"))
    pipe.vae.eval()
    if hasattr(pipe.vae, "bn"):
        patches = F.pixel_unshuffle(_latents(pipe.vae, seed), 2)
        pipe.vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
        pipe.vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def save_miniature(pipe: Any, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the pipeline in fp16 with its marker file. ``folder`` appears when it is complete; an older one is replaced."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing("the pipeline", folder, option="--out"), tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        whole = Path(parent) / folder.name
        pipe.save_pretrained(whole)
        follow_umask(*whole.rglob("*.safetensors"))
        (whole / MARKER).write_text(json.dumps(dict(facts), indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)


def family_of(pipe: Any) -> Family:
    """The adapter of a miniature, in fp32."""
    from gdmd.models.loading import FAMILIES

    kind = next(kind for kind in FAMILIES if kind.pipeline == type(pipe).__name__)
    one = MINIATURES[kind.name]
    cfg = DiffusersModel(
        path=one.family, dtype="fp32", height=SIZE, width=SIZE, max_tokens=one.max_tokens, decode_chunk=EMBEDDED
    )
    return kind(pipe, cfg)


def _target(family: Family) -> Target:
    native = family.native
    assert native != "v"  # no miniature predicts it
    return native


def _times(family: Family, rng: SampleRng) -> Tensor:
    if family.native == "velocity":
        return torch.sigmoid(rng.normal("t", (1,))[:, 0])
    return (rng.uniform("t") * 1000).long().clamp(max=999) / 999


def _embedded(family: Family) -> tuple[Cond, Cond]:
    """The embeddings of all captions of the catalog, by row, and of the empty one [1, ...]."""
    texts = [caption.text for caption in catalog().captions]
    parts = [family.encoder.encode(texts[first : first + EMBEDDED]) for first in range(0, len(texts), EMBEDDED)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, family.encoder.null(1)
