"""Memory, time and traffic of a training, by arithmetic on measured parts. What it says is a model, not a measurement.

GPUs: dense bf16 peak with fp32 accumulation and memory as the driver reports it, from the makers' data sheets; link is
one direction between GPUs of a node (NVLink, or PCIe where there is none).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30
RESERVE = 1.0
"""GiB that a process holds beside tensors: CUDA context, libraries' workspaces, gaps of the allocator."""
EFFICIENCY = 0.4
"""Share of the peak that a training is expected to reach (docs/performance.md has what was measured)."""
NODE = 8
"""GPUs of one node in the scaling table."""
NETWORK = 50.0
"""GB/s per GPU between nodes, one direction: 400 Gb/s."""
REACHED = 0.8
"""Share of a link that a collective reaches."""
LATENCY = 20e-6
"""Seconds per collective and doubling of the number of GPUs."""
REWARD_ROW = 16 * 2**20
"""Bytes of activations of a reward's ViT per image."""


@dataclass(frozen=True)
class Gpu:
    """Peak in TFLOP/s (bf16, dense), memory in GiB, link in GB/s."""

    name: str
    tflops: float
    gib: float
    link: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250.0, 179.0, 900.0),
        Gpu("h200", 989.4, 140.4, 450.0),
        Gpu("h100", 989.4, 79.6, 450.0),
        Gpu("a100-80", 312.0, 80.0, 300.0),
        Gpu("a100-40", 312.0, 40.0, 300.0),
        Gpu("l40s", 362.0, 45.0, 32.0),
        Gpu("rtx6000ada", 364.2, 48.0, 32.0),
        Gpu("rtx5090", 209.5, 31.8, 64.0),
        Gpu("rtx4090", 165.2, 24.0, 32.0),
        Gpu("rtx3090", 71.0, 24.0, 32.0),
        Gpu("l4", 121.0, 22.5, 32.0),
        Gpu("a10g", 70.0, 22.5, 32.0),
    )
}


def gpu_of(name: str) -> Gpu:
    """A GPU of the table. ValueError with the nearest name."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"--gpu {name!r} is not in the table: {hint}known are {', '.join(GPUS)}")


@dataclass(frozen=True)
class RewardNet:
    """Weights of a reward network, and FLOP per image (image and text tower)."""

    weights: int
    flop: int


CLIP_L = RewardNet(427_616_513, 175_325_000_000)
CLIP_H = RewardNet(986_109_441, 381_682_000_000)
REWARDS: Mapping[str, RewardNet] = {
    "clip": CLIP_L,
    "hps": CLIP_H,
    "hps_v2": CLIP_H,
    "pickscore": CLIP_H,
    "aesthetic": RewardNet(CLIP_L.weights + 1_000_000, 162_026_000_000),
    "imagereward": RewardNet(447_000_000, 170_000_000_000),
}
"""Counted on the architectures (CLIP ViT-L/14 and ViT-H/14 at 224 pixels); ImageReward's BLIP is rounded."""


@dataclass(frozen=True)
class Parts:
    """What one process holds and does. Bytes by what; FLOP of one iteration per sample of the batch, by what.

    static: there all the time. gradients: of the larger role. call: (fixed, per row) bytes of a call without
    gradient, in which a batch has ``rows`` rows per sample, at most ``chunk`` at a time; answer: bytes of x0 and eps
    of one row; graded: of forward and backward of one micro-batch; picture: bytes of decoding one chunk, 0 where
    nothing is; scored: of the rewards' activations per image; per_sample: bytes that every sample of the batch keeps
    during an iteration.
    """

    static: Mapping[str, int]
    gradients: int
    call: tuple[float, float]
    rows: float
    chunk: float
    answer: int
    graded: int
    picture: int
    per_sample: int
    scored: int
    flop: Mapping[str, float]

    def peaks(self, batch: int) -> dict[str, float]:
        """Largest activations of every phase, bytes, at this many samples per process."""
        phases = {"sampling and scores": self.forward(self.rows * batch)}
        phases["update (one micro-batch)"] = float(self.graded)
        if self.picture:
            phases["decoding and rewards"] = float(self.picture + batch * self.scored)
        return phases

    def forward(self, rows: float) -> float:
        """Bytes of a call without gradient; one that is made in parts holds its answers twice when it joins them."""
        fixed, per_row = self.call
        joined = 2 * self.answer * rows if rows > self.chunk else 0
        return fixed + per_row * min(rows, self.chunk) + joined

    def total(self, batch: int, static: float | None = None) -> float:
        """Bytes at the worst moment, with the reserve."""
        kept = sum(self.static.values()) if static is None else static
        return kept + self.gradients + batch * self.per_sample + max(self.peaks(batch).values()) + RESERVE * GIB

    def seconds(self, batch: int, gpu: Gpu, efficiency: float) -> float:
        """One outer iteration on one GPU."""
        return sum(self.flop.values()) * batch / (gpu.tflops * 1e12 * efficiency)


@dataclass(frozen=True)
class Trained:
    """A role as the network between GPUs sees it: bytes of its own fp32 weights; the rest per iteration.

    updates: optimiser steps; cut: whether FSDP cuts it (a full copy; adapters stay whole); plain: calls without
    gradient; rows: samples of all of them per sample of the batch; graded: calls with a backward pass, in one part.
    """

    bytes: int
    updates: float
    cut: bool = False
    plain: float = 0.0
    rows: float = 0.0
    graded: float = 0.0

    def ddp(self, ring: float) -> float:
        """Bytes that a GPU sends: 2 (N - 1) / N of the gradients per update, a ring all-reduce; ring = (N - 1) / N."""
        return 2 * ring * self.bytes * self.updates

    def fsdp(self, ring: float, own: int, chunk: float, micro: int) -> tuple[float, float]:
        """(bytes that a GPU with ``own`` samples sends, gathers and reductions of the whole role).

        (N - 1) / N of the weights per call without gradient; three times that per micro-batch with one: the weights
        for the forward and the backward pass, and the gradients.
        """
        if not self.cut:
            return self.ddp(ring), self.updates
        calls = max(self.plain, self.rows * own / chunk) + 3 * self.graded * math.ceil(own / (micro or own))
        return ring * self.bytes * calls, calls


@dataclass(frozen=True)
class Sharding:
    """What FSDP cuts. cut: bytes of copies, their optimiser and EMA; block: of the largest block of a copy; units:
    blocks, each a message of its own; chunk: rows of one call without gradient; micro: samples of one with (0: all)."""

    cut: int
    block: int
    units: int
    chunk: float
    micro: int


@dataclass(frozen=True)
class Row:
    """One line of the scaling table. traffic: GB that a GPU sends per iteration; images_s: of all GPUs together."""

    gpus: int
    batch: int
    ddp_gib: float
    ddp_traffic: float
    ddp_images_s: float
    ddp_efficiency: float
    fsdp_gib: float
    fsdp_traffic: float
    fsdp_images_s: float
    fsdp_efficiency: float


def gpu_counts(largest: int = 512) -> list[int]:
    """1, 2, 4, ... up to ``largest``."""
    return [2**power for power in range(int(math.log2(largest)) + 1)]


def scaling_row(
    parts: Parts, roles: Sequence[Trained], cut: Sharding, batch: int, gpus: int, gpu: Gpu, efficiency: float
) -> Row:
    """The batch is divided among the GPUs; beyond one sample each, it grows with them.

    Nothing overlaps with computing. What is not cut under FSDP (adapters) travels as under DDP.
    """
    whole = max(batch, gpus)
    own = math.ceil(whole / gpus)
    ring = (gpus - 1) / gpus
    ddp = sum(role.ddp(ring) for role in roles)
    sent = [role.fsdp(ring, own, cut.chunk, cut.micro) for role in roles]
    fsdp = sum(size for size, _ in sent)
    messages = sum(calls * (cut.units if role.cut else 1) for role, (_, calls) in zip(roles, sent, strict=True))
    busy = parts.seconds(own, gpu, efficiency)
    static, gradients = sum(parts.static.values()), sum(role.updates for role in roles)
    ddp_s, fsdp_s = _wire(ddp, gradients, gpus, gpu), _wire(fsdp, messages, gpus, gpu)
    sharded = parts.total(own, static - cut.cut + cut.cut / gpus + (2 * cut.block if gpus > 1 else 0))
    return Row(
        *(gpus, whole, parts.total(own) / GIB, ddp / 1e9, whole / (busy + ddp_s), busy / (busy + ddp_s)),
        *(sharded / GIB, fsdp / 1e9, whole / (busy + fsdp_s), busy / (busy + fsdp_s)),
    )


def _wire(traffic: float, collectives: float, gpus: int, gpu: Gpu) -> float:
    """Seconds of communication per iteration."""
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, NETWORK)
    return traffic / (speed * 1e9 * REACHED) + collectives * LATENCY * math.log2(gpus)
