"""What ``gdmd plan`` computes: a recipe's memory, work and speed before any weight is loaded.

1. Networks: the model's real classes from its config files, on the meta device (``meta_pipeline``, ``networks``).
2. Weights: counted on these networks -> bytes of base model, roles, optimizer state, EMA, encoders, decoder, rewards.
3. Activations: one call of every kind (teacher; student and fake score forward + backward; decoding) on fake tensors,
   which have shapes but no memory; every allocation is followed, and the peak kept (``fake_tensors``).
4. FLOP of the same calls: torch's formulas for matrix products, convolutions and attention.
5. Calls per iteration: the recipe's method itself, run on one-weight networks (``recipes.call_counts``).
6. Memory = 2. + gradients + tensors of the batch + the largest phase of 3. + a reserve of 1 GiB.
7. Seconds = 4. x 5. / (GPU peak x --efficiency), and the copies of offloaded weights over PCIe (``cost_model.Transfers``).
8. --gpus N: the batch is divided; DDP and FSDP traffic over the link between the GPUs of one node (``cost_model``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeConfig
from gdmd.config.run import RewardConfig, RunConfig, ShapesReward
from gdmd.diffusion.device import DTYPES
from gdmd.models.roles import DiffusersRoles
from gdmd.plan.cost_model import (
    GIB,
    MAX_GPUS,
    NO_TRANSFERS,
    REWARD_ROW,
    REWARDS,
    Gpu,
    ProcessCost,
    RewardNet,
    RoleTraffic,
    ScalingRow,
    Sharded,
    Transfers,
    scaling_row,
)
from gdmd.plan.fake_tensors import measure
from gdmd.plan.networks import Costs, Networks, costs_of, heads_of, networks_of
from gdmd.plan.quantized_layers import numbers
from gdmd.recipes.call_counts import CallCounts, count_calls, forward_passes
from gdmd.training.adamw8bit import moment_bytes
from gdmd.training.distributed import blocks_of

ADAM = 8
"""Bytes of the optimizer per trained weight: two fp32 moments."""


@dataclass(frozen=True)
class TrainingPlan:
    """The estimate of a recipe on a GPU. ``uncounted``: rewards whose network is not known here."""

    cfg: RunConfig
    source: str
    weights: Mapping[str, int]
    counts: CallCounts
    costs: Costs
    cost: ProcessCost
    roles: tuple[RoleTraffic, ...]
    sharded: Sharded
    text_bytes: int
    embedding: int
    uncounted: tuple[str, ...]
    gpu: Gpu
    efficiency: float

    @property
    def batch(self) -> int:
        return self.cfg.loop.batch_size

    @property
    def total(self) -> float:
        """Peak bytes, including the embedding of the prompts."""
        return max(self.cost.total(self.batch), self.embedding)

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.gib * GIB

    @property
    def seconds(self) -> float:
        """One outer iteration."""
        return self.cost.seconds(self.batch, self.gpu, self.efficiency)

    @property
    def passes(self) -> float:
        """Forward passes per student update and sample; a backward counts 2, through a frozen backbone 1."""
        full = self.cfg.model.full if isinstance(self.cfg.model, DiffusersModel) else "both"
        return forward_passes(self.counts, full, self.costs.feature_cost)

    def scaling(self, counts: list[int]) -> list[ScalingRow]:
        """One row per number of GPUs."""
        return [
            scaling_row(self.cost, self.roles, self.sharded, self.batch, count, self.gpu, self.efficiency)
            for count in counts
        ]

    def json(self, counts: list[int]) -> dict[str, Any]:
        """The object of ``gdmd plan --json``. Memory in bytes."""
        updates = self.counts.updates["student"]
        flop = sum(self.cost.flop.values()) * self.batch
        return {
            "recipe": self.cfg.name,
            "source": self.source,
            "weights": dict(self.weights),
            "static_bytes": dict(self.cost.static),
            "gradient_bytes": self.cost.gradients,
            "peak_bytes": self.cost.peaks(self.batch),
            "activations": {"checkpointed": self.costs.with_checkpointing, "stored": self.costs.without},
            "text_bytes_per_prompt": self.text_bytes,
            "embedding_bytes": self.embedding,
            "total_bytes": self.total,
            "updates": dict(self.counts.updates),
            "passes_per_student_update": self.passes,
            "forward_tflop": self.costs.forward["teacher"] / 1e12,
            "tflop_per_student_update": flop / updates / 1e12,
            "gpu": dataclasses.asdict(self.gpu),
            "efficiency": self.efficiency,
            "seconds_per_iteration": self.seconds,
            "copied_bytes_per_iteration": self.cost.transfers.bytes(self.batch),
            "copying_seconds_per_iteration": self.cost.copying(self.batch, self.gpu),
            "images_per_s": self.batch / self.seconds,
            "hours": self.seconds * self.cfg.loop.steps / 3600,
            "fits": self.fits,
            "rewards_not_counted": list(self.uncounted),
            "scaling": [dataclasses.asdict(row) for row in self.scaling(counts)],
        }


def plan(cfg: RunConfig, gpu: Gpu, efficiency: float, costs: Costs | None = None) -> TrainingPlan:
    """Estimate a recipe at the largest of its image sizes. ``costs``: those of its calls, if they are known.

    ValueError for a hub model of unknown config.
    """
    whole, cfg = cfg, cfg.at_largest_size
    nets = networks_of(cfg)
    counted = count_calls(cfg)
    if costs is None:
        rows = max(round(min(counted.max_batch * cfg.loop.batch_size, _chunk(cfg))), 1)
        kept = counted.decoder_backwards > counted.decoded_with_grad
        options = {"reward_gradient": counted.decoded_with_grad > 0, "in_update": counted.scored_in_updates}
        costs = costs_of(cfg, nets, rows, kept=kept, **options)
    rewards, uncounted = _reward_nets(cfg)
    text = _bytes(nets.text(1).values())
    static = _static(cfg, nets, counted) | {"rewards": sum(r.bytes for r in rewards if not r.offloaded)}
    static |= {"kept pairs": _kept_pairs(cfg, nets, text)}
    trained = {role: _bytes(nets.roles.parameters(role).values()) for role in ("student", "fake")}
    cost = _process_cost(cfg, nets, counted, costs, rewards, static, max(trained.values()), text)
    loading = sum(static[name] for name in ("base model", "student", "fake", "decoder")) + nets.encoders * nets.itemsize
    return TrainingPlan(
        *(whole, nets.source, _weights(nets, rewards), counted, costs, cost),
        roles=_roles(cfg, trained, counted),
        sharded=_sharded(cfg, nets, static, trained),
        text_bytes=text if isinstance(cfg.model, DiffusersModel) else 0,
        embedding=loading if nets.encoders else 0,
        uncounted=uncounted,
        gpu=gpu,
        efficiency=efficiency,
    )


def _process_cost(
    cfg: RunConfig,
    nets: Networks,
    counted: CallCounts,
    costs: Costs,
    rewards: Sequence[_HeldReward],
    static: Mapping[str, int],
    gradients: int,
    text: int,
) -> ProcessCost:
    """What one process holds and computes. text: bytes of the embedding of a prompt."""
    transfers = _transfers(cfg, nets, counted, rewards)
    away = [r.bytes for r in rewards if r.offloaded]  # one after the other, or with gradient until the backward pass
    visiting = sum(away) if counted.decoded_with_grad else max(away, default=0)
    return ProcessCost(
        static=static,
        gradients=gradients,
        call=costs.call,
        rows=counted.max_batch,
        chunk=_chunk(cfg),
        output=2 * 4 * math.prod(nets.latent_shape),  # fp32
        update=costs.update_bytes,
        decoding=costs.decode.bytes if counted.decoded else 0,
        decoding_with_grad=costs.decode_with_grad.bytes / costs.micro if costs.decode_with_grad else 0.0,
        graph=costs.graph,
        micro=cfg.loop.micro_batch,
        visiting=transfers.decoder + visiting,
        mixture=_mixture(cfg, nets),
        validation=(_validation(cfg, nets, costs), max(away, default=0)),
        per_sample=_per_sample(cfg, nets, text, scored=counted.decoded > 0),
        scoring=REWARD_ROW if rewards and isinstance(cfg.model, DiffusersModel) else 0,
        flop=_flop(counted, costs, sum(r.flop for r in rewards)),
        transfers=transfers,
    )


def _chunk(cfg: RunConfig) -> float:
    """The most rows of a call without gradient."""
    most = cfg.model.forward_chunk if isinstance(cfg.model, DiffusersModel) else 0
    return most or math.inf


@dataclass(frozen=True)
class _HeldReward:
    """A reward's bytes and FLOP on the student's device; offloaded: its weights are on the CPU between calls."""

    weights: int
    bytes: int
    flop: int
    offloaded: bool = False


def _reward_nets(cfg: RunConfig) -> tuple[list[_HeldReward], tuple[str, ...]]:
    """The reward networks on the student's device, and the names of those of unknown size."""
    trained = cfg.rewards if cfg.method.rewarded else ()
    found, unknown = [], []
    for spec in (*trained, *cfg.held_out):  # held-out scorers take memory, but no time in training
        for one in [part.reward for part in spec.parts] if isinstance(spec, CompositeConfig) else [spec]:
            net = _shapes_reward(one) if isinstance(one, ShapesReward) else REWARDS.get(one.kind)
            if net is None:
                unknown.append(one.label)
                continue
            here = on_student_device(one)
            size = DTYPES[getattr(one, "dtype", "fp32")].itemsize
            offloaded = getattr(one, "offload", False)
            flop = net.flop * here * (spec in trained)
            found.append(_HeldReward(net.weights, net.weights * size * here, flop, offloaded))
    return found, tuple(unknown)


def on_student_device(spec: RewardConfig) -> bool:
    """Whether a reward's network shares the first GPU with the student."""
    return isinstance(spec, ShapesReward) or getattr(spec, "device", None) in (None, "cuda", "cuda:0")


def _shapes_reward(spec: RewardConfig) -> RewardNet:
    """A scorer of the Shapes world: small enough to be built and run once."""
    import torch

    from gdmd.shapes.grammar import CAPTION_TOKENS
    from gdmd.shapes.render import IMAGE_SIZE
    from gdmd.shapes.scorer_networks import build_net

    if spec.kind == "shapes_partial_credit":
        return RewardNet(0, 0)
    net = build_net(spec.kind)
    images, words = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.zeros(1, CAPTION_TOKENS, dtype=torch.int64)
    with torch.no_grad():
        text = net.text_features(words)  # once per caption, so not part of a score
        flop = measure(lambda: net(images, text)).flop
    return RewardNet(sum(p.numel() for p in net.parameters()), flop)


def _static(cfg: RunConfig, nets: Networks, counted: CallCounts) -> dict[str, int]:
    """Bytes held during the whole training, by role."""
    student, fake = (nets.roles.parameters(role) for role in ("student", "fake"))
    numbers = [p.numel() for weights in (student, fake) for p in weights.values()]
    moments = sum(moment_bytes(n) for n in numbers) if cfg.loop.optimizer == "adamw8bit" else ADAM * sum(numbers)
    kept = isinstance(cfg.model, DiffusersModel) and cfg.model.embeddings is None and cfg.model.offload == "none"
    decoders = [
        codec for codec in _unique(nets.codec, nets.scoring) if codec is not nets.codec or _offload(cfg) == "none"
    ]
    blocks = _offloaded_blocks(cfg, nets)
    return {
        "base model": _bytes(_base(nets)) - sum(sorted(blocks)[:-2]),  # one computes, the next is being copied
        "student": _bytes(student.values()),
        "fake": _bytes(fake.values()),
        "old policy": _bytes(student.values())
        if counted.old_policy or not isinstance(cfg.model, DiffusersModel)
        else 0,
        "optimizer": moments,
        "EMA": _bytes(student.values()) if cfg.loop.ema else 0,
        "text encoders": nets.encoders * nets.itemsize if kept else 0,
        "decoder": sum(_bytes(codec.vae.parameters()) for codec in decoders),
    }


def _offload(cfg: RunConfig) -> str:
    return cfg.model.offload if isinstance(cfg.model, DiffusersModel) else "none"


def _offloaded_blocks(cfg: RunConfig, nets: Networks) -> list[int]:
    """Bytes of the frozen weights of each block that is on the CPU between its calls."""
    if _offload(cfg) != "base":
        return []
    found = (module for net in nets.roles.backbone_nets() for module in net.modules())
    blocks = [block for block in found if type(block).__name__ in nets.roles.family.blocks]
    weights = ([(n, w) for named in (b.named_parameters(), b.named_buffers()) for n, w in named] for b in blocks)
    return [_bytes(w for name, w in own if ".lora_" not in name) for own in weights]


def _transfers(cfg: RunConfig, nets: Networks, counted: CallCounts, rewards: Sequence[_HeldReward]) -> Transfers:
    """What is copied to the GPU in an outer iteration."""
    model = cfg.model
    if not isinstance(model, DiffusersModel):
        return NO_TRANSFERS
    idle = model.offload != "none"
    decodes = idle and nets.scoring is nets.codec
    return Transfers(
        blocks=sum(_offloaded_blocks(cfg, nets)) // len(_base_networks(nets)),
        encoders=nets.encoders * nets.itemsize if idle and model.embeddings is None else 0,
        decoder=_bytes(nets.codec.vae.decoder.parameters()) if decodes else 0,
        rewards=sum(r.bytes for r in rewards if r.offloaded and r.flop),  # not those of validation
        calls=[(counted.calls[who], counted.passes[who]) for who in counted.calls],
        calls_with_grad=sum(counted.calls_with_grad.values()) * (2 if model.checkpointing else 1),
        prompt_batches=counted.prompt_batches,
        decoded=counted.decoded + counted.decoded_with_grad,
        scorings=counted.scorings,
        scorings_with_grad=counted.scorings_with_grad,
        chunk=_chunk(cfg),
        micro=cfg.loop.micro_batch,
        decode_chunk=model.decode_chunk,
    )


def _base_networks(nets: Networks) -> Sequence[nn.Module]:
    """The frozen networks: the teacher's, and that of what the student starts as."""
    return nets.roles.backbone_nets() if isinstance(nets.roles, DiffusersRoles) else (nets.base,)


def _base(nets: Networks) -> list[Tensor]:
    """The frozen networks without adapters: the teacher, and what the student starts as."""
    named = [pair for net in _base_networks(nets) for pair in (*net.named_parameters(), *net.named_buffers())]
    return [weights for name, weights in named if ".lora_" not in name]


def _weights(nets: Networks, rewards: list[_HeldReward]) -> dict[str, int]:
    """Number of weights by part of the training."""
    base = [weights for weights in _base(nets) if isinstance(weights, nn.Parameter)]
    trained = {role: sum(p.numel() for p in nets.roles.parameters(role).values()) for role in ("student", "fake")}
    head = sum(p.numel() for net in heads_of(nets.roles) for p in net.parameters())
    trained |= {"fake": trained["fake"] - head, "GAN head": head} if head else {}
    decoder = sum(p.numel() for codec in _unique(nets.codec, nets.scoring) for p in codec.vae.parameters())
    held = sum(reward.weights for reward in rewards)
    return {
        "base model": sum(numbers(p) for p in base),
        **trained,
        "decoder": decoder,
        "rewards": held,
        "text encoders": nets.encoders,
    }


def _per_sample(cfg: RunConfig, nets: Networks, text: int, *, scored: bool) -> int:
    """Bytes kept per sample of the batch: about 8 latents and two per target, its text three times, its images."""
    method = cfg.method
    targets = method.group_size if isinstance(method, GDMDConfig | TiltedGDMDConfig) else 1
    targets *= method.continuations if isinstance(method, TiltedGDMDConfig) and method.rewarded else 1
    channels, height, width = nets.latent_shape
    sides = (cfg.model.height, cfg.model.width) if isinstance(cfg.model, DiffusersModel) else (4 * height, 4 * width)
    images = 3 * 3 * 4 * sides[0] * sides[1] if scored else 0  # decoded, rescaled, clamped; fp32
    return 4 * channels * height * width * (8 + 2 * targets) + 3 * text + images


def _kept_pairs(cfg: RunConfig, nets: Networks, text: int) -> int:
    """Bytes of the pairs of DMD's regression, which every process keeps of the global batch: two latents and a text each."""
    method = cfg.method
    if not isinstance(method, DMDConfig) or method.regression_weight == 0:
        return 0
    pairs = min(method.regression_batches, cfg.loop.steps) * cfg.loop.batch_size
    return pairs * (2 * 4 * math.prod(nets.latent_shape) + text)


def _mixture(cfg: RunConfig, nets: Networks) -> int:
    """Bytes of DMDR's real score where the fake score is a full copy: a third network, of mixed weights."""
    method = cfg.method
    mixed = isinstance(method, DMDRConfig) and method.overlap > 0 and method.anneal > 0 and "fake" in _copied(cfg)
    return 4 * _numbers(nets.base) if mixed else 0


def _validation(cfg: RunConfig, nets: Networks, costs: Costs) -> int:
    """Bytes of decoding a chunk of validation images, or of the samples that check a scoring decoder; 0 without both.

    Both use the model's own decoder, also in a run whose rewards see no images or those of a tiny decoder.
    """
    if not isinstance(cfg.model, DiffusersModel):
        return 0  # the decoder of the Shapes world is small
    checked = cfg.model.scoring_decoder is not None and cfg.model.scoring_check > 0 and cfg.method.rewarded
    if not cfg.validation.every and not checked:
        return 0
    return costs.own_decode.bytes + (_bytes(nets.codec.vae.decoder.parameters()) if _offload(cfg) != "none" else 0)


def _flop(counted: CallCounts, costs: Costs, rewards: int) -> dict[str, float]:
    """FLOP of one outer iteration per sample of the batch, by kind of work."""
    without = sum(share * costs.forward[who] for who, share in counted.passes.items())
    update = {role: measured.flop / costs.micro for role, measured in costs.update.items()}
    calls = {
        **counted.with_grad,
        "fake": counted.with_grad["fake"] - counted.feature_passes,
    }  # a GAN head's calls are part of the update
    decode = costs.decode.flop / costs.chunk
    backward = costs.decode_with_grad.flop / costs.micro - decode if costs.decode_with_grad else 0
    decoding = (counted.decoded + counted.decoded_with_grad) * decode + counted.decoder_backwards * backward
    return {
        "passes without gradient": without,
        "passes with gradient": sum(calls[role] * flop for role, flop in update.items()),
        "decoding and rewards": decoding + (counted.decoded + 3 * counted.decoded_with_grad) * rewards,
    }


def _copied(cfg: RunConfig) -> set[str]:
    """The roles that are full copies: what FSDP2 shards."""
    full = cfg.model.full if isinstance(cfg.model, DiffusersModel) else "both"
    return {role for role in ("student", "fake") if full in (role, "both")}


def _roles(cfg: RunConfig, trained: Mapping[str, int], counted: CallCounts) -> tuple[RoleTraffic, ...]:
    """The traffic of student, fake score and old policy, which is a full copy if the student is one."""
    copied = _copied(cfg)
    found = [
        *((role, role, trained[role], float(counted.updates[role])) for role in ("student", "fake")),
        *([("old", "student", trained["student"], 0.0)] if counted.old_policy else []),
    ]
    return tuple(
        RoleTraffic(
            *(size, updates, like in copied),
            *(counted.calls[who], counted.passes[who], counted.calls_with_grad[who], counted.losses[who]),
        )
        for who, like, size, updates in found
    )


def _sharded(cfg: RunConfig, nets: Networks, static: Mapping[str, int], trained: Mapping[str, int]) -> Sharded:
    """FSDP2 shards full copies, their optimizer state, EMA and old policy; everything else is replicated."""
    copied = _copied(cfg)
    if not copied:
        return Sharded(0, 0, 0, _chunk(cfg), cfg.loop.micro_batch)
    held = sum(static[role] + static["optimizer"] * trained[role] // sum(trained.values()) for role in copied)
    held += static["EMA"] + static["old policy"] if "student" in copied else 0
    blocks = [_numbers(block) for block in blocks_of(nets.base)]
    gathered = 4 * (_numbers(nets.base) - sum(blocks) + 2 * max(blocks))
    return Sharded(held, max(trained[role] for role in copied), gathered, _chunk(cfg), cfg.loop.micro_batch)


def _numbers(net: Any) -> int:
    """Weights of a copy of ``net``, which has no adapters."""
    return sum(weights.numel() for name, weights in net.named_parameters() if "lora_" not in name)


def _unique(*things: Any) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def counts_of(gpus: str | None) -> list[int]:
    """--gpus: none, a number of GPUs in one node, or "table". ValueError for anything else."""
    if gpus is None:
        return []
    if gpus == "table":
        return [1, 2, 4, MAX_GPUS]
    if gpus.isascii() and gpus.isdigit() and 1 <= int(gpus[:9]) <= MAX_GPUS:
        return [int(gpus)]
    raise ValueError(
        f"--gpus {gpus[:40]!r} must be an integer in 1..{MAX_GPUS} (the GPUs of one node; several nodes are not estimated) "
        "or 'table'"
    )
