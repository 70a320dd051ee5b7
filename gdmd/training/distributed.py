"""Several processes, one run: the only file that knows torch.distributed. One process takes the same paths as identity.

Every rank works on its slice of the global batch; gradients are averaged; what a method computes over the batch it
computes on ``gather``. Small weights (adapters, small networks) are replicated and their gradients averaged as DDP
does; full weights are sharded by FSDP2 (``fully_shard``). Control messages go over gloo on the CPU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gdmd.diffusion.device import to_device_async
from gdmd.training.rank import RankInfo, attempt, module_words, rank_info
from gdmd.training.watchdog import RANK_LOST, watching

if TYPE_CHECKING:
    from torch.distributed import PrefixStore
    from torch.distributed.device_mesh import DeviceMesh

Sharding = Literal["none", "full", "hybrid"]
BUCKET = 1 << 24
"""Numbers per all-reduce of replicated gradients: 64 MiB of fp32, large enough for full bandwidth."""
SLOWEST_START = 3600.0
"""Seconds that ranks wait for each other at least: one may embed all captions while the others have nothing to do."""


class RanksError(ValueError):
    """The ranks lost each other: one ended, or a message did not arrive. The last good checkpoint stands."""


class OtherRankError(ValueError):
    """Rank 0 failed and has said why; this rank ends with it."""


class World:
    """The processes of a run and what they tell each other. All ranks must call the same methods in the same order."""

    def __init__(self, place: RankInfo | None = None) -> None:
        self.rank_info = place or RankInfo()
        self.calls = 0  # collectives entered, the pulse that the watchdog compares
        self._cut: WeakSet[Any] = WeakSet()  # modules that FSDP2 shards

    @property
    def size(self) -> int:
        return self.rank_info.size

    @property
    def first(self) -> bool:
        return self.rank_info.first

    def span(self, batch_size: int) -> tuple[int, int]:
        """First and last + 1 sample of the global batch that are this rank's. ValueError when ranks do not divide it."""
        if batch_size % self.size:
            raise ValueError(
                f"loop.batch_size = {batch_size} does not divide among {self.size} ranks; "
                f"use a multiple of {self.size}: it is the batch of all ranks together"
            )
        own = batch_size // self.size
        return self.rank_info.rank * own, (self.rank_info.rank + 1) * own

    @torch.no_grad()
    def gather(self, own: Tensor, dim: int = 0) -> Tensor:
        """The samples of all ranks in the order of the global batch; ranks hold equal parts. No gradient."""
        if self.size == 1:
            return own
        import torch.distributed as dist

        self.calls += 1
        mine = own.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts, dim)

    def share(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The inverse of ``gather``: this rank's samples."""
        return whole.chunk(self.size, dim)[self.rank_info.rank] if self.size > 1 else whole

    @torch.no_grad()
    def average(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients of replicated parameters by their mean over ranks, in buckets of these parameters.

        A parameter without gradient on some ranks counts as 0 there; without one on all ranks it stays without. So all
        ranks send the same messages whatever their losses used. FSDP2 has averaged the sharded ones.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for bucket in _buckets([one for one in parameters if not _sharded(one)]):
            self.calls += 1
            here = torch.tensor([one.grad is not None for one in bucket], dtype=bucket[0].dtype)
            parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
            flat = torch.cat([*(one.flatten() for one in parts), to_device_async(here, parts[0].device)])
            dist.all_reduce(flat)
            flat /= self.size
            *means, users = flat.split([*(one.numel() for one in bucket), len(bucket)])
            if any(one.grad is None for one in bucket):
                used = users.tolist()
                for place, one in enumerate(bucket):
                    one.grad = parts[place] if used[place] else None
            for one, mean in zip(bucket, means, strict=True):
                if one.grad is not None:
                    one.grad.copy_(mean.view_as(one))

    def reduce_gradients(self, *, now: bool) -> None:
        """Whether the next backward passes reduce sharded gradients over ranks, or add them up for the last one."""
        for module in self._cut:
            module.set_requires_gradient_sync(now)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be sharded; a replicated one itself."""
        if not _sharded(tensor):
            return tensor
        self.calls += 1
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full

    def placed(self, whole: Tensor, like: Tensor) -> Tensor:
        """This rank's shard of ``whole``, laid out like the tensor ``like``; without messages."""
        if not _sharded(like):
            return whole
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
        own: Tensor = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
        return own

    def piece(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
        """What this rank has to save of a tensor and where in the whole it begins; None where another rank saves it."""
        if not _sharded(tensor):
            return (tensor, (0,) * tensor.ndim) if self.first else None
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        seats = zip(placements, mesh.get_coordinate(), strict=True)
        own: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        if own.numel() == 0 or any(placement.is_replicate() and rank_info > 0 for placement, rank_info in seats):
            return None
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
        return own, tuple(chunk.offsets)

    def collect(self, value: Any) -> list[Any]:
        """A JSON value of every rank, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.calls += 2
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = int(max(lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.cat([text, text.new_zeros(longest - len(text))]))
        both = zip(texts, lengths, strict=True)
        return [json.loads(bytes(part[: int(length)].tolist())) for part, length in both]

    def largest(self, number: int) -> int:
        """The maximum over ranks."""
        return self.maxima([number])[0]

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """The maximum of each number over ranks, in one message."""
        own = [int(number) for number in numbers]
        if self.size == 1:
            return own
        import torch.distributed as dist

        self.calls += 1
        found = torch.tensor(own)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(number) for number in found]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 does it, all get its JSON value. An error is raised on rank 0 and ends the others too."""
        if self.size == 1:
            return action()
        value, failure = None, None
        if self.first:
            try:
                value = action()
            except Exception as error:
                failure = error
        said = self.collect([value, str(failure) if failure else None])[0]
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise OtherRankError(said[1])
        return said[0]

    def check_same(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """ValueError unless all ranks hold the same replicated weights; afterwards equal updates keep them equal."""
        if self.size == 1:
            return
        sums = self.collect(sum(float(one.detach().double().sum()) for one in tensors.values() if not _sharded(one)))
        if len(set(sums)) > 1:
            raise ValueError(
                f"the ranks start {what} from different weights (their sums are {sums[:4]}): every machine must read "
                "the same model files and the same run folder"
            )

    def shard(self, module: nn.Module, how: Sharding) -> None:
        """FSDP2 on a module, in place: a unit per transformer block, the rest in one. Its parameters are new objects."""
        if how == "none" or self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self._mesh(next(module.parameters()).device.type, how)
        for unit in (*blocks_of(module), module):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # also the root: parameters() are always shards
            unit.register_forward_pre_hook(self._count, prepend=True)
        self._cut.add(module)

    def _count(self, module: nn.Module, given: Any) -> None:
        """A sharded unit is about to be gathered."""
        self.calls += 1

    def _mesh(self, device: str, how: Sharding) -> DeviceMesh:
        """All ranks in one group, or for ``hybrid`` shards inside a machine and replicas across machines."""
        from torch.distributed.device_mesh import init_device_mesh

        if how == "full":
            return init_device_mesh(device, (self.size,), mesh_dim_names=("shard",))
        local = self.rank_info.local_size
        if self.size % local:
            raise ValueError(f"loop.sharding = hybrid: {self.size} ranks do not divide into machines of {local}")
        return init_device_mesh(device, (self.size // local, local), mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def watched(self, patience: float, standing: Callable[[], str]) -> Iterator[None]:
        """Inside, a rank that stops for ``patience`` seconds while others wait for it ends the run and is named.

        A lost connection becomes a RanksError; ``standing`` says which checkpoint stands.
        """
        if self.size == 1:
            yield
            return
        with watching(self.rank_info, lambda: self.calls, self._store(patience), patience, standing):
            try:
                yield
            except RuntimeError as error:
                if not _lost_contact(error):
                    raise
                why = str(error).splitlines()[0].split(". ")[0][:200]
                raise RanksError(
                    f"rank {self.seat.rank} lost contact with another rank ({why}). The rank that ended first says why, "
                    f"or was killed. {standing()}"
                ) from error
            self.largest(0)  # nobody takes its leave while another still counts on it

    def _store(self, patience: float) -> PrefixStore:
        """A connection of its own to the run's key-value store, so that no collective can block it."""
        from torch.distributed import PrefixStore, TCPStore

        where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = TCPStore(where, port, is_master=False, timeout=timedelta(seconds=max(10.0, patience)))
        return PrefixStore(f"attempt/{attempt()}", own)


SINGLE = World()
"""One process."""


@contextmanager
def session(patience: float = 600.0) -> Iterator[World]:
    """The world of this process: alone, or joined with the others that torchrun (or SLURM) has started."""
    place = rank_info()
    if place.size == 1:
        yield World(place)
        return
    import torch.distributed as dist

    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    longest = timedelta(seconds=max(2 * patience, SLOWEST_START))
    shared, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=longest))
    store = dist.PrefixStore(f"attempt/{attempt()}", shared)  # torchrun keeps the store, with the addresses of the dead
    dist.init_process_group(
        backend, store=store, timeout=longest, device_id=device, rank=place.rank, world_size=place.size
    )
    try:
        yield World(place)
    finally:
        dist.destroy_process_group()


def launch(words: Sequence[str], processes: int, restarts: int = 0) -> int:
    """What ``torchrun --standalone --nproc-per-node N -m -- gdmd WORDS`` does; returns the exit code of the run.

    After a failure all ranks are started again, at most ``restarts`` times; they go on from the newest checkpoint.
    0, the code of the rank that failed first, or 128 + signal for a rank (or this process) that a signal ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_devices(processes)
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"
    )  # seconds between SIGTERM and SIGKILL: a checkpoint's
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun: N processes with all threads each fight for the cores
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="gdmd",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
    )
    with _quiet_launcher():
        try:
            elastic_launch(config, sys.executable)(*module_words("gdmd"), *words)
        except ChildFailedError as error:
            return _told(*_first_failure(error.failures))
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, int, int]:
    """(rank, process, exit code) of the rank that failed first.

    The launcher's times are whole seconds, in which the others lose contact or get its SIGTERM: those come after.
    """
    after = (RANK_LOST, -signal.SIGTERM, 128 + signal.SIGTERM)
    rank = min(failures, key=lambda rank: (failures[rank].exitcode in after, failures[rank].timestamp))
    return rank, failures[rank].pid, failures[rank].exitcode


def _told(rank: int, pid: int, code: int) -> int:
    """Say which rank ended first, where it could not say so itself; its exit code."""
    if code < 0:
        print(
            f"error: rank {rank} (process {pid}) was ended by {signal.Signals(-code).name}; so the others were",
            file=sys.stderr,
        )
    return code if code >= 0 else 128 - code


def _check_devices(processes: int) -> None:
    found = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > found:
        raise ValueError(f"--gpus {processes}: this machine has {found} GPU(s); give at most {found}")
    if not torch.cuda.is_available():
        print(f"no GPU was found: {processes} processes on the CPU", file=sys.stderr)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """The launcher's log of its own doings is not for users; what failed is said in one line."""
    import logging

    log = logging.getLogger("torch.distributed.elastic")
    before, log.level = log.level, logging.CRITICAL
    try:
        yield
    finally:
        log.setLevel(before)


def _sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 cut it. Without importing DTensor, which takes a second, where nothing was sharded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype with at most BUCKET numbers; a larger one is alone."""
    bucket: list[Tensor] = []
    for one in gradients:
        full = sum(own.numel() for own in bucket) + one.numel() > BUCKET
        if bucket and (full or one.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The outermost members of ModuleLists: the transformer blocks, each of them a unit of FSDP."""
    found: list[nn.Module] = []
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        found += [child] if listed else blocks_of(child)
    return found


LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Connection refused", "NCCL")


def _lost_contact(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)
