"""The networks of a recipe without their weights, and what a call of each costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.diffusion.gradients import frozen
from gdmd.models.vae import VaeCodec
from gdmd.plan.fake_tensors import Measured, fake_mode, hollow, measure
from gdmd.recipes.build import head_seed
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.roles import LATENT_SHAPE, ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.types import Cond, Role


@dataclass(frozen=True)
class Networks:
    """Roles and decoders that can be called inside ``fake_mode``; ``weights``: numbers and bytes by what."""

    roles: Any
    trunk: nn.Module
    own: tuple[nn.Module, ...]  # all modules that hold weights
    codec: Any
    scoring: Any
    latent_shape: tuple[int, int, int]
    text: Callable[[int], Cond]
    narrow: int  # bytes of a number in the computing precision
    encoders: int
    source: str

    def held(self) -> list[Tensor]:
        """Every weight and buffer."""
        return [t for net in self.own for t in (*net.parameters(), *net.buffers())]


def networks_of(cfg: RunConfig) -> Networks:
    """Made from configs. Nothing is loaded."""
    if isinstance(cfg.model, DiffusersModel):
        return _diffusers(cfg, cfg.model)
    bf16 = cfg.loop.precision == "bf16"
    roles = ShapesRoles(ShapesDit(), bf16=bf16, head_seed=head_seed(cfg))
    codec = ShapesCodec(ShapesVae())
    nets = [roles.teacher.net, roles.student.net, roles.fake.net, codec.vae]
    nets += heads_of(roles)
    text = ShapesTextEncoder().null
    source = "the networks of the Shapes lab"
    return Networks(roles, roles.teacher.net, tuple(nets), codec, codec, LATENT_SHAPE, text, 4, 0, source)


def heads_of(roles: Any) -> list[nn.Module]:
    """The GAN head, where there is one."""
    return [] if roles.critic is None else [roles.critic.head]


def _diffusers(cfg: RunConfig, model: DiffusersModel) -> Networks:
    from gdmd.models.distilled import check_guidance
    from gdmd.models.loading import check_tiny, require_tiny
    from gdmd.models.roles import DiffusersRoles
    from gdmd.plan.meta_pipeline import meta_decoder, meta_family

    opened = meta_family(model)
    family = opened.family
    check_guidance(family, (cfg.method.guidance,))
    roles = DiffusersRoles(family, half=cfg.loop.precision == "bf16", head_seed=head_seed(cfg))
    vae: Any = family.pipe.vae
    nets = [*roles.modules(), *heads_of(roles), vae]
    scoring: Any = family.codec
    if model.scoring_decoder is not None:
        require_tiny(family)
        tiny = meta_decoder(model, family.latent_channels)
        if Path(model.scoring_decoder).is_dir():  # a hub id stands for the published one
            check_tiny(family, tiny)
        scoring = VaeCodec(tiny, model.decode_chunk)
        nets.append(tiny)
    blank = family.blank_text
    size = 2 if model.dtype == "bf16" else 4
    return Networks(
        *(roles, family.net, tuple(nets), family.codec, scoring, family.latent_shape),
        *(blank, size, opened.encoders, opened.source),
    )


@dataclass(frozen=True)
class Costs:
    """FLOP per sample and bytes of calls. call: bytes (fixed, per row) without gradient.

    graded: forward and backward of one micro-batch of an update, a GAN head's calls with it; with_checkpointing and
    without: its bytes in the heavier role, of which one is the recipe's own. reading: F of a call for features.
    """

    forward: Mapping[str, float]
    call: tuple[float, float]
    graded: Mapping[Role, Measured]
    micro: int
    with_checkpointing: int | None
    without: int
    decode: Measured
    chunk: int
    steered: Measured | None  # decoding one micro-batch with gradient
    reading: float = 1.0


def costs_of(cfg: RunConfig, nets: Networks, rows: int, *, steered: bool) -> Costs:
    """Call every network once with each kind of gradient, without computing."""
    micro = cfg.loop.micro_batch or cfg.loop.batch_size
    own = cfg.model if isinstance(cfg.model, DiffusersModel) else None
    chunk = own.decode_chunk if own else cfg.loop.batch_size
    texts = {count: nets.text(count) for count in {1, rows, micro}}
    with fake_mode():
        for net in nets.own:
            hollow(net)
        calls = {count: _call(nets, "teacher", texts[count], count) for count in {1, rows}}
        slope = (calls[rows].bytes - calls[1].bytes) / max(rows - 1, 1)
        worn = _call(nets, "student", texts[1], 1)
        graded: dict[Role, Measured] = {"student": _graded(nets, "student", texts[micro], micro)}
        alike = nets.roles.critic is None and (own is None or own.full in ("none", "both"))
        graded["fake"] = graded["student"] if alike else _graded(nets, "fake", texts[micro], micro)
        decode = measure(lambda: _decode(nets, chunk), nets.held())
        through = measure(lambda: _steer(nets, micro), nets.held()) if steered else None
        heavy = max(graded, key=lambda role: graded[role].bytes)
        largest = graded[heavy].bytes
        other = None if own is None else _other(nets, heavy, not own.checkpointing, texts[micro])
    chosen, rest = (largest, other) if own is not None and own.checkpointing else (other, largest)
    flop = {"teacher": float(calls[1].flop), **dict.fromkeys(("old", "student", "fake"), float(worn.flop))}
    memory = (chosen, largest if rest is None else rest)
    reading = 1.0 if own is None else nets.roles.family.feature_cost
    return Costs(flop, (calls[1].bytes - slope, slope), graded, micro, *memory, decode, chunk, through, reading)


def _latents(nets: Networks, count: int) -> Tensor:
    return torch.empty(count, *nets.latent_shape)


def _call(nets: Networks, role: str, text: Cond, count: int) -> Measured:
    with torch.no_grad():
        return measure(lambda: getattr(nets.roles, role)(_latents(nets, count), torch.rand(count), text), nets.held())


def _graded(nets: Networks, role: Role, text: Cond, count: int, *, backward: bool = True) -> Measured:
    """Forward and backward. A gradient goes as soon as it is there, as from the second micro-batch on it is added."""
    weights = nets.roles.parameters(role).values()
    hooks = [parameter.register_post_accumulate_grad_hook(_forget) for parameter in weights]

    def work() -> Tensor:
        prediction = getattr(nets.roles, role)(_latents(nets, count), torch.rand(count), text)
        loss: Tensor = prediction.x0.square().mean()
        if nets.roles.critic is not None:
            loss = loss + _judged(nets, role, prediction.x0, text)
        if backward:
            torch.autograd.backward(loss)
        return loss

    measured = measure(work, nets.held())
    for hook in hooks:
        hook.remove()
    return measured


def _judged(nets: Networks, role: Role, x0: Tensor, text: Cond) -> Tensor:
    """What a GAN adds to an update: for the fake its head reads real and student latents, for the student x0, frozen."""
    t = torch.rand(len(x0))
    if role == "fake":
        logits: Tensor = sum(nets.roles.critic(_latents(nets, len(x0)), t, text) for _ in range(2))
        return logits.mean()
    with frozen(nets.roles.parameters("fake").values()):
        return nets.roles.critic(x0, t, text).mean()


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _other(nets: Networks, role: Role, on: bool, text: Cond) -> int:
    """Bytes of a micro-batch with the other choice of checkpointing; without it the end of the forward pass is most."""
    nets.roles.set_checkpointing(on=on)
    measured = _graded(nets, role, text, len(next(iter(text.values()))), backward=on)
    nets.roles.set_checkpointing(on=not on)
    return measured.bytes


@torch.no_grad()
def _decode(nets: Networks, count: int) -> None:
    nets.scoring.decode(_latents(nets, count))


def _steer(nets: Networks, count: int) -> None:
    torch.autograd.backward(nets.scoring.decode(_latents(nets, count).requires_grad_()).sum())
