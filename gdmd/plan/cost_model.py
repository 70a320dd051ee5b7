"""Arithmetic of ``gdmd plan``: memory, time and traffic on a GPU, or on several in one node. An estimate, not a measurement.

GPU data are from data sheets: dense bf16 peak with fp32 accumulation, memory as the driver reports it, and the bandwidth
in one direction between GPUs of a node (NVLink, or PCIe without it) and from the host: PCIe x16, 32 GB/s in generation 4, 64
in generation 5.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30
RESERVE = 1.0
"""GiB that a process holds besides tensors: CUDA context, library workspaces, allocator fragmentation."""
MAX_GPUS = 8
"""GPUs of one node."""
LINK_EFFICIENCY = 0.8
"""Share of the link bandwidth that a collective reaches, or a copy from pinned memory."""
REWARD_ROW = 16 * 2**20
"""Bytes of activations of a reward's ViT per image."""


@dataclass(frozen=True)
class Gpu:
    """Peak in TFLOP/s (dense bf16; 0 = unknown), memory in GiB, link to other GPUs and to the host in GB/s."""

    name: str
    tflops: float
    gib: float
    link: float
    host: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250.0, 179.0, 900.0, 64.0),
        Gpu("h200", 989.4, 140.4, 450.0, 64.0),
        Gpu("h100", 989.4, 79.6, 450.0, 64.0),
        Gpu("a100-80", 312.0, 80.0, 300.0, 32.0),
        Gpu("a100-40", 312.0, 40.0, 300.0, 32.0),
        Gpu("l40s", 362.0, 45.0, 32.0, 32.0),
        Gpu("rtx6000ada", 364.2, 48.0, 32.0, 32.0),
        Gpu("rtx5090", 209.5, 31.8, 64.0, 64.0),
        Gpu("rtx4090", 165.2, 24.0, 32.0, 32.0),
        Gpu("rtx5080", 112.6, 15.9, 64.0, 64.0),
        Gpu("rtx5070", 61.7, 11.9, 64.0, 64.0),
        Gpu("rtx4080", 97.5, 16.0, 32.0, 32.0),
        Gpu("rtx4070", 58.3, 12.0, 32.0, 32.0),
        Gpu("rtx3090", 71.0, 24.0, 32.0, 32.0),
        Gpu("rtx3060", 25.5, 12.0, 32.0, 32.0),
        Gpu("l4", 121.0, 22.5, 32.0, 32.0),
        Gpu("a10g", 70.0, 22.5, 32.0, 32.0),
    )
}


def gpu_of(name: str) -> Gpu:
    """A GPU of the table, or one of that many GiB and unknown speed; ValueError suggests the nearest name."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    size = re.fullmatch(r"(\d{1,4}(\.\d+)?) ?(gi?b?)?", name.lower())  # what is sold as 24 GB has 24 GiB
    if size and float(size[1]):
        return Gpu(f"a GPU of {size[1]} GiB", 0.0, float(size[1]), 32.0, 32.0)
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"--gpu {name!r} is unknown: {hint}known are {', '.join(GPUS)}, or a number of GiB")


@dataclass(frozen=True)
class RewardNet:
    """Number of weights of a reward network, and FLOP per image (image and text tower)."""

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
    "hpsv3": RewardNet(7_744_923_136, 12_500_000_000_000),
    "geneval2": RewardNet(8_767_123_696, 166_000_000_000_000),
}
"""Counted on the architectures (CLIP ViT-L/14 and ViT-H/14 at 224 pixels); ImageReward's BLIP is rounded. FLOP of HPSv3: for
about 800 tokens. Of GenEval 2: for images of 1024 x 1024 and the mean of its prompts, 7.5 questions."""


@dataclass(frozen=True)
class Transfers:
    """Offloaded weights in bytes, and how often an outer iteration copies them to the GPU."""

    blocks: int = 0  # of the base model: in every call of it
    encoders: int = 0  # for every batch of prompts
    decoder: int = 0  # in every call of it, of ``decode_chunk`` images
    rewards: int = 0  # of all of them, whenever they score
    calls: Sequence[tuple[float, float]] = ()  # calls without gradient, and their rows per sample of the batch, by role
    calls_with_grad: float = 0.0  # per micro-batch; a checkpointed one counts twice
    prompt_batches: float = 1.0
    decoded: float = 0.0  # images per sample of the batch
    scorings: float = 0.0  # calls of the rewards on the whole batch
    scorings_with_grad: float = 0.0  # per micro-batch
    chunk: float = math.inf  # most rows of a call without gradient
    micro: int = 0  # samples per micro-batch; 0 = all
    decode_chunk: int = 1

    def bytes(self, batch: int) -> float:
        """Bytes of one outer iteration of this many samples."""
        parts = micro_batches(batch, self.micro)
        calls = sum(max(calls, rows * batch / self.chunk) for calls, rows in self.calls) + self.calls_with_grad * parts
        scorings = self.scorings + self.scorings_with_grad * parts
        decodings = self.decoded * batch / self.decode_chunk
        encodings = self.prompt_batches * self.encoders
        return calls * self.blocks + encodings + decodings * self.decoder + scorings * self.rewards


NO_TRANSFERS = Transfers()


@dataclass(frozen=True)
class ProcessCost:
    """What one process holds and computes in an outer iteration, on a batch of any size."""

    static: Mapping[str, int]  # bytes held all the time, by role
    gradients: int  # bytes, of the larger role
    call: tuple[float, float]  # bytes of a call without gradient: (fixed, per row)
    rows: float  # rows per sample of the largest such call (2: guidance)
    chunk: float  # most rows of such a call
    output: int  # bytes of x0 and eps of one row
    update: tuple[float, float]  # bytes of forward and backward of a micro-batch: (fixed, per sample)
    decoding: int  # bytes of decoding one chunk without gradient; 0 without rewards
    per_sample: int  # bytes that every sample of the batch keeps during the iteration
    scoring: int  # bytes of the rewards' activations per image
    flop: Mapping[str, float]  # per sample of the batch, by kind of work
    transfers: Transfers = NO_TRANSFERS
    decoding_with_grad: float = 0.0  # bytes per sample of a micro-batch; 0 without reward gradients
    graph: tuple[float, float] = (0, 0)  # of the student's graph, which waits for rewards inside its loss: likewise
    micro: int = 0  # samples per micro-batch; 0 = all
    visiting: int = 0  # bytes of offloaded weights of decoder and rewards, which are copied here to score
    mixture: int = 0  # bytes of a network that exists only while it gives a score
    validation: tuple[int, int] = (0, 0)  # bytes of decoding a chunk of its images, and of the largest offloaded scorer

    def peaks(self, batch: int) -> dict[str, float]:
        """Peak activation bytes of every phase at this many samples per process."""
        micro = min(self.micro or batch, batch)
        update, graph = (fixed + each * micro for fixed, each in (self.update, self.graph))
        phases = {"sampling and scores": self.forward(self.rows * batch) + self.mixture}
        phases["update (one micro-batch)"] = update
        if self.decoding or self.decoding_with_grad:
            decoding = max(self.decoding, graph + self.decoding_with_grad * micro)
            phases["decoding and rewards"] = decoding + batch * self.scoring + self.visiting
        if any(self.validation):
            decoding, scorer = self.validation
            phases["validation images"] = max(decoding, scorer + self.scoring * micro)
        if self.transfers.encoders:
            phases["embedding the prompts"] = float(self.transfers.encoders)
        return phases

    def forward(self, rows: float) -> float:
        """Bytes of a call without gradient; a chunked call holds its outputs twice when it concatenates them."""
        fixed, per_row = self.call
        concatenated = 2 * self.output * rows if rows > self.chunk else 0
        return fixed + per_row * min(rows, self.chunk) + concatenated

    def total(self, batch: int, elsewhere: float = 0.0) -> float:
        """Peak bytes, with the reserve; ``elsewhere``: bytes of sharded weights and gradients on other GPUs."""
        kept = sum(self.static.values()) + self.gradients - elsewhere
        return kept + batch * self.per_sample + max(self.peaks(batch).values()) + RESERVE * GIB

    def seconds(self, batch: int, gpu: Gpu, efficiency: float) -> float:
        """One outer iteration on one GPU; NaN if its speed is not known."""
        if not gpu.tflops:
            return math.nan
        return sum(self.flop.values()) * batch / (gpu.tflops * 1e12 * efficiency) + self.copying(batch, gpu)

    def copying(self, batch: int, gpu: Gpu) -> float:
        """Seconds of one outer iteration for copies of offloaded weights; nothing is computed meanwhile."""
        return self.transfers.bytes(batch) / (gpu.host * 1e9 * LINK_EFFICIENCY)


@dataclass(frozen=True)
class RoleTraffic:
    """What determines the traffic of a role between GPUs; all numbers except ``bytes`` per outer iteration."""

    bytes: int  # of this network's fp32 weights
    updates: float  # optimizer steps
    sharded: bool = False  # whether FSDP shards it: full copies, not adapters
    calls: float = 0.0  # forward calls without gradient
    rows: float = 0.0  # their rows, per sample of the batch
    calls_with_grad: float = 0.0
    losses: float = 0.0  # backward passes, each through one or more of these calls

    def ddp(self, gpus: int) -> float:
        """Bytes that a GPU sends: a ring all-reduce of the gradients per update."""
        return 2 * (gpus - 1) / gpus * self.bytes * self.updates

    def fsdp(self, gpus: int, samples: int, chunk: float, micro: int) -> float:
        """Bytes that a GPU with ``samples`` samples sends under FSDP.

        The weights are gathered once per call without gradient, twice per micro-batch of a call with one (forward and
        backward), and the gradients are reduced once per loss. An upper bound: FSDP keeps the outermost layers gathered.
        """
        if not self.sharded:
            return self.ddp(gpus)
        gathers = max(self.calls, self.rows * samples / chunk) + 2 * self.calls_with_grad * micro_batches(
            samples, micro
        )
        return (gpus - 1) / gpus * self.bytes * (gathers + self.losses)


@dataclass(frozen=True)
class Sharded:
    """What FSDP shards, in bytes."""

    static: int  # full copies with their optimizer state, EMA and old policy
    gradients: int  # of the larger sharded role
    gathered: int  # two blocks and the layers outside of blocks, whole on every GPU at a time
    chunk: float  # most rows of a call without gradient
    micro: int  # samples per micro-batch; 0 = all

    def elsewhere(self, gpus: int, samples: int) -> float:
        """Bytes that a GPU with ``samples`` samples does not hold. Gradients of micro-batches accumulate unsharded."""
        gradients = self.gradients if micro_batches(samples, self.micro) == 1 else 0
        return (self.static + gradients) * (1 - 1 / gpus) - self.gathered * (gpus > 1)


def micro_batches(samples: int, micro: int) -> int:
    """Number of micro-batches of ``samples`` samples."""
    return math.ceil(samples / (micro or samples))


@dataclass(frozen=True)
class ScalingRow:
    """One line of the table of --gpus. traffic: GB that a GPU sends per iteration; images_s: of all GPUs together."""

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


def scaling_row(
    cost: ProcessCost,
    roles: Sequence[RoleTraffic],
    sharded: Sharded,
    batch: int,
    gpus: int,
    gpu: Gpu,
    efficiency: float,
) -> ScalingRow:
    """The batch is divided among the GPUs; it grows if there are more GPUs than samples. No overlap with computation."""
    whole = max(batch, gpus)
    samples = math.ceil(whole / gpus)
    compute = cost.seconds(samples, gpu, efficiency)
    ddp = sum(role.ddp(gpus) for role in roles)
    fsdp = sum(role.fsdp(gpus, samples, sharded.chunk, sharded.micro) for role in roles)
    ddp_s, fsdp_s = (compute + sent / (gpu.link * 1e9 * LINK_EFFICIENCY) for sent in (ddp, fsdp))
    fsdp_gib = cost.total(samples, sharded.elsewhere(gpus, samples)) / GIB
    return ScalingRow(
        *(gpus, whole, cost.total(samples) / GIB, ddp / 1e9, whole / ddp_s, compute / ddp_s),
        *(fsdp_gib, fsdp / 1e9, whole / fsdp_s, compute / fsdp_s),
    )
