"""What holds for every method: equality with DMD at weight 0, gradients, micro-batches, precision, resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_roles import (
    TEXTS,
    Toy,
    ToyCodec,
    apply,
    distance,
    dmd,
    grouped,
    make,
    rng,
    same,
    student_gradient,
    tiny_roles,
    train,
    updates,
    weights,
)
from torch import Tensor

from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.batches import cut
from gdmd.losses.dmd import dmd_loss
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.shapes.roles import ShapesRoles, ShapesTextEncoder
from gdmd.training.loop import train as loop
from gdmd.types import PromptBatch, Reward, Update

FEW = {"fake_updates": 2}
GROUPED = {"fake_updates": 2, "student_updates": 2, "images_per_prompt": 4}
STAGE_2 = {"fake_updates": 2, "cold_start": 1, "anneal": 2, "images_per_prompt": 4}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd": ("dmd", {"fake_updates": 3, "student_updates": 2, "step_draw": "batch", "fake_loss": "x0"}),
    "dmd pairs": ("dmd", FEW | {"regression_weight": 0.25, "regression_steps": 2, "regression_batches": 2}),
    "dmd2": ("dmd2", FEW | {"gan_weight": 0.5, "head_weight": 0.5}),
    "dmdr refl": ("dmdr", {"fake_updates": 2, "cold_start": 1, "anneal": 2, "margin": 2.0}),
    "dmdr grpo": ("dmdr", STAGE_2 | {"strategy": "grpo"}),
    "dmdr dpo": ("dmdr", STAGE_2 | {"strategy": "dpo"}),
    "refl": ("dmd_refl", {"fake_updates": 3, "student_updates": 2}),
    "nft": ("dmd_nft", GROUPED),
    "grpo": ("dmd_grpo", GROUPED),
    "gdmd": ("gdmd", {"group_size": 2}),
    "gdmd t": ("gdmd", {"group_size": 2, "collection": "t", "scored_step": 1.0, "old_policy": "ema"}),
    "gdmd derivative": ("gdmd", {"group_size": 2, "scored_step": 0.0}),
    "constant": ("gdmd_ablation", {"group_size": 2, "control": "constant"}),
    "shuffled": ("gdmd_ablation", {"group_size": 2, "control": "shuffled"}),
    "indicator": ("gdmd_ablation", {"group_size": 2, "control": "indicator"}),
    "tilted": ("gdmd_tilted", {"group_size": 2, "continuations": 2}),
    "tilted gradient": ("gdmd_tilted", {"group_size": 2, "continuations": 2, "reward_gradient": 0.2}),
    "tilted ode": ("gdmd_tilted", {"group_size": 2, "continuations": 2, "student_sampler": "ode"}),
    "tilted shuffled": ("gdmd_tilted_shuffled", {"group_size": 2, "continuations": 2, "reward_gradient": 0.2}),
}
REWARDED = [name for name, (kind, _) in METHODS.items() if kind not in ("dmd", "dmd2")]
UNITLESS = [name for name in REWARDED if name not in ("refl", "dmdr refl", "dmdr dpo", "dmdr grpo")]
"""Methods without a margin or a tilt in the units of the reward."""
ADDED = ("nft", "grpo")
"""Methods that add the rewards first."""
OFF: dict[str, dict[str, Any]] = {
    "gdmd": {"gamma": 0.0, "group_size": 3},
    "gdmd_tilted": {"gamma": 0.0, "group_size": 3, "reward_gradient": 0.1},
    "dmd_refl": {"rl_weight": 0.0, "fake_updates": 3, "student_updates": 3},
    "dmd_nft": {"rl_weight": 0.0, "fake_updates": 3, "student_updates": 3},
    "dmd_grpo": {"rl_weight": 0.0, "fake_updates": 3, "student_updates": 3},
    "dmd2": {"gan_weight": 0.0, "fake_updates": 3},
    "dmdr": {"tilt": 0.0, "anneal": 0, "rl_weight": 0.0, "renoise_x0": False, "fake_updates": 3},
}


def world(name: str, *rewards: Reward, codec: ToyCodec | None = None, **options: Any) -> tuple[Any, ShapesRoles]:
    """Fresh tiny networks and the method on them."""
    kind, own = METHODS[name]
    roles = tiny_roles(head=kind == "dmd2")
    return make(kind, roles, *rewards, codec=codec, **own | options), roles


def plain_dmd(kind: str, **own: Any) -> tuple[Any, ShapesRoles]:
    """DMD with the same update ratio and fake-score batches, on fresh networks."""
    ratio = own.get("group_size") or own.get("student_updates", 1)
    samples = "shared" if kind.startswith("gdmd") else "fresh"
    roles = tiny_roles()
    counts = {"fake_updates": own.get("fake_updates", ratio), "student_updates": ratio}
    return dmd(roles, fake_samples=samples, **counts), roles


def steps(name: str) -> range:
    """Iterations that show every stage."""
    return range(2) if name.startswith("dmdr") else range(1)


@pytest.mark.parametrize("kind", OFF)
def test_weight_zero_is_dmd_bit_for_bit(kind: str) -> None:
    """The update ratio is the same, and nothing is decoded or scored."""
    options, codec = OFF[kind], ToyCodec()
    second, plain = tiny_roles(), train(*plain_dmd(kind, **options))
    assert same(train(make(kind, second, codec=codec, **options), second), plain)
    assert not codec.shown
    assert distance(plain, weights(tiny_roles())) > 1e-4  # something was learned


@pytest.mark.parametrize("name", [name for name, (kind, _) in METHODS.items() if kind != "dmd"])
def test_default_weight_is_not_dmd(name: str) -> None:
    kind, own = METHODS[name]
    found = train(*world(name), 2, batch=grouped())
    plain = train(*plain_dmd(kind, **own), 2, batch=grouped())
    assert distance({key: found[key] for key in plain}, plain) > 1e-6


@pytest.mark.parametrize("name", [name for name in REWARDED if name != "shuffled"])
def test_unscored_sample_takes_plain_dmd_steps(name: str) -> None:
    """NaN of one reward of two: L_DMD alone, and the statistics count it."""
    method, roles = world(name, Toy(), Toy("other", 1, unscored=(2,)))
    for step in steps(name):
        for update in updates(method, roles, step, "student", grouped()):
            batch = update.batch
            plain = dmd_loss(roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)
            loss = update.loss(batch).per_sample
            assert loss.isfinite().all() and student_gradient(update, roles).isfinite().all()
            if name != "dmdr dpo":  # its pair is that of the group, whoever looks at it
                assert loss[2] == plain[2]
    if "reward/unscored" in method.stats():
        assert method.stats()["reward/unscored"].float().mean().item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    "name", [name for name in REWARDED if name.split()[0] not in ("dmdr", "tilted") and name != "gdmd t"]
)
def test_no_scored_sample_is_dmd(name: str) -> None:
    method, roles = world(name, Toy(unscored=tuple(range(8))))
    kind, own = METHODS[name]
    plain = train(*plain_dmd(kind, **own), 2, batch=grouped())
    assert same(train(method, roles, 2, batch=grouped()), plain)


@pytest.mark.parametrize("name", UNITLESS)
def test_rewards_in_other_units_change_nothing(name: str) -> None:
    """R -> p R + q with p > 0; one p for all rewards where these are added before they are normalized."""
    method, roles = world(name, Toy(), Toy("b", 1))
    factor = 40.0 if name in ADDED else 0.2
    other, others = world(name, Toy(factor=40.0, offset=-3.0), Toy("b", 1, factor=factor, offset=0.5))
    plain = train(method, roles, batch=grouped())
    assert distance(train(other, others, batch=grouped()), plain) < 5e-5


def networks(roles: ShapesRoles) -> dict[str, list[Tensor]]:
    """Every parameter by network, all asking for gradients so that a leak would show."""
    found = {name: list(getattr(roles, name).net.parameters()) for name in ("student", "fake", "teacher", "old")}
    for parameters in found.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_their_own_role_only(name: str) -> None:
    """No gradient reaches teacher, old policy, decoder or reward, and batches hold no graph."""
    codec, reward = ToyCodec(), Toy()
    method, roles = world(name, reward, codec=codec)
    found = networks(roles)
    for step in steps(name):
        for update in updates(method, roles, step, batch=grouped()):
            assert not any(value.requires_grad for value in tensors(update.batch))
            update.loss(update.batch).per_sample.mean().backward()
            reached = {name for name, own in found.items() if any(p.grad is not None for p in own)}
            assert reached == {update.role}
            assert all(p.grad is not None and p.grad.isfinite().all() for p in found[update.role])
            assert codec.gain.grad is None and reward.gain.grad is None
            for parameter in roles.parameters(update.role).values():
                parameter.grad = None


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a batch."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PromptBatch):
        return []
    parts = value.values() if isinstance(value, Mapping) else vars(value).values()
    return [found for part in parts for found in tensors(part)]


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_one_deterministic_number_per_sample(name: str) -> None:
    """It may be computed in micro-batches and uses no global randomness."""
    method, roles = world(name, Toy(unscored=(1,)))
    for step in steps(name):
        for update in updates(method, roles, step, batch=grouped()):
            before = torch.random.get_rng_state()
            whole = update.loss(update.batch)
            assert torch.equal(update.loss(update.batch).per_sample, whole.per_sample)
            assert torch.equal(torch.random.get_rng_state(), before)
            assert whole.per_sample.shape == (8,) and whole.per_sample.dtype is torch.float32
            parts = [update.loss(cut(update.batch, k, k + 1, 8)) for k in range(8)]
            own = torch.cat([part.per_sample for part in parts])
            torch.testing.assert_close(own, whole.per_sample, rtol=1e-4, atol=1e-6)
            for key, value in whole.stats.items():
                assert value.shape == (8,) and not value.requires_grad
                stat = torch.cat([part.stats[key] for part in parts])
                torch.testing.assert_close(stat, value, rtol=1e-4, atol=1e-6, equal_nan=True)
            if update.role == "student":
                cuts = [Update("student", update.loss, cut(update.batch, k, k + 1, 8)) for k in range(8)]
                mean = torch.stack([student_gradient(part, roles) for part in cuts]).mean(0)
                torch.testing.assert_close(mean, student_gradient(update, roles), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_arithmetic_ignores_autocast(name: str) -> None:
    """Targets, weights, losses, decoder and rewards are fp32; only networks compute in bf16, and here they do not."""
    found = []
    for around in (False, True):
        method, roles = world(name, Toy(unscored=(2,)), Toy("green", 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for step in range(2):
                for update in method.iteration(step, grouped(), rng(step, grouped())):
                    loss = update.loss(update.batch)
                    with torch.autocast("cpu", enabled=False):  # the loop's backward pass has none
                        apply(Update(update.role, lambda batch, loss=loss: loss, update.batch), roles)
        found.append(weights(roles))
    assert same(*found)


def run(name: str, folder: Path, steps: int) -> None:
    """Train to ``steps`` iterations with teacher prompts, resuming the folder's run if there is one."""
    method, roles = world(name)
    cfg = LoopConfig(steps=steps, batch_size=8, lr_student=1e-3, lr_fake=1e-3, log_every=1, threads=1, seed=1)
    opened = open_run(folder) if folder.exists() else create(folder, {"loop": cfg.model_dump(mode="json")})
    rows = [{"prompt": text, "teacher_prompt": other} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    stream = PromptStream([list(TEXTS)], ShapesTextEncoder(), 8, 1, method.cfg.prompt_group, [rows])
    loop(method, roles, stream, cfg, opened)


def ended(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    tensors = {f"{part}/{name}": value for part, named in saved.tensors.items() for name, value in named.items()}
    return tensors, [{k: v for k, v in row.items() if k != "speed/images_per_s"} for row in read_metrics(folder)]


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Weights, optimizer, EMA, old policy, method state and log equal those of the uninterrupted run."""
    run(name, tmp_path / "whole", 3)
    run(name, tmp_path / "parts", 2)
    run(name, tmp_path / "parts", 3)
    (first, rows), (second, others) = ended(tmp_path / "whole"), ended(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert str(rows) == str(others)  # NaN equals itself
    head = [f"{part}/gan_head." for part in ("fake", "optim_fake/exp_avg")]
    assert all(any(key.startswith(one) for key in first) == (name == "dmd2") for one in head)
