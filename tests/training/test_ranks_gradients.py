"""Gradients of two ranks: the same messages whatever a rank's loss used, and one reduction per update."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import SIZE, ToyDenoiser

from gdmd.training.distributed import SINGLE, World
from gdmd.training.optimizer import RoleOptimizer
from gdmd.training.role_state import RoleState
from gdmd.types import Loss, Update

BATCH = 8
MICRO = (0, 2, 1)


class Messages(TorchDispatchMode):
    """Collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        if operation.namespace == "c10d":
            self.count[operation._opname] += 1
        return operation(*given, **(named or {}))


def state_of(parameters: dict[str, Parameter], world: World, micro_batch: int = 0) -> RoleState:
    optimizer = RoleOptimizer(parameters, lr=0.1, weight_decay=0.5, world=world)
    return RoleState("student", parameters, optimizer, None, micro_batch, world=world)


# ---------------------------------------------------------------- a parameter that not every sample uses


def named() -> dict[str, Parameter]:
    """``late`` has a gradient on rank 1 alone, ``never`` on none, in buckets of one and of another dtype."""
    values = {"always": torch.ones(3), "late": torch.ones(2), "never": torch.ones(4), "wide": torch.ones(2).double()}
    return {name: Parameter(value) for name, value in values.items()}


def partly(parameters: dict[str, Parameter]) -> Any:
    def loss(sample: Tensor) -> Loss:
        found = sample * parameters["always"].sum()
        late = sample >= BATCH / 2  # the samples of rank 1
        if late.any():
            found = found + torch.where(late, sample * parameters["late"].prod() + parameters["wide"].sum().float(), 0)
        return Loss(found)

    return loss


def gradients(parameters: dict[str, Parameter], world: World) -> dict[str, list[float] | None]:
    own = torch.arange(BATCH, dtype=torch.float32)[slice(*world.span(BATCH))]
    partly(parameters)(own).per_sample.mean().backward()
    state_of(parameters, world).optimizer.average()
    return {name: None if one.grad is None else one.grad.tolist() for name, one in parameters.items()}


def test_a_parameter_that_one_rank_does_not_use_gets_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    def work(world: World) -> None:
        found = gradients(named(), world)
        parameters = named()
        own = torch.arange(BATCH, dtype=torch.float32)[slice(*world.span(BATCH))]
        for _ in range(3):
            state_of(parameters, world).apply(Update("student", partly(parameters), own))
        told = {
            "gradients": found,
            "weights": {name: one.tolist() for name, one in parameters.items()},
            "n": world.calls,
        }
        (tmp_path / f"{world.seat.rank}.json").write_text(json.dumps(told))

    assert [end.code for end in run_ranks(work, tmp_path, seconds=60)] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = named()
    whole = gradients(alone, SINGLE)
    assert whole["never"] is None and whole["late"] == [22 / 8] * 2 and whole["wide"] == [0.5] * 2
    assert first == second and first["gradients"] == whole  # small whole numbers: exact on every processor
    assert first["weights"]["never"] == [1.0] * 4  # not even decayed, as without ranks


# ---------------------------------------------------------------- micro-batches of sharded weights


def sharded(world: World, micro_batch: int) -> dict[str, Any]:
    """Messages of one update in which FSDP2 cuts the network, and its weights afterwards."""
    net = ToyDenoiser(1)
    if world.size > 1:
        world.shard(net, "full")
    state = state_of(dict(net.named_parameters()), world, micro_batch)
    x = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(0))[slice(*world.span(BATCH))]
    with Messages() as seen:
        stats = state.apply(Update("student", lambda x: Loss(net(x, x[:, 0], {}).x0.square().mean(1)), x))
    return {"scattered": seen.count["_reduce_scatter_base_"], "norm": float(stats["grad_norm/student"])}


def test_sharded_gradients_are_reduced_once_per_update_however_many_micro_batches(tmp_path: Path) -> None:
    def work(world: World) -> None:
        (tmp_path / f"{world.seat.rank}.json").write_text(json.dumps([sharded(world, micro) for micro in MICRO]))

    assert [end.code for end in run_ranks(work, tmp_path, seconds=60)] == [0, 0]
    wanted = sharded(SINGLE, 0)["norm"]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found[0]["scattered"] > 0 and {one["scattered"] for one in found} == {found[0]["scattered"]}
        assert [one["norm"] for one in found] == pytest.approx([wanted] * len(MICRO), rel=1e-5)
