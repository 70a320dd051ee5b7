"""The 8-bit optimizer: steps near AdamW's, exact restore from plain tensors, its bytes, and the absent library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.programs.train import prepare
from gdmd.training.adamw8bit import moment_bytes, quantized
from gdmd.training.optimizer import RoleOptimizer

absent = importlib.util.find_spec("torchao") is None
with_torchao = pytest.mark.skipif(absent, reason="needs gdmd[8bit]")
SHAPES = {"down.weight": (64, 128), "up.weight": (96, 64), "bias": (10,), "odd.weight": (65, 67)}


@pytest.fixture
def eager() -> Iterator[None]:
    """The library compiles its step, which takes longer than all of these tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def named(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def copied(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: Parameter(value.detach().clone()) for name, value in parameters.items()}


def step(optimizer: RoleOptimizer, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step(optimizer.grad_norm(), factor)


@with_torchao
def test_steps_are_close_to_adamw(eager: None) -> None:
    plain, small = named(), named()
    optimizers = RoleOptimizer(plain, 1e-2), RoleOptimizer(small, 1e-2, kind="adamw8bit")
    for optimizer in optimizers:
        for seed in range(4):
            step(optimizer, seed, factor=0.5)
    start = named()
    for name in SHAPES:
        gone, error = (plain[name] - start[name]).norm(), (small[name] - plain[name]).norm()
        assert small[name].dtype == torch.float32 and 0 <= error < 0.05 * gone
        assert (error < 1e-5 * gone) == (name in ("bias", "odd.weight"))  # too small, or no whole blocks: fp32


@with_torchao
def test_restored_state_is_bit_exact(eager: None, tmp_path: Path) -> None:
    parameters = named()
    first = RoleOptimizer(parameters, 1e-2, kind="adamw8bit")
    for seed in (1, 2):
        step(first, seed)
    tensors = first.tensors()
    assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}
    assert tensors["exp_avg.codes/down.weight"].dtype == torch.uint8
    assert tensors["exp_avg_sq.scale/down.weight"].shape == (64 * 128 // 256,)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "optim.safetensors")
    second = RoleOptimizer(copied(parameters), 1e-2, kind="adamw8bit")
    second.load(load_file(tmp_path / "optim.safetensors"))
    fresh = RoleOptimizer(copied(parameters), 1e-2, kind="adamw8bit")
    for optimizer in (first, second, fresh):
        step(optimizer, 3)
    for name, weights in parameters.items():
        assert torch.equal(second.parameters[name], weights)
        assert not torch.equal(fresh.parameters[name], weights)
    again, wanted = second.tensors(), first.tensors()
    assert again.keys() == wanted.keys() and all(torch.equal(again[key], wanted[key]) for key in wanted)


@with_torchao
def test_state_of_the_other_optimizer(eager: None) -> None:
    plain, small = RoleOptimizer(named(), 1e-2), RoleOptimizer(named(), 1e-2, kind="adamw8bit")
    for optimizer in (plain, small):
        step(optimizer, 1)
    for optimizer, other in ((plain, small), (small, plain)):
        with pytest.raises(ValueError, match=r"has an unknown name.*loop.optimizer as it was"):
            optimizer.load(other.tensors())


@with_torchao
def test_planned_bytes_equal_those_of_the_optimizer(eager: None) -> None:
    optimizer = RoleOptimizer(named(), 1e-2, kind="adamw8bit")
    step(optimizer, 1)
    for name, parameter in optimizer.parameters.items():
        state = optimizer._adamw.state[parameter]
        held = [state["exp_avg"], state["exp_avg_sq"]]
        tensors = [t for one in held for t in ((one.codes, one.scale, one.qmap) if hasattr(one, "codes") else (one,))]
        assert sum(t.numel() * t.element_size() for t in tensors) == moment_bytes(parameter.numel()), name


def test_only_large_parameters_in_whole_blocks_are_quantized() -> None:
    assert [quantized(n) for n in (256, 4095, 4096, 4097, 64 * 1280)] == [False, False, True, False, True]
    assert moment_bytes(10) == 80
    assert moment_bytes(2**20) == 2 * (2**20 + 2**20 // 64 + 1024)


def test_missing_library_is_an_error_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("gdmd.training.adamw8bit.find_spec", lambda name: None if name == "torchao" else find(name))
    monkeypatch.setattr("gdmd.programs.train.build", lambda *given: pytest.fail("something was loaded"))
    cfg = RunConfig(name="shapes", loop=LoopConfig(optimizer="adamw8bit"))
    with pytest.raises(ValueError, match=r"needs torchao.*pip install -e '\.\[8bit\]'.*loop.optimizer = adamw"):
        prepare(cfg)
    with pytest.raises(ValueError, match="needs torchao"):
        RoleOptimizer(named(), 1e-2, kind="adamw8bit")


def test_8_bit_state_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match="optimizer = adamw8bit and sharding = full.*cannot be sharded"):
        LoopConfig(optimizer="adamw8bit", sharding="full")
