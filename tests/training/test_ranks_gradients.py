"""Gradients of two ranks: the same messages whatever a rank's loss used, and one reduction per update."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import SIZE, ToyDenoiser

from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.optimizer import RoleOptimizer
from gdmd.training.role_state import RoleState
from gdmd.types import Loss, Update

BATCH = 8
MICRO = (0, 2, 1)


class Messages(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        if operation.namespace == "c10d":
            self.count[operation._opname] += 1
        return operation(*given, **(named or {}))


def state_of(parameters: dict[str, Parameter], context: DistributedContext, micro_batch: int = 0) -> RoleState:
    optimizer = RoleOptimizer(parameters, lr=0.1, weight_decay=0.5, context=context)
    return RoleState("student", parameters, optimizer, None, micro_batch, context=context)


def partly_used() -> dict[str, Parameter]:
    """``late`` has a gradient on rank 1 alone, ``never`` on none, in buckets of one and of another dtype."""
    values = {"always": torch.ones(3), "late": torch.ones(2), "never": torch.ones(4), "wide": torch.ones(2).double()}
    return {name: Parameter(value) for name, value in values.items()}


def loss_of(parameters: dict[str, Parameter]) -> Any:
    def loss(sample: Tensor) -> Loss:
        found = sample * parameters["always"].sum()
        late = sample >= BATCH / 2  # the samples of rank 1
        if late.any():
            found = found + torch.where(late, sample * parameters["late"].prod() + parameters["wide"].sum().float(), 0)
        return Loss(found)

    return loss


def local(context: DistributedContext) -> Tensor:
    return torch.arange(BATCH, dtype=torch.float32)[slice(*context.local_slice(BATCH))]


def gradients(parameters: dict[str, Parameter], context: DistributedContext) -> dict[str, list[float] | None]:
    loss_of(parameters)(local(context)).per_sample.mean().backward()
    state_of(parameters, context).optimizer.average_gradients()
    return {name: None if one.grad is None else one.grad.tolist() for name, one in parameters.items()}


def sharded(context: DistributedContext, micro_batch: int) -> dict[str, Any]:
    """Messages of one update of a network that FSDP2 shards, and the norm of its gradient."""
    net = ToyDenoiser(1)
    if context.size > 1:
        context.shard(net, "full")
    state = state_of(dict(net.named_parameters()), context, micro_batch)
    x = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(0))[slice(*context.local_slice(BATCH))]
    with Messages() as seen:
        stats = state.apply(Update("student", lambda x: Loss(net(x, x[:, 0], {}).x0.square().mean(1)), x))
    return {"scattered": seen.count["_reduce_scatter_base_"], "norm": float(stats["grad_norm/student"])}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    root = tmp_path_factory.mktemp("gradients")

    def work(context: DistributedContext) -> None:
        parameters = partly_used()
        with Messages() as seen:
            for _ in range(3):
                state_of(parameters, context).apply(Update("student", loss_of(parameters), local(context)))
        found = {
            "gradients": gradients(partly_used(), context),
            "weights": {name: one.tolist() for name, one in parameters.items()},
            "messages": dict(seen.count),
            "sharded": [sharded(context, micro) for micro in MICRO],
        }
        (root / f"{context.rank}.json").write_text(json.dumps(found))

    assert [end.code for end in run_ranks(work, root, seconds=60)] == [0, 0]
    return [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_partly_used_parameters(ranks: list[dict[str, Any]]) -> None:
    """A parameter that one rank does not use gets the gradient of the global batch, with the same messages."""
    expected = gradients(partly_used(), SINGLE_PROCESS)
    assert expected["never"] is None and expected["late"] == [22 / 8] * 2 and expected["wide"] == [0.5] * 2
    for key in ("gradients", "weights", "messages"):
        assert ranks[0][key] == ranks[1][key], key
    assert ranks[0]["gradients"] == expected  # small whole numbers: exact on every processor
    assert ranks[0]["weights"]["never"] == [1.0] * 4  # not even decayed, as without ranks


def test_sharded_gradients_are_reduced_once_per_update(ranks: list[dict[str, Any]]) -> None:
    """However many micro-batches there are."""
    expected = sharded(SINGLE_PROCESS, 0)["norm"]
    for rank in ranks:
        found = rank["sharded"]
        assert found[0]["scattered"] > 0 and {one["scattered"] for one in found} == {found[0]["scattered"]}
        assert [one["norm"] for one in found] == pytest.approx([expected] * len(MICRO), rel=1e-5)
