"""The roles of one distillation of a real model: adapters on shared backbones, full copies, or one of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.models.compile import compile_blocks
from gdmd.models.families.base import Family, network_dtype
from gdmd.models.full_copy import FullCopy
from gdmd.models.gan_head import FeatureCritic, GanHead, seeded_head
from gdmd.models.lora import NO_ADAPTER, ActiveAdapter, SharedBackbone, check_targets
from gdmd.types import Cond, Denoiser, Prediction, Role

SEEDS: Mapping[Role, int] = {"student": 1, "fake": 2}
"""Seeds of the adapters' A; the run's seed affects noise and prompts only."""


class RoleNetwork(Protocol):
    """The network behind a role."""

    def ready(self) -> Any:
        """The module, with this role's adapter active."""
        ...


class AdapterView:
    """A shared backbone in one role."""

    def __init__(self, backbone: SharedBackbone, adapter: ActiveAdapter) -> None:
        self.backbone, self.adapter = backbone, adapter

    def ready(self) -> Any:
        return self.backbone.set_adapter(self.adapter)


class RoleDenoiser:
    """A role as a Denoiser. With ``half``, networks stored in fp32 compute in bf16 under autocast.

    A call without gradient on more than cfg.forward_chunk rows is split into chunks of that size.
    """

    def __init__(self, family: Family, net: RoleNetwork, *, half: bool) -> None:
        self.family, self.net, self.half = family, net, half
        self.schedule = family.schedule
        self.in_feature_mode = False  # during a call for features

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        chunk = self.family.cfg.forward_chunk
        if torch.is_grad_enabled() or not 0 < chunk < len(x_t):
            return self._predict(x_t, t, cond)
        cuts = [slice(first, first + chunk) for first in range(0, len(x_t), chunk)]
        parts = [self._predict(x_t[cut], t[cut], {k: v[cut] for k, v in cond.items()}) for cut in cuts]
        return Prediction(torch.cat([part.x0 for part in parts]), torch.cat([part.eps for part in parts]))

    def _predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        net = self.net.ready()
        with self._precision(net, x_t):
            return self.family.predict(net, x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Hidden states of the image tokens at the family's feature layer, [B, N, D], fp32."""
        net, self.in_feature_mode = self.net.ready(), True
        try:
            with self._precision(net, x_t):
                return self.family.features(net, x_t, t, cond).float()
        finally:
            self.in_feature_mode = False

    def feature_grid(self, x_t: Tensor) -> tuple[int, int]:
        """Rows and columns of ``features``."""
        return self.family.feature_grid(x_t)

    def _precision(self, net: Any, x_t: Tensor) -> torch.autocast:
        narrow = self.half and network_dtype(net) == torch.float32
        return torch.autocast(x_t.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False)


class DiffusersRoles:
    """Teacher, student, fake score and old policy of a family.

    ``start``: what the student starts as (``student_start``); by default all roles equal the teacher before the first
    step. cfg.full says which trained roles are full fp32 copies; the others are fp32 adapters on the frozen backbone of
    the teacher, or on that of the start.
    ``head_seed`` adds a GAN head on the fake score's features (``critic``), initialized from that seed; it is trained
    with the fake score, as "gan_head.*" of its parameters. None = no head, neither in memory nor in checkpoints.
    """

    def __init__(
        self, family: Family, *, start: Family | None = None, half: bool = False, head_seed: int | None = None
    ) -> None:
        cfg = family.cfg
        self.family, self.schedule, self.guide = family, family.schedule, family.guide
        self.start = start or family
        fake = self.start if cfg.fake_from == "student" else family
        self._origins: Mapping[Role, Family] = {"student": self.start, "fake": fake}
        check_targets(family.net, cfg.lora_targets)
        self._half = half or cfg.dtype == "bf16"
        self._copies: dict[Role, FullCopy] = {}
        self._shard: Callable[[Any], None] | None = None
        self._watch: Callable[[Any], object] | None = None
        self._backend: str | None = None
        both: tuple[Role, Role] = ("student", "fake")
        for role in both:
            if cfg.full in (role, "both"):
                self._copies[role] = FullCopy(self._origins[role].net, checkpointing=cfg.checkpointing)
        self.backbone = self._start_backbone = _backbone_of(family)
        if self.start is not family:
            self._start_backbone = _backbone_of(self.start)
        for role in both:
            if role not in self._copies:
                self._backbone(role).add(role, SEEDS[role])
        self._backbones = tuple(
            dict.fromkeys([self.backbone, *(self._backbone(r) for r in both if r not in self._copies)])
        )
        if self._start_backbone not in self._backbones:
            self.start.net.to("cpu")  # only an old policy copies it
        self.teacher = self._denoiser(family, AdapterView(self.backbone, NO_ADAPTER))
        self.student, self.fake = (self._denoiser(self._origins[role], self._net(role)) for role in both)
        self.old = self._denoiser(self.start, AdapterView(self._start_backbone, NO_ADAPTER))
        self.critic = None if head_seed is None else FeatureCritic(self.fake, _head_of(family, head_seed))
        self._old: Mapping[str, Tensor] = {}

    def compile(self, backend: str = "inductor") -> None:
        """torch.compile the repeated blocks of all networks, including those of a later old policy; before ``shard``."""
        assert self._shard is None, "compile before shard: FSDP's hooks belong outside of the graphs"
        self._backend = backend
        for backbone in self._backbones:
            backbone.compiled = True
        for net in self.modules():
            compile_blocks(net, self.family.blocks, backend)

    def shard(self, shard: Callable[[Any], None]) -> None:
        """Shard the full copies, and the old policy's once it exists; adapters and the frozen backbone are replicated.

        A GAN head is sharded with its fake score: all weights of a role are sharded, or none.
        """
        self._shard = shard
        for copy in self._copies.values():
            shard(copy.net)
        if self.critic is not None and "fake" in self._copies:
            shard(self.critic.head)

    def parameters(self, role: Role) -> Mapping[str, Parameter]:
        copy = self._copies.get(role)
        weights = copy.weights() if copy else self._backbone(role).weights(role)
        if role == "fake" and self.critic is not None:
            weights |= {f"gan_head.{name}": value for name, value in self.critic.head.named_parameters()}
        return weights

    def modules(self) -> tuple[Any, ...]:
        """Every network that holds weights of a role: the backbones, then the copies."""
        return *self.backbone_nets(), *(copy.net for copy in self._copies.values())

    def watch(self, watch: Callable[[Any], object]) -> None:
        """Call ``watch`` with every network of a role, also with later ones: old policy and blended teacher."""
        self._watch = watch
        for net in self.modules():
            watch(net)

    def backbone_nets(self) -> tuple[Any, ...]:
        """The networks whose own weights are frozen: the teacher's, and the start's if adapters are on it."""
        return tuple(backbone.net for backbone in self._backbones)

    def role_of_call(self, net: Any) -> str:
        """The adapter that is active on a backbone, or "teacher"."""
        (active,) = (backbone.active for backbone in self._backbones if backbone.net is net)
        return active.name or "teacher"

    def set_checkpointing(self, *, on: bool) -> None:
        """Switch activation checkpointing of all networks."""
        networks: list[SharedBackbone | FullCopy] = [*self._backbones, *self._copies.values()]
        for net in networks:
            net.set_checkpointing(on=on)

    def blended_teacher(self, share: float) -> Denoiser:
        """The teacher moved by ``share`` of the fake score's displacement (DynaDG, arXiv 2511.13649v4).

        An adapter is activated at this scale; a full copy is mixed: teacher + share (fake - teacher).
        """
        copy = self._copies.get("fake")
        if copy is None and self._backbone("fake") is not self.backbone:
            raise ValueError(
                "model.fake_from = student, and a fake score on the student's model cannot be mixed with the teacher "
                "(method dmdr, overlap > 0); set model.fake_from = teacher"
            )
        if copy is None:
            return self._denoiser(self.family, AdapterView(self.backbone, ActiveAdapter("fake", share)))
        if self._shard is not None:
            raise ValueError(
                "loop.sharding is on, and a sharded fake score cannot be mixed with the teacher (method dmdr, overlap > 0); "
                "set method.overlap = 0 or loop.sharding = none"
            )
        mixture = copy.blended(self.backbone.set_adapter(NO_ADAPTER), share)
        if self._watch is not None:
            self._watch(mixture.net)
        return self._denoiser(self.family, mixture)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        student = self.parameters("student")
        self._make_old()
        for name, old in self._old.items():
            old.lerp_(student[name], 1 - decay)

    def old_state(self) -> Mapping[str, Tensor]:
        return {name: weights.detach() for name, weights in self._old.items()}

    @torch.no_grad()
    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        self._make_old()
        if self._old.keys() != tensors.keys():
            wrong = sorted(self._old.keys() ^ tensors.keys())
            raise ValueError(
                f"the saved old policy does not fit: {len(wrong)} names differ, first {wrong[0]!r}. "
                "It belongs to another network: use the checkpoint of this configuration."
            )
        for name, old in self._old.items():
            old.copy_(tensors[name])

    def _make_old(self) -> None:
        """Create the old policy as the student before its first step; only methods that ask for it pay the memory."""
        if self._old:
            return
        if "student" in self._copies:
            copy = FullCopy(self._start_backbone.set_adapter(NO_ADAPTER), checkpointing=False)
            copy.net.to(next(iter(self.parameters("student").values())).device)
            if self._backend is not None:
                compile_blocks(copy.net, self.family.blocks, self._backend)
            if self._shard is not None:
                self._shard(copy.net)
            if self._watch is not None:
                self._watch(copy.net)
            self.old.net, self._old = copy, copy.weights()
        else:
            own = self._start_backbone
            own.add("old", SEEDS["student"])
            self.old.net, self._old = AdapterView(own, ActiveAdapter("old")), own.weights("old")
        for weights in self._old.values():
            weights.requires_grad_(False)

    def _backbone(self, role: Role) -> SharedBackbone:
        return self.backbone if self._origins[role] is self.family else self._start_backbone

    def _net(self, role: Role) -> RoleNetwork:
        return self._copies.get(role) or AdapterView(self._backbone(role), ActiveAdapter(role))

    def _denoiser(self, family: Family, net: RoleNetwork) -> RoleDenoiser:
        return RoleDenoiser(family, net, half=self._half)


def _backbone_of(family: Family) -> SharedBackbone:
    cfg = family.cfg
    targets = cfg.lora_targets or family.targets
    return SharedBackbone(
        *(family.net, cfg.lora_rank, cfg.lora_alpha, targets, family.adapter_device), checkpointing=cfg.checkpointing
    )


def _head_of(family: Family, seed: int) -> GanHead:
    return seeded_head(family.feature_width, seed, family.adapter_device or next(family.net.parameters()).device)
