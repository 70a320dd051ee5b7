"""AdamW steps, clipping, learning-rate schedules, exact restore; the statistics of many updates."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from gdmd.training.metrics import Means
from gdmd.training.optimizer import RoleOptimizer, lr_factor


def named(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(4, generator=generator, dtype=torch.float64)) for name in ("w", "b.bias")}


def give_gradients(parameters: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(4, generator=generator, dtype=torch.float64)


def step(optimizer: RoleOptimizer, seed: int, factor: float = 1.0) -> None:
    give_gradients(optimizer.parameters, seed)
    optimizer.step(optimizer.grad_norm(), factor)


def test_step_equals_adamw_by_hand() -> None:
    parameters = named()
    optimizer = RoleOptimizer(parameters, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    x, m, v = parameters["w"].detach().clone(), torch.zeros(4).double(), torch.zeros(4).double()
    for n in (1, 2, 3):
        step(optimizer, n, factor=0.5)
        g = parameters["w"].grad
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x - 0.05 * 0.2 * x - 0.05 * (m / (1 - 0.9**n)) / ((v / (1 - 0.99**n)).sqrt() + 1e-8)
    assert torch.allclose(parameters["w"], x, rtol=0, atol=1e-12)


def test_clipping_scales_gradients_to_the_limit() -> None:
    parameters = named()
    optimizer = RoleOptimizer(parameters, lr=0.0, clip=0.5)
    give_gradients(parameters, 1)
    gradients = torch.cat([parameter.grad for parameter in parameters.values()])
    norm = optimizer.grad_norm()
    assert norm.item() == pytest.approx(gradients.norm().item())
    optimizer.step(norm)
    clipped = torch.cat([parameter.grad for parameter in parameters.values()])
    assert torch.allclose(clipped, gradients * 0.5 / (norm + 1e-6))


@pytest.mark.parametrize("clip", [0.0, 1e6])
def test_gradients_within_the_limit_are_unchanged(clip: float) -> None:
    parameters = named()
    optimizer = RoleOptimizer(parameters, lr=0.0, clip=clip)
    give_gradients(parameters, 1)
    before = parameters["w"].grad.clone()
    optimizer.step(optimizer.grad_norm())
    assert torch.equal(parameters["w"].grad, before)


def test_restored_optimizer_is_bit_exact() -> None:
    first_parameters = named()
    first = RoleOptimizer(first_parameters, 0.1, clip=1.0)
    for seed in (1, 2):
        step(first, seed)
    second_parameters = {name: Parameter(value.detach().clone()) for name, value in first_parameters.items()}
    second = RoleOptimizer(second_parameters, 0.1, clip=1.0)
    second.load({key: tensor.clone() for key, tensor in first.tensors().items()})
    fresh_parameters = {name: Parameter(value.detach().clone()) for name, value in first_parameters.items()}
    fresh = RoleOptimizer(fresh_parameters, 0.1, clip=1.0)
    for optimizer in (first, second, fresh):
        step(optimizer, 3)
    assert all(torch.equal(first_parameters[name], second_parameters[name]) for name in first_parameters)
    assert not torch.equal(first_parameters["w"], fresh_parameters["w"])


def test_restored_state_is_a_copy() -> None:
    optimizer = RoleOptimizer(named(), 0.1)
    step(optimizer, 1)
    saved = {key: tensor.clone() for key, tensor in optimizer.tensors().items()}
    other = RoleOptimizer(named(), 0.1)
    other.load(saved)
    step(other, 2)
    assert all(torch.equal(saved[key], tensor) for key, tensor in optimizer.tensors().items())


def test_state_is_named_by_moment_and_parameter() -> None:
    optimizer = RoleOptimizer(named(), 0.1)
    assert optimizer.tensors() == {}
    step(optimizer, 1)
    assert set(optimizer.tensors()) == {
        f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq", "step") for name in ("w", "b.bias")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg/other": torch.zeros(4)}, "exp_avg/other has an unknown name"),
        ({"exp_avg/w": torch.zeros(5)}, r"exp_avg/w has shape \(5,\)"),
        ({"exp_avg/w": None}, "state of w has"),
    ],
)
def test_state_of_other_parameters(change: dict, message: str) -> None:
    optimizer = RoleOptimizer(named(), 0.1)
    step(optimizer, 1)
    saved = {key: tensor for key, tensor in (optimizer.tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        RoleOptimizer(named(), 0.1).load(saved)


def test_invalid_parameters() -> None:
    with pytest.raises(ValueError, match="w is torch.bfloat16.*fp32"):
        RoleOptimizer({"w": Parameter(torch.zeros(1, dtype=torch.bfloat16))}, 0.1)
    with pytest.raises(ValueError, match="no parameters"):
        RoleOptimizer({}, 0.1)


def test_lr_schedules() -> None:
    assert lr_factor("constant", 0.99, 100, 0) == 1
    assert [lr_factor("linear", p, 100, 0) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert lr_factor("cosine", 0.0, 100, 0) == 1
    assert lr_factor("cosine", 1 / 3, 100, 0) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert lr_factor("cosine", 1.0, 100, 0) == pytest.approx(0)


def test_lr_warmup() -> None:
    assert [lr_factor("constant", 0.0, n, 4) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert lr_factor("linear", 0.5, 0, 4) == 0.125


def test_means_leave_out_nan() -> None:
    means = Means()
    means.add({"reward/sample": torch.tensor([1.0, float("nan"), 3.0]), "loss/student": torch.tensor(2.0)})
    means.add({"reward/sample": torch.tensor([5.0]), "loss/student": torch.tensor(4.0)})
    assert means.read() == {"reward/sample": 3.0, "loss/student": 3.0}
    assert means.read() == {}
    means.add({"reward/sample": torch.tensor([float("nan")])})
    assert math.isnan(means.read()["reward/sample"])


def test_means_hold_no_graph() -> None:
    means, weight = Means(), Parameter(torch.ones(2))
    means.add({"loss/student": weight * 2})
    assert not means._parts["loss/student"][0].requires_grad
