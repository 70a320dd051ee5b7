"""Memory, time and traffic of a training, by arithmetic on measured parts. What it says is a model, not a measurement.

GPUs: dense bf16 peak with fp32 accumulation and memory as the driver reports it, from the makers' data sheets; link is
one direction between GPUs of a node (NVLink, or PCIe where there is none).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

GIB = 2**30
RESERVE = 1.0
"""GiB that a process holds beside tensors: CUDA context, libraries' workspaces, gaps of the allocator."""
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

    def total(self, batch: int, less: float = 0.0) -> float:
        """Bytes at the worst moment, with the reserve; ``less``: what other processes hold of weights and gradients."""
        kept = sum(self.static.values()) + self.gradients - less
        return kept + batch * self.per_sample + max(self.peaks(batch).values()) + RESERVE * GIB

    def seconds(self, batch: int, gpu: Gpu, efficiency: float) -> float:
        """One outer iteration on one GPU."""
        return sum(self.flop.values()) * batch / (gpu.tflops * 1e12 * efficiency)


@dataclass(frozen=True)
class Trained:
    """A role as the network between GPUs sees it: bytes of its own fp32 weights; the rest per iteration.

    updates: optimizer steps; cut: whether FSDP cuts it (a full copy; adapters stay whole); plain: calls without
    gradient; rows: samples of all of them per sample of the batch; graded: calls with a backward pass, in one part;
    losses: backward passes, each through one or more of these calls.
    """

    bytes: int
    updates: float
    cut: bool = False
    plain: float = 0.0
    rows: float = 0.0
    graded: float = 0.0
    losses: float = 0.0

    def ddp(self, ring: float) -> float:
        """Bytes that a GPU sends: 2 (N - 1) / N of the gradients per update, a ring all-reduce; ring = (N - 1) / N."""
        return 2 * ring * self.bytes * self.updates

    def sharded(self, cut: Sharding, own: int, inside: int, nodes: int) -> Sent:
        """What a GPU with ``own`` samples sends when shards lie on ``inside`` GPUs and replicas on ``nodes`` of those.

        Among the shards (G - 1) / G of the weights per call without gradient; per micro-batch twice that for a call
        with one, for the forward and the backward pass, in which the root is gathered once for all of its calls; and
        once for the gradients of the loss, after its last micro-batch. Then the replicas average their shards of these
        gradients, 2 (M - 1) / M of a G-th of the weights. A message per unit each time.
        """
        if not self.cut:
            among, across = (self.updates, 0.0) if nodes == 1 else (0.0, self.updates)
            size = self.ddp((inside * nodes - 1) / (inside * nodes))
            return Sent(size if nodes == 1 else 0.0, size if nodes > 1 else 0.0, among, across)
        micro = cut.micro_batches(own)
        calls, graded = max(self.plain, self.rows * own / cut.chunk), self.graded * micro

        def times(whole: float, root: float) -> float:
            return calls * whole + graded * (2 * whole - root) + self.losses * (micro * root + whole)

        across = 2 * (nodes - 1) / nodes * self.bytes / inside * self.losses
        messages = (times(cut.units, 1) * (inside > 1), self.losses * cut.units * (nodes > 1))
        return Sent((inside - 1) / inside * times(self.bytes, cut.root), across, *messages)


@dataclass(frozen=True)
class Sent:
    """Bytes that a GPU sends per iteration, and messages: among the GPUs of a group of shards, and across groups."""

    among: float
    across: float
    among_messages: float
    across_messages: float

    @staticmethod
    def of_all(roles: Sequence[Sent]) -> Sent:
        """The sum."""
        return Sent(*(sum(values) for values in zip(*(astuple(role) for role in roles), strict=True)))


@dataclass(frozen=True)
class Sharding:
    """What FSDP cuts. cut: bytes of copies, their optimizer and EMA; gradients: of the larger role, where it is cut;
    block: of the largest block of a copy; root: of what is in no block; units: blocks and root, each a message of its
    own; chunk: rows of one call without gradient; micro: samples of one with (0: all)."""

    cut: int
    gradients: int
    block: int
    root: int
    units: int
    chunk: float
    micro: int

    def micro_batches(self, own: int) -> int:
        """Into how many a GPU with ``own`` samples cuts them."""
        return math.ceil(own / (self.micro or own))

    def less(self, shards: int, own: int) -> float:
        """Bytes that a GPU with ``own`` samples does not hold when it has one of ``shards``.

        The root and two blocks are gathered. Gradients of several micro-batches add up whole until the last one.
        """
        gradients = self.gradients if self.micro_batches(own) == 1 else 0
        return (self.cut + gradients) * (1 - 1 / shards) - (self.root + 2 * self.block) * (shards > 1)


@dataclass(frozen=True)
class Hybrid:
    """Shards inside a node, replicas across nodes. GB that a GPU sends inside and between; images_s: of all GPUs."""

    gib: float
    inside: float
    between: float
    images_s: float
    efficiency: float


@dataclass(frozen=True)
class Row:
    """One line of the scaling table. traffic: GB that a GPU sends per iteration; images_s: of all GPUs together.

    hybrid: None where nothing is cut, inside one node, and where the GPUs are not whole nodes.
    """

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
    hybrid: Hybrid | None = None


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
    busy = parts.seconds(own, gpu, efficiency)
    ddp = sum(role.ddp((gpus - 1) / gpus) for role in roles)
    ddp_s = _wire(ddp, sum(role.updates for role in roles), gpus, gpu)
    to_device_async = Sent.of_all([role.sharded(cut, own, gpus, 1) for role in roles])
    fsdp_s = _wire(to_device_async.among, to_device_async.among_messages, gpus, gpu)
    sharded = parts.total(own, cut.less(gpus, own))
    return Row(
        *(gpus, whole, parts.total(own) / GIB, ddp / 1e9, whole / (busy + ddp_s), busy / (busy + ddp_s)),
        *(sharded / GIB, to_device_async.among / 1e9, whole / (busy + fsdp_s), busy / (busy + fsdp_s)),
        _hybrid(parts, roles, cut, gpus, gpu, (own, whole, busy)),
    )


def _hybrid(
    parts: Parts, roles: Sequence[Trained], cut: Sharding, gpus: int, gpu: Gpu, work: tuple[int, int, float]
) -> Hybrid | None:
    """work: samples of a GPU, of all, and seconds of computing."""
    if not cut.cut or gpus <= NODE or gpus % NODE:
        return None
    own, whole, busy = work
    nodes = gpus // NODE
    to_device_async = Sent.of_all([role.sharded(cut, own, NODE, nodes) for role in roles])
    seconds = busy + _wire(to_device_async.among, to_device_async.among_messages, NODE, gpu)
    seconds += _wire(to_device_async.across, to_device_async.across_messages, gpus, gpu)
    gib = parts.total(own, cut.less(NODE, own)) / GIB
    return Hybrid(gib, to_device_async.among / 1e9, to_device_async.across / 1e9, whole / seconds, busy / seconds)


def _wire(traffic: float, collectives: float, gpus: int, gpu: Gpu) -> float:
    """Seconds of communication per iteration."""
    if gpus == 1:
        return 0.0
    speed = gpu.link if gpus <= NODE else min(gpu.link, NETWORK)
    return traffic / (speed * 1e9 * REACHED) + collectives * LATENCY * math.log2(gpus)
