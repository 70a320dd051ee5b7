"""The Shapes networks as Denoiser, Codec, TextEncoder and Roles; each role is a full copy of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.schedule import FlowSchedule, from_velocity
from gdmd.models.gan_head import FeatureCritic, seeded_head
from gdmd.shapes.grammar import CAPTION_TOKENS, NULL, tokenize
from gdmd.shapes.networks import LATENT_CHANNELS, ShapesDit, ShapesVae
from gdmd.types import Cond, Prediction, Role

LATENT_SHAPE = (LATENT_CHANNELS, 8, 8)
AnyNet = TypeVar("AnyNet", bound=nn.Module)
NO_BLEND = (
    "loop.sharding is on, and a sharded fake score cannot be blended with the teacher (method dmdr, overlap > 0); "
    "set method.overlap = 0 or loop.sharding = none"
)


class DitDenoiser:
    """A ShapesDit as a Denoiser. ``bf16`` runs the network under autocast; the x0 arithmetic stays in fp32."""

    def __init__(self, net: ShapesDit, *, bf16: bool = False) -> None:
        self.net, self.bf16, self.schedule = net, bf16, FlowSchedule()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            velocity = self.net(x_t, t, cond["tokens"])
        return from_velocity(velocity, x_t, t, self.schedule)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Hidden states of the image tokens after the last block, [B, N, D], fp32."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            hidden: Tensor = self.net(x_t, t, cond["tokens"], hidden=True)
        return hidden.float()

    def feature_grid(self, x_t: Tensor) -> tuple[int, int]:
        """Rows and columns of ``features``: patches of 2 x 2."""
        return x_t.shape[-2] // 2, x_t.shape[-1] // 2


class BlendedDit:
    """A ShapesDit called with substituted weights (``functional_call``); hooks of the network see the calls."""

    def __init__(self, net: ShapesDit, weights: Mapping[str, Tensor], *, bf16: bool = False) -> None:
        self.net, self.weights, self.bf16, self.schedule = net, dict(weights), bf16, FlowSchedule()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            velocity = functional_call(self.net, self.weights, (x_t, t, cond["tokens"]))
        return from_velocity(velocity, x_t, t, self.schedule)


class ShapesRoles:
    """Student, fake score and old policy as full copies of the teacher.

    ``head_seed``: add a GAN head on the fake score's features (``critic``), initialized from that seed. It is trained
    with the fake score, as its parameters "gan_head.*". None: no head, neither in memory nor in checkpoints.
    """

    def __init__(self, teacher: ShapesDit, *, bf16: bool = False, head_seed: int | None = None) -> None:
        teacher = teacher.eval().requires_grad_(False)
        self.schedule, self.guide = FlowSchedule(), plain
        self._teacher, self._bf16 = teacher, bf16
        self._nets = {"student": _trainable(teacher), "fake": _trainable(teacher)}
        self._old = copy.deepcopy(teacher)
        self._follows = self._sharded = False
        self.teacher = DitDenoiser(teacher, bf16=bf16)
        self.student = DitDenoiser(self._nets["student"], bf16=bf16)
        self.fake = DitDenoiser(self._nets["fake"], bf16=bf16)
        self.old = DitDenoiser(self._old, bf16=bf16)
        self.critic: FeatureCritic | None = None
        if head_seed is not None:
            own = seeded_head(teacher.place.shape[1], head_seed, teacher.place.device)
            self.critic = FeatureCritic(self.fake, own)

    def parameters(self, role: Role) -> Mapping[str, Parameter]:
        own = dict(self._nets[role].named_parameters())
        if role == "fake" and self.critic is not None:
            own |= {f"gan_head.{name}": weights for name, weights in self.critic.head.named_parameters()}
        return own

    def shard(self, shard: Callable[[nn.Module], None]) -> None:
        """Shard student, fake score, old policy and GAN head; the small frozen teacher is not sharded."""
        self._sharded = True
        head = [] if self.critic is None else [self.critic.head]
        for net in (*self._nets.values(), self._old, *head):
            shard(net)

    @torch.no_grad()
    def blended_teacher(self, share: float) -> BlendedDit:
        """The teacher with weights teacher + share (fake score - teacher), no gradient.

        It does for full copies what DynaDG does by scaling a LoRA adapter (arXiv 2511.13649v4).
        """
        if self._sharded:
            raise ValueError(NO_BLEND)
        fake = dict(self._nets["fake"].named_parameters())
        weights = {name: torch.lerp(own, fake[name], share) for name, own in self._teacher.named_parameters()}
        return BlendedDit(self._teacher, weights, bf16=self._bf16)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        self._follows = True
        for old, student in zip(self._old.parameters(), self._nets["student"].parameters(), strict=True):
            old.lerp_(student, 1 - decay)

    def old_state(self) -> Mapping[str, Tensor]:
        return {k: p.detach() for k, p in self._old.named_parameters()} if self._follows else {}

    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            self._old.load_state_dict(dict(tensors), strict=False)
            self._follows = True


def _trainable(net: ShapesDit) -> ShapesDit:
    return copy.deepcopy(net).requires_grad_(True)


class ShapesCodec:
    """The VAE as a Codec: latents [B, 8, h, w] <-> images [B, 3, 4h, 4w].

    Convolutions run in channels_last format, 1.7 times as fast on a CPU.
    """

    def __init__(self, vae: ShapesVae) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode(latents.contiguous(memory_format=torch.channels_last))
        return images.float().contiguous()

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.contiguous(memory_format=torch.channels_last)).float().contiguous()


class ShapesTextEncoder:
    """Captions -> word ids; the embedding is part of the network."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    def encode(self, texts: Sequence[str]) -> Cond:
        return {"tokens": to_device_async(torch.tensor([tokenize(text) for text in texts]), self.device)}

    def null(self, count: int) -> Cond:
        return {"tokens": torch.full((count, CAPTION_TOKENS), NULL, device=self.device)}


def load_dit(tensors: Mapping[str, Tensor], source: str = "the file") -> ShapesDit:
    """A ShapesDit with these weights; ValueError that names ``source`` if they do not fit."""
    return _filled(ShapesDit(), tensors, "teacher", source)


def load_vae(tensors: Mapping[str, Tensor], source: str = "the file") -> ShapesVae:
    """A ShapesVae with these weights; ValueError that names ``source`` if they do not fit."""
    return _filled(ShapesVae(), tensors, "vae", source)


def _filled(net: AnyNet, tensors: Mapping[str, Tensor], what: str, source: str) -> AnyNet:
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != given:
        wrong = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
        raise ValueError(
            f"{source} is not a Shapes {what}: {len(wrong)} names or shapes differ, first {wrong[0]!r} "
            f"(expected {wanted.get(wrong[0])}, got {given.get(wrong[0])}). Give the output of `gdmd pretrain {what}`."
        )
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    return net
