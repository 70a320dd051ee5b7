"""A student in training as a stock pipeline: it draws the trainer's images and does not affect the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from stock_pipelines import UNIFORM, noises_of, stock_images, student_of, trainers_images

from gdmd.export.student import student_pipeline
from gdmd.models.lora import NO_ADAPTER


@pytest.mark.parametrize(("name", "full"), [("sdxl", "none"), ("flux2_klein", "none"), ("sd3", "student")])
def test_pipeline_of_a_student_in_training(
    tmp_path: Path, name: str, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = student_of(tmp_path, name, full)
    kind, noises = type(roles.family.pipe), noises_of(roles)
    wanted = trainers_images(roles, noises)
    pipe = student_pipeline(roles.family, roles.parameters("student"), UNIFORM)
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__ and type(roles.family.pipe) is kind
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch, bound=True), wanted, atol=1e-4)
    assert torch.equal(trainers_images(roles, noises), wanted), "the training is as before"
    with torch.no_grad():
        for weights in roles.parameters("student").values():
            weights.mul_(2.0)
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch, bound=True), wanted, atol=1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(again) is kind
    assert torch.allclose(stock_images(again, roles, noises, monkeypatch), wanted, atol=1e-4)
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch, bound=True), wanted, atol=1e-4)


def test_pipeline_of_a_compiled_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are its own: those in training have another adapter active by the next call."""
    roles = student_of(tmp_path, "sdxl")
    noises = noises_of(roles)
    wanted = trainers_images(roles, noises)
    roles.compile(backend="eager")
    pipe = student_pipeline(roles.family, roles.parameters("student"), UNIFORM)
    roles.backbone.set_adapter(NO_ADAPTER)
    assert torch.allclose(stock_images(pipe, roles, noises, monkeypatch, bound=True), wanted, atol=1e-4)


def test_arguments_of_the_caller_have_priority(tmp_path: Path) -> None:
    roles = student_of(tmp_path, "sdxl")
    pipe, seen = student_pipeline(roles.family, roles.parameters("student"), UNIFORM), []
    pipe.set_progress_bar_config(disable=True)

    def image(**given: int) -> tuple[int, int]:
        seen.clear()
        options = {"callback_on_step_end": lambda pipe, step, t, kwargs: seen.append(step) or kwargs, **given}
        return pipe("a dog", **options).images[0].size

    assert image() == (roles.family.cfg.width, roles.family.cfg.height) and len(seen) == 4
    assert image(num_inference_steps=2, height=64) == (roles.family.cfg.width, 64) and len(seen) == 2
