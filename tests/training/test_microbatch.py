"""8 micro-batches == 1, and what an update may and may not do to a role."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from toy_training import ToyRoles, toy_config

from gdmd.diffusion.batches import batch_size, split
from gdmd.training.optimizer import RoleOptimizer
from gdmd.training.role_state import NonFiniteError, RoleState, ema_weights, role_states
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class Inner:
    target: Tensor  # [B, 3]


@dataclass(frozen=True)
class Batch:
    x: Tensor  # [B, 3]
    nested: dict[str, tuple[Inner, Tensor]]
    prompts: PromptBatch
    scale: Tensor  # 0-d, of all samples
    name: str = "all"


def make_batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    index = torch.arange(count)
    prompts = PromptBatch(index, tuple(f"prompt {i}" for i in range(count)), index, {"c": x}, {"c": -x})
    return Batch(x, {"inner": (Inner(target), index.double())}, prompts, torch.tensor(2.0).double())


def make_state(micro_batch: int, **settings: object) -> RoleState:
    parameters = {"w": Parameter(torch.eye(3, dtype=torch.float64))}
    return RoleState("student", parameters, RoleOptimizer(parameters, 0.1, clip=1.0), None, micro_batch, **settings)


def loss_of(state: RoleState):  # noqa: ANN201
    def loss(batch: Batch) -> Loss:
        inner, weight = batch.nested["inner"]
        assert len(batch.x) == len(inner.target) == len(weight) == len(batch.prompts.text) == len(batch.prompts.index)
        assert batch.prompts.text == tuple(f"prompt {i}" for i in batch.prompts.index.tolist())
        error = batch.x @ state.parameters["w"] + batch.prompts.cond["c"] - inner.target
        per_sample = batch.scale * (1 + weight) * error.square().mean(1)
        return Loss(per_sample, {"place/index": weight, "place/size": error.detach().abs().mean(1)})

    return loss


def apply(micro_batch: int, count: int = 8) -> tuple[RoleState, dict[str, Tensor]]:
    state = make_state(micro_batch)
    stats: dict[str, Tensor] = {}
    for _ in range(3):
        stats = state.apply(Update("student", loss_of(state), make_batch(count)))
    return state, stats


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 3])
def test_micro_batches_equal_the_whole_batch(micro_batch: int) -> None:
    whole, whole_stats = apply(0)
    parts, parts_stats = apply(micro_batch)
    assert torch.allclose(whole.parameters["w"], parts.parameters["w"], rtol=0, atol=1e-12)
    assert whole_stats.keys() == parts_stats.keys() == {
        "loss/student", "grad_norm/student", "place/index", "place/size"
    }  # fmt: skip
    for key, value in whole_stats.items():
        assert value.shape == parts_stats[key].shape
        assert torch.allclose(value, parts_stats[key], rtol=0, atol=1e-10)
    assert parts_stats["place/index"].tolist() == list(range(8))


def test_metadata_with_tensors_is_cut_by_sample() -> None:
    """Rows of a dataset in torch's format hold tensors; each row stays with its sample, whatever it holds."""
    rows = tuple({"prompt": f"prompt {i}", "label": torch.tensor(i), "box": torch.arange(i + 1)} for i in range(5))
    prompts = replace(make_batch(5).prompts, meta=rows)
    parts = [part for _, part in split((torch.zeros(5, 3), prompts), 2)]
    assert [[int(row["label"]) for row in part.meta] for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[1].meta[1] is rows[3]


def test_gradient_of_the_mean() -> None:
    state, batch = make_state(2), make_batch(8)
    loss = loss_of(state)(batch).per_sample.mean()
    expected = torch.autograd.grad(loss, state.parameters["w"])[0].norm()
    stats = state.apply(Update("student", loss_of(state), batch))
    assert torch.allclose(stats["grad_norm/student"], expected)


def test_split_follows_nested_batches() -> None:
    batch = make_batch(8)
    parts = list(split(batch, 3))
    assert [batch_size(part) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.prompts.uncond["c"] for part in parts]), batch.prompts.uncond["c"])
    assert sum((part.prompts.text for part in parts), ()) == batch.prompts.text
    assert all(part.scale is batch.scale and part.name == "all" and part.prompts.meta == () for part in parts)


def test_tensor_without_sample_dimension() -> None:
    with pytest.raises(AssertionError, match=r"a tensor \(5, 3\) in a batch of 8"):
        list(split({"x": torch.zeros(8, 3), "y": torch.zeros(5, 3)}, 2))


def test_leftover_gradients_do_not_count() -> None:
    clean, dirty = make_state(0), make_state(0)
    dirty.parameters["w"].grad = torch.full((3, 3), 100.0, dtype=torch.float64)
    for state in (clean, dirty):
        state.apply(Update("student", loss_of(state), make_batch(8)))
    assert torch.equal(clean.parameters["w"], dirty.parameters["w"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_loss_changes_nothing(bad: float, skip: bool) -> None:
    state = make_state(2, skip_nonfinite=skip)
    state.apply(Update("student", loss_of(state), make_batch(8)))
    before = {key: value.clone() for part in state.tensors().values() for key, value in part.items()}
    good = loss_of(state)

    def poisoned(batch: Batch) -> Loss:
        hit = torch.where(batch.prompts.index == 5, bad, 1.0)
        return Loss(good(batch).per_sample * hit)

    if skip:
        assert state.apply(Update("student", poisoned, make_batch(8))) == {}
    else:
        with pytest.raises(NonFiniteError) as caught:
            state.apply(Update("student", poisoned, make_batch(8)))
        assert (caught.value.role, caught.value.positions) == ("student", (5,))
    after = {key: value for part in state.tensors().values() for key, value in part.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (state.updates, state.skipped) == (1, 1)


def test_nonfinite_gradient_of_a_finite_loss() -> None:
    state = make_state(0)

    def loss(batch: Batch) -> Loss:
        return Loss((batch.x @ state.parameters["w"] * 0).abs().sum(1).sqrt())

    with pytest.raises(NonFiniteError, match="gradient norm"):
        state.apply(Update("student", loss, make_batch(4)))


def test_ema_follows_student_updates() -> None:
    states = role_states(ToyRoles(), toy_config(ema=0.5))
    student, fake = states["student"], states["fake"]
    assert fake.ema is None and student.ema is not None
    name, weight = next(iter(student.parameters.items()))
    start = weight.detach().clone()
    student.apply(Update("student", lambda x: Loss((x @ weight.T).square().mean(1)), torch.ones(4, 6)))
    assert torch.allclose(student.ema.shadow[name], (start + weight) / 2)
    trained = weight.detach().clone()
    with ema_weights(student):
        assert torch.equal(weight, student.ema.shadow[name])
    assert torch.equal(weight, trained)
    with ema_weights(fake):
        pass
    assert role_states(ToyRoles(), toy_config(ema=0.0))["student"].ema is None
