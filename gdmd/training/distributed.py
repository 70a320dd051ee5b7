"""Several processes, one run: the only file that knows torch.distributed. With one process every method is the identity.

Each rank works on its slice of the global batch; gradients are averaged; what a method computes over the batch it
computes on ``all_gather``. Small weights (adapters, small networks) are replicated and their gradients averaged as DDP
does; full weights are sharded by FSDP2 (``fully_shard``). Control messages use gloo on the CPU. A rank that hangs or
exits is found by the timeouts of torch's process groups; restarts are torchrun's.
"""

from __future__ import annotations

import itertools
import os
import re
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
from gdmd.runs.process import stop_with_parent
from gdmd.training.rank import RANK_LOST, RankInfo, module_arguments, rank_info, restart_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Sharding = Literal["none", "full", "hybrid"]
BUCKET = 1 << 24
"""Numbers per all-reduce of replicated gradients: 64 MiB of fp32, large enough for full bandwidth."""
STARTUP_TIMEOUT = 3600.0
"""Seconds that ranks wait for each other before training: rank 0 may encode all captions meanwhile."""
ROLL_CALL_SECONDS = 10.0
"""How long rank 0 waits, after a failed message, for the ranks that still answer."""


class RanksError(ValueError):
    """Lost contact with another rank: it exited, or a message timed out. The last checkpoint is intact."""


class OtherRankError(ValueError):
    """Rank 0 failed and has reported the error; this rank exits too."""


class DistributedContext:
    """The processes of a run and their messages. All ranks must call the same methods in the same order.

    ``control``: a gloo group of all ranks that carries no other messages, to find out which ranks still answer.
    """

    def __init__(self, place: RankInfo | None = None, control: ProcessGroup | None = None) -> None:
        self.rank_info = place or RankInfo()
        self._control = control
        self._sharded: WeakSet[Any] = WeakSet()  # modules that FSDP2 shards

    @property
    def rank(self) -> int:
        return self.rank_info.rank

    @property
    def size(self) -> int:
        return self.rank_info.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes."""
        return self.rank_info.is_main

    def local_slice(self, batch_size: int) -> tuple[int, int]:
        """Start and stop of this rank's samples in the global batch. ValueError unless the ranks divide the batch."""
        if batch_size % self.size:
            raise ValueError(
                f"loop.batch_size = {batch_size} does not divide among {self.size} ranks; "
                f"use a multiple of {self.size}: it is the batch of all ranks together"
            )
        count = batch_size // self.size
        return self.rank * count, (self.rank + 1) * count

    @torch.no_grad()
    def all_gather(self, local: Tensor, dim: int = 0) -> Tensor:
        """The samples of all ranks in the order of the global batch; ranks hold equal parts. No gradient."""
        if self.size == 1:
            return local
        import torch.distributed as dist

        local = local.detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(self.size)]
        with self._messages():
            dist.all_gather(parts, local)
        return torch.cat(parts, dim)

    def local_shard(self, full: Tensor, dim: int = 0) -> Tensor:
        """The inverse of ``all_gather``: this rank's samples."""
        return full.chunk(self.size, dim)[self.rank] if self.size > 1 else full

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients of replicated parameters by their mean over ranks, in buckets of parameters.

        A parameter without a gradient on some ranks counts as 0 there; without one on all ranks it stays without. So
        all ranks send the same messages whatever their losses used. FSDP2 averages the gradients of sharded parameters.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for bucket in _buckets([one for one in parameters if not is_sharded(one)]):
            present = torch.tensor([one.grad is not None for one in bucket], dtype=bucket[0].dtype)
            parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in bucket]
            flat = torch.cat([*(one.flatten() for one in parts), to_device_async(present, parts[0].device)])
            with self._messages():
                dist.all_reduce(flat)
            flat /= self.size
            *means, users = flat.split([*(one.numel() for one in bucket), len(bucket)])
            if any(one.grad is None for one in bucket):
                used = users.tolist()
                for index, one in enumerate(bucket):
                    one.grad = parts[index] if used[index] else None
            for one, mean in zip(bucket, means, strict=True):
                if one.grad is not None:
                    one.grad.copy_(mean.view_as(one))

    def set_gradient_sync(self, *, sync: bool) -> None:
        """Whether the next backward pass reduces sharded gradients over ranks, or accumulates them for the last one."""
        for module in self._sharded:
            module.set_requires_gradient_sync(sync)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be sharded; a replicated one itself. Called by all ranks."""
        if not is_sharded(tensor):
            return tensor
        with self._messages():
            full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full

    def distribute_like(self, full: Tensor, like: Tensor) -> Tensor:
        """This rank's shard of ``full``, laid out like the tensor ``like``; without messages."""
        if not is_sharded(like):
            return full
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
        shard: Tensor = distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)
        return shard

    def all_gather_object(self, value: Any) -> list[Any]:
        """A plain value of every rank, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._messages():
            dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The maximum of each number over ranks, in one message."""
        local = [int(number) for number in numbers]
        if self.size == 1:
            return local
        import torch.distributed as dist

        largest = torch.tensor(local)
        with self._messages():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return [int(number) for number in largest]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_reduce_max([0])

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Rank 0 does it and all ranks get its result. An error is raised on rank 0 and ends the other ranks too."""
        if self.size == 1:
            return action()
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, message = self.all_gather_object([result, str(failure) if failure else None])[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise OtherRankError(message)
        return result

    def check_equal_weights(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """ValueError unless all ranks hold the same replicated weights; equal updates then keep them equal."""
        if self.size == 1:
            return
        total = sum(float(one.detach().double().sum()) for one in tensors.values() if not is_sharded(one))
        sums = self.all_gather_object(total)
        if len(set(sums)) > 1:
            raise ValueError(
                f"the ranks start {what} from different weights (their sums are {sums[:4]}): every machine must read "
                "the same model files and the same run folder"
            )

    def shard(self, module: nn.Module, how: Sharding) -> None:
        """Shard a module in place with FSDP2: one unit per transformer block, the rest in one.

        Its parameters are new objects afterwards.
        """
        if how == "none" or self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self._mesh(next(module.parameters()).device.type, how)
        for unit in (*blocks_of(module), module):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # also the root: parameters() are always shards
        self._sharded.add(module)

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
    def training(self, timeout: float, last_checkpoint: Callable[[], str]) -> Iterator[None]:
        """Inside, a message that takes longer than ``timeout`` seconds ends the run with a RanksError.

        On GPUs torch's NCCL watchdog may abort the process first, with the same effect. ``last_checkpoint()`` says
        which checkpoint is intact, for the error.
        """
        if self.size == 1:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _set_pg_timeout  # as torchtitan does; it has no public name

        self.barrier()
        _set_pg_timeout(timedelta(seconds=timeout))
        try:
            yield
            self.barrier()  # no rank may exit while another still waits for it
        except (RanksError, dist.DistError) as error:
            raise RanksError(f"{_first_line(error)}. {last_checkpoint()}") from error

    @contextmanager
    def _messages(self) -> Iterator[None]:
        """Turn the failure of a message inside into a RanksError that names the ranks which do not answer."""
        try:
            yield
        except RuntimeError as error:  # gloo's errors have no class
            why = f"rank {self.rank} lost contact with another rank ({_first_line(error)})"
            raise RanksError(f"{why}{self._roll_call()}") from error

    def _roll_call(self) -> str:
        """Which ranks do not answer, as far as torch can tell; empty on all ranks but 0."""
        import torch.distributed as dist

        if self._control is None or not self.is_main:
            return ""
        try:
            dist.monitored_barrier(self._control, timedelta(seconds=ROLL_CALL_SECONDS), wait_all_ranks=True)
        except RuntimeError as error:
            if "monitoredBarrier" in str(error):  # it names ranks; otherwise the connection itself is lost
                return f"; {_first_line(error)}"
        return ""


SINGLE_PROCESS = DistributedContext()
"""A run of one process."""


_sessions = itertools.count()


@contextmanager
def session() -> Iterator[DistributedContext]:
    """The context of this process: alone, or joined with the others that torchrun (or SLURM) has started.

    A script may train several times: every rank opens the same sessions in the same order.
    """
    place = rank_info()
    if place.size == 1:
        yield DistributedContext(place)
        return
    import torch.distributed as dist

    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent(os.getppid())  # torchrun: ranks must not train on after it was killed
    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # the flight recorder: what hung,
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # written to /tmp/nccl_trace_rank_N
    timeout = timedelta(seconds=STARTUP_TIMEOUT)
    shared, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=timeout))
    own = f"attempt/{restart_count()}/session/{next(_sessions)}"  # else it finds addresses of an earlier one
    store = dist.PrefixStore(own, shared)
    dist.init_process_group(
        backend, store=store, timeout=timeout, device_id=device, rank=place.rank, world_size=place.size
    )
    yield DistributedContext(place, dist.new_group(backend="gloo", timeout=timeout))
    dist.destroy_process_group()  # not after an error: it would wait for messages that never come


def launch(arguments: Sequence[str], processes: int, restarts: int = 0, shutdown_timeout: float = 600.0) -> int:
    """Run ``torchrun --standalone --nproc-per-node N -m -- gdmd ARGUMENTS``; returns the exit code of the run.

    After a failure torchrun starts all ranks again, at most ``restarts`` times; they resume from the newest checkpoint.
    0, the code of the rank that failed first, or 128 + signal for a rank (or this process) that a signal ended.
    ``shutdown_timeout``: seconds between SIGTERM and SIGKILL, enough to save a checkpoint.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_devices(processes)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(round(shutdown_timeout)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun: else each of N processes uses all cores
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
            elastic_launch(config, sys.executable)(*module_arguments("gdmd"), *arguments)
        except ChildFailedError as error:
            return _exit_code(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _exit_code(failures: Mapping[int, Any]) -> int:
    """The exit code of the rank that failed first; a signal, which the rank could not report itself, is printed.

    The launcher's times are whole seconds, in which the other ranks lose contact or get its SIGTERM: those come after.
    """
    after = (RANK_LOST, -signal.SIGTERM, 128 + signal.SIGTERM)
    rank = min(failures, key=lambda rank: (failures[rank].exitcode in after, failures[rank].timestamp))
    code: int = failures[rank].exitcode
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"error: rank {rank} (process {failures[rank].pid}) was ended by {name}; the others stopped", file=sys.stderr)
    if -code == signal.SIGABRT:  # torch reports an NCCL timeout, then aborts the process
        return RANK_LOST
    return 128 - code


def _check_devices(processes: int) -> None:
    found = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > found:
        raise ValueError(f"--gpus {processes}: this machine has {found} GPU(s); give at most {found}")
    if not torch.cuda.is_available():
        print(f"no GPU was found: {processes} processes on the CPU", file=sys.stderr)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Inside, torchrun's own log is off: what failed is reported in one line."""
    import logging

    log = logging.getLogger("torch.distributed.elastic")
    before, log.level = log.level, logging.CRITICAL
    try:
        yield
    finally:
        log.setLevel(before)


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 shards it. Does not import DTensor, which takes a second, unless something was sharded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one dtype with at most BUCKET numbers; a larger one is alone."""
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


def _first_line(error: Exception) -> str:
    """The first sentence, without the location in torch's source that gloo puts before it."""
    line = re.sub(r"^\[\S+\.cc:\d+\] ", "", str(error).splitlines()[0])
    return line.split(". ")[0][:300]
