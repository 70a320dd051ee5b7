"""The shipped VAE and teacher can be made again, and an interrupted job equals a straight one."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from gdmd.runs.assets import load_asset
from gdmd.shapes.networks import ShapesVae
from gdmd.shapes.pretrain.networks import PretrainJob, fit, learning_rate, teacher_job, vae_job
from gdmd.shapes.roles import load_dit, load_vae


def _vae_job() -> PretrainJob:
    return vae_job(steps=4, seed=3, batch=4)


def _teacher_job() -> PretrainJob:
    torch.manual_seed(0)
    return teacher_job(ShapesVae().eval().requires_grad_(False), steps=4, seed=3, batch=4)


@pytest.mark.parametrize(("make", "load"), [(_vae_job, load_vae), (_teacher_job, load_dit)], ids=["vae", "teacher"])
def test_asset_is_loadable(make, load, tmp_path: Path) -> None:
    losses = [loss for _, loss in fit(make(), tmp_path / "net.safetensors")]
    asset = load_asset(tmp_path / "net.safetensors")
    load(asset.tensors)
    assert len(losses) == 4 and all(torch.isfinite(loss) for loss in losses)
    assert asset.metadata["seed"] == 3 and "--steps 4 --seed 3" in asset.metadata["command"]


def _restarted_job() -> PretrainJob:
    return replace(_vae_job(), restart=2, warmup=1)


def test_restart_begins_with_the_average_and_half_the_rate(tmp_path: Path) -> None:
    job = _restarted_job()
    rates = [learning_rate(step, job) for step in range(4)]
    assert rates[0] == pytest.approx(job.lr) and rates[2] == pytest.approx(job.lr / 2)
    assert rates[3] == pytest.approx(rates[1] / 2)
    before = replace(_vae_job(), steps=2, warmup=1)
    list(fit(before, tmp_path / "before.safetensors"))
    average = {name: value.clone() for name, value in before.module.named_parameters()}
    at_restart = fit(job, tmp_path / "net.safetensors")
    list(islice(at_restart, 3))
    moved = torch.cat([(value - average[name]).abs().flatten() for name, value in job.module.named_parameters()])
    assert moved.median().item() == pytest.approx(job.lr / 2, rel=0.01)  # a new Adam moves every weight by the rate


@pytest.mark.parametrize("make", [_vae_job, _teacher_job, _restarted_job], ids=["vae", "teacher", "restart"])
def test_resume_is_bit_exact(make, tmp_path: Path) -> None:
    straight, broken = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    list(fit(make(), straight, save_every=1))
    list(islice(fit(make(), broken, save_every=1), 3))  # stopped while step 2 is not saved yet
    assert broken.with_suffix(".part").exists() and not broken.exists()
    resumed = [step for step, _ in fit(make(), broken, resume=True, save_every=1)]
    assert resumed[0] == 2
    assert not broken.with_suffix(".part").exists()
    for name, value in load_asset(straight).tensors.items():
        assert torch.equal(value, load_asset(broken).tensors[name]), name


def test_state_of_another_job(tmp_path: Path) -> None:
    target = tmp_path / "net.safetensors"
    list(islice(fit(_vae_job(), target, save_every=1), 2))
    with pytest.raises(ValueError, match="delete it or use its settings"):
        list(fit(vae_job(steps=4, seed=4, batch=4), target, resume=True))


def test_teacher_needs_the_same_vae(tmp_path: Path) -> None:
    target = tmp_path / "teacher.safetensors"
    list(islice(fit(_teacher_job(), target, save_every=1), 3))
    other = teacher_job(ShapesVae().eval().requires_grad_(False), steps=4, seed=3, batch=4)
    with pytest.raises(ValueError, match="reads"):
        list(fit(other, target, resume=True))


def test_vae_loss_falls(tmp_path: Path) -> None:
    losses = [float(loss) for _, loss in fit(vae_job(steps=12, seed=0, batch=8), tmp_path / "net.safetensors")]
    assert losses[-1] < 0.8 * losses[0]
