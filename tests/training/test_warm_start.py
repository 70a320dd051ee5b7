"""A run that starts from the networks of another one (loop.start_from)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_roles import gdmd, prompts, rng, same, tiny_roles
from torch.nn import Parameter
from toy_training import Toy, toy_config

from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create
from gdmd.shapes.networks import ShapesDit
from gdmd.shapes.roles import ShapesRoles
from gdmd.training.distributed import SINGLE_PROCESS
from gdmd.training.optimizer import RoleOptimizer
from gdmd.training.role_state import RoleState, role_states
from gdmd.training.warm_start import check_roles, require_start, warm_start
from gdmd.types import Role


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    Toy(folder, toy_config(10)).train()
    return folder


def last(folder: Path) -> checkpoint.Checkpoint:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    return saved


def test_student_starts_from_the_ema(finished: Path, tmp_path: Path) -> None:
    toy, saved = Toy(tmp_path / "run", toy_config()), last(finished)
    states = role_states(toy.roles, toy.cfg)
    notes = warm_start(str(finished), states, SINGLE_PROCESS, {})
    assert "step 10" in notes and "EMA" in notes
    assert not same(dict(saved.part("ema")), dict(saved.part("student")))
    assert same(dict(states["student"].parameters), dict(saved.part("ema")))
    assert same(dict(states["fake"].parameters), dict(saved.part("fake")))
    ema = states["student"].ema
    assert ema is not None and ema.updates == 0 and same(ema.shadow, dict(saved.part("ema")))
    assert states["student"].updates == 0


def test_start_from_a_student_without_ema(tmp_path: Path) -> None:
    Toy(tmp_path / "first", toy_config(5, ema=0.0)).train()
    states = role_states((toy := Toy(tmp_path / "run", toy_config())).roles, toy.cfg)
    assert "EMA" not in warm_start(str(tmp_path / "first"), states, SINGLE_PROCESS, {})
    assert same(dict(states["student"].parameters), dict(last(tmp_path / "first").part("student")))


def test_resume_without_the_first_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    first = tmp_path / "first"
    shutil.copytree(finished, first)
    notes: list[str] = []

    def run(name: str, steps: int) -> Toy:
        toy = Toy(tmp_path / name, toy_config(steps, start_from=str(first), lr_schedule="constant", seed=4))
        monkeypatch.setattr(toy.hooks.progress, "note", notes.append)
        toy.train()
        return toy

    run("whole", 12)
    run("parts", 5)
    assert sum("start from step 10" in line for line in notes) == 2
    shutil.rmtree(first)
    run("parts", 12)
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert all(same(dict(whole.part(name)), dict(parts.part(name))) for name in ("student", "fake", "ema"))
    Toy(tmp_path / "teacher", toy_config(12, lr_schedule="constant", seed=4)).train()
    assert not same(dict(whole.part("student")), dict(last(tmp_path / "teacher").part("student")))


def test_old_policy_starts_as_the_student() -> None:
    roles = tiny_roles()
    method = gdmd(roles, old_policy="ema")
    r = method.rollout(prompts(), rng())
    torch.testing.assert_close(method.old_prediction(r), r.x0, rtol=0, atol=0)


def test_gan_head_starts_fresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = ShapesDit(width=32, depth=1)
    bare, judged = ShapesRoles(teacher), ShapesRoles(teacher, head_seed=3)
    parts = {"student": dict(bare.parameters("student")), "fake": dict(bare.parameters("fake"))}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, parts, {})
    states = role_states(judged, toy_config())
    before = {k: v.detach().clone() for k, v in states["fake"].parameters.items() if k.startswith("gan_head.")}
    assert before
    warm_start(str(tmp_path / "run"), states, SINGLE_PROCESS, {})
    assert same(before, {k: v for k, v in states["fake"].parameters.items() if k in before})


def test_adapters_of_an_unknown_run_are_not_scaled(tmp_path: Path) -> None:
    """A folder with nothing but checkpoints does not record lora_alpha."""
    name, saved = "block.to_q.lora_B.weight", torch.tensor([[2.0], [3.0]])
    roles: tuple[Role, ...] = ("student", "fake")
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {role: {name: saved} for role in roles}, {})
    own = {role: {name: Parameter(torch.zeros(2, 1))} for role in roles}
    states = {role: RoleState(role, own[role], RoleOptimizer(own[role], 1e-3)) for role in roles}
    warm_start(str(tmp_path / "run"), states, SINGLE_PROCESS, {"model": {"lora_rank": 4, "lora_alpha": 8.0}})
    assert all(torch.equal(weights[name], saved) for weights in own.values())


def test_differences_that_change_the_images_are_reported(tmp_path: Path) -> None:
    run = create(tmp_path / "run", {"model": {"path": "a", "embedded_guidance": 3.5, "t5": True, "max_tokens": 0}})
    roles: tuple[Role, ...] = ("student", "fake")
    checkpoint.save(run.checkpoints, 1, {role: {"w": torch.ones(1)} for role in roles}, {})
    own = {role: {"w": Parameter(torch.zeros(1))} for role in roles}
    states = {role: RoleState(role, own[role], RoleOptimizer(own[role], 1e-3)) for role in roles}
    config = {"model": {"path": "a", "embedded_guidance": 1.0, "t5": False, "max_tokens": 0}}
    _, *notes = warm_start(str(run.path), states, SINGLE_PROCESS, config).split("\n")
    assert notes == [
        "model.embedded_guidance was 3.5 there and is 1.0 here",
        "model.t5 was True there and is False here",
    ]


@pytest.mark.parametrize(("exists", "message"), [(False, "does not exist"), (True, "has no checkpoint")])
def test_start_from_a_folder_without_checkpoint(tmp_path: Path, exists: bool, message: str) -> None:
    if exists:
        (tmp_path / "first").mkdir()
    with pytest.raises(ValueError, match=f"loop.start_from.*{message}"):
        require_start(str(tmp_path / "first"))


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/step_000001"])
def test_start_from_a_folder_inside_a_run(finished: Path, part: str) -> None:
    with pytest.raises(ValueError, match=rf"Did you mean {finished}\?"):
        require_start(str(finished / part))


def test_another_network_is_found_from_headers(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Toy(tmp_path / "run", toy_config()).roles
    monkeypatch.setattr(checkpoint, "load", None)
    check_roles(str(finished), same)
    with pytest.raises(
        ValueError, match="the student of .* belongs to another network: .* tensors differ in name or size"
    ):
        check_roles(str(finished), tiny_roles())


def test_start_from_another_network_is_an_error(finished: Path) -> None:
    with pytest.raises(ValueError, match="do not fit the student of loop.start_from"):
        warm_start(str(finished), role_states(tiny_roles(), toy_config()), SINGLE_PROCESS, {})
