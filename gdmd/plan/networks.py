"""The networks of a recipe without their weights, and what a call of each costs."""

from __future__ import annotations

import copy
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
from gdmd.plan.fake_tensors import Measured, fake_mode, fake_weights, measure
from gdmd.recipes.build import head_seed
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.roles import LATENT_SHAPE, ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.types import Cond, Role


@dataclass(frozen=True)
class Networks:
    """Roles and decoders that can be called inside ``fake_mode``."""

    roles: Any
    base: nn.Module  # the teacher
    all: tuple[nn.Module, ...]  # every module that holds weights
    codec: Any
    scoring: Any  # the decoder for rewards
    latent_shape: tuple[int, int, int]
    text: Callable[[int], Cond]
    itemsize: int  # bytes per weight of the text encoders
    encoders: int  # number of weights of the text encoders
    source: str

    def held(self) -> list[Tensor]:
        """Every weight and buffer."""
        return [t for net in self.all for t in (*net.parameters(), *net.buffers())]


def networks_of(cfg: RunConfig) -> Networks:
    """Build the networks of a recipe from configs; no weights are loaded."""
    if isinstance(cfg.model, DiffusersModel):
        return _diffusers(cfg, cfg.model)
    bf16 = cfg.loop.precision == "bf16"
    roles = ShapesRoles(ShapesDit(), bf16=bf16, head_seed=head_seed(cfg))
    codec = ShapesCodec(ShapesVae())
    nets = [roles.teacher.net, roles.student.net, roles.fake.net, codec.vae]
    nets += heads_of(roles)
    text = ShapesTextEncoder().null
    source = "the networks of the Shapes world"
    return Networks(roles, roles.teacher.net, tuple(nets), codec, codec, LATENT_SHAPE, text, 4, 0, source)


def heads_of(roles: Any) -> list[nn.Module]:
    """The GAN head, if there is one."""
    return [] if roles.critic is None else [roles.critic.head]


def _diffusers(cfg: RunConfig, model: DiffusersModel) -> Networks:
    from gdmd.models.distilled import check_guidance
    from gdmd.models.roles import DiffusersRoles
    from gdmd.models.scoring_decoder import check_tiny, require_tiny
    from gdmd.plan.meta_pipeline import meta_decoder, meta_family
    from gdmd.plan.quantized_layers import quantize_layers

    opened = meta_family(model.model_copy(update={"offload": "none"}))  # placement is arithmetic: ``plan.estimate``
    family = opened.family
    check_guidance(family, cfg.method.guidance)
    quantize_layers(family.net, model.quantization)
    start = None
    if model.start is not model and (model.full in ("none", "fake") or model.fake_from == "student"):
        start = copy.copy(family)
        start.net = copy.deepcopy(family.net)  # a second backbone, of the teacher's size
    roles = DiffusersRoles(family, start=start, half=cfg.loop.precision == "bf16", head_seed=head_seed(cfg))
    vae: Any = family.pipe.vae
    nets = [*roles.modules(), *heads_of(roles), vae]
    scoring: Any = family.codec
    if model.scoring_decoder is not None:
        require_tiny(family)
        tiny = meta_decoder(model, family.latent_channels)
        if Path(model.scoring_decoder).is_dir():  # a hub id means the published TAESD
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
    """FLOP and bytes of every kind of call."""

    forward: Mapping[str, float]  # FLOP per sample of a forward pass, by role
    call: tuple[float, float]  # bytes (fixed, per row) of a call without gradient
    update: Mapping[Role, Measured]  # forward and backward of one micro-batch, including the GAN head's calls
    update_bytes: tuple[float, float]  # bytes (fixed, per sample) of that of the heavier role
    micro: int
    with_checkpointing: int | None  # bytes of an update of the heavier role with activation checkpointing
    without: int
    decode: Measured  # of ``chunk`` images, by the decoder for rewards
    own_decode: Measured  # the same by the model's own decoder
    chunk: int
    decode_with_grad: Measured | None  # of a micro-batch
    feature_cost: float = 1.0  # forward passes of a call for features
    graph: tuple[float, float] = (0, 0)  # bytes that the student's forward pass keeps while rewards are back-propagated


def costs_of(
    cfg: RunConfig, nets: Networks, rows: int, *, reward_gradient: bool, kept: bool, in_update: bool = False
) -> Costs:
    """Measure one call of every network with each kind of gradient, on fake tensors.

    reward_gradient: measure a decoding with gradient, too; kept: its graph is kept for another backward pass; in_update: it
    happens inside the student's loss.
    """
    micro = cfg.loop.micro_batch or cfg.loop.batch_size
    model = cfg.model if isinstance(cfg.model, DiffusersModel) else None
    chunk = model.decode_chunk if model else cfg.loop.batch_size
    texts = {count: nets.text(count) for count in {1, rows, micro}}
    with fake_mode():
        for net in nets.all:
            fake_weights(net)
        calls = {count: _call(nets, "teacher", texts[count], count) for count in {1, rows}}
        per_row = (calls[rows].bytes - calls[1].bytes) / max(rows - 1, 1)
        adapted = _call(nets, "student", texts[1], 1)
        update: dict[Role, Measured] = {"student": _update(nets, "student", texts[micro], micro)}
        alike = nets.roles.critic is None and (model is None or model.full in ("none", "both"))
        update["fake"] = update["student"] if alike else _update(nets, "fake", texts[micro], micro)
        decode = measure(lambda: _decode(nets, nets.scoring, chunk), nets.held())
        shared = nets.scoring is nets.codec
        own_decode = decode if shared else measure(lambda: _decode(nets, nets.codec, chunk), nets.held())
        backward = lambda: _decode_with_grad(nets, micro, kept=kept)  # noqa: E731
        with_grad = measure(backward, nets.held()) if reward_gradient else None
        waiting = lambda n: _update(nets, "student", texts[n], n, backward=False).kept  # noqa: E731
        graph = _line(waiting(micro), micro, waiting) if in_update else (0.0, 0.0)
        heavy = max(update, key=lambda role: update[role].bytes)
        largest = update[heavy].bytes
        update_bytes = _line(largest, micro, lambda n: _update(nets, heavy, texts[n], n).bytes)
        other = None if model is None else _other(nets, heavy, not model.checkpointing, texts[micro])
    chosen, rest = (largest, other) if model is not None and model.checkpointing else (other, largest)
    flop = {"teacher": float(calls[1].flop), **dict.fromkeys(("old", "student", "fake"), float(adapted.flop))}
    memory = (chosen, largest if rest is None else rest)
    features = 1.0 if model is None else nets.roles.family.feature_cost
    call = (calls[1].bytes - per_row, per_row)
    return Costs(
        flop, call, update, update_bytes, micro, *memory, decode, own_decode, chunk, with_grad, features, graph
    )


def _line(bytes: int, samples: int, of: Callable[[int], int]) -> tuple[float, float]:
    """(fixed, per sample) of ``bytes`` for this many samples, and those for one: weights that are cast are fixed."""
    each = (bytes - of(1)) / (samples - 1) if samples > 1 else bytes
    return bytes - each * samples, each


def _latents(nets: Networks, count: int) -> Tensor:
    return torch.empty(count, *nets.latent_shape)


def _call(nets: Networks, role: str, text: Cond, count: int) -> Measured:
    with torch.no_grad():
        return measure(lambda: getattr(nets.roles, role)(_latents(nets, count), torch.rand(count), text), nets.held())


def _update(nets: Networks, role: Role, text: Cond, count: int, *, backward: bool = True) -> Measured:
    """Forward and backward. Gradients are dropped at once: their memory is counted separately."""
    weights = nets.roles.parameters(role).values()
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in weights]

    def work() -> Tensor:
        prediction = getattr(nets.roles, role)(_latents(nets, count), torch.rand(count), text)
        loss: Tensor = prediction.x0.square().mean()
        if nets.roles.critic is not None:
            loss = loss + _gan(nets, role, prediction.x0, text)
        if backward:
            torch.autograd.backward(loss)
        return loss

    measured = measure(work, nets.held())
    for hook in hooks:
        hook.remove()
    return measured


def _gan(nets: Networks, role: Role, x0: Tensor, text: Cond) -> Tensor:
    """What a GAN adds: the fake score's update reads real and student latents, the student's its x0 with frozen weights."""
    t = torch.rand(len(x0))
    if role == "fake":
        logits: Tensor = sum(nets.roles.critic(_latents(nets, len(x0)), t, text) for _ in range(2))
        return logits.mean()
    with frozen(nets.roles.parameters("fake").values()):
        return nets.roles.critic(x0, t, text).mean()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _other(nets: Networks, role: Role, on: bool, text: Cond) -> int:
    """Bytes of a micro-batch with checkpointing switched over; without it, the peak is the end of the forward pass."""
    nets.roles.set_checkpointing(on=on)
    measured = _update(nets, role, text, len(next(iter(text.values()))), backward=on)
    nets.roles.set_checkpointing(on=not on)
    return measured.bytes


@torch.no_grad()
def _decode(nets: Networks, codec: Any, count: int) -> None:
    codec.decode(_latents(nets, count))


def _decode_with_grad(nets: Networks, count: int, *, kept: bool) -> None:
    latents = _latents(nets, count).requires_grad_()
    torch.autograd.grad(nets.scoring.decode(latents).clamp(0, 1).sum(), latents, retain_graph=kept)
