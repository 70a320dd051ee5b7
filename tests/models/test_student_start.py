"""The student's start in every family: another pipeline, with the teacher's VAE and text encoders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from diffusers import EulerAncestralDiscreteScheduler
from safetensors.torch import load_file, save_file

from gdmd.config.methods.base import DistillationConfig
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import PromptConfig, RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd import Dmd
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.models.student_start import compare_samplers, open_start
from gdmd.models.timesteps import uniform_times
from gdmd.recipes.build import build
from gdmd.types import StudentSampler

UNIFORM = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("name", list(tiny.BUILD))
def test_student_starts_as_the_other_pipeline(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("base", "turbo"):
        tiny.save(name, tmp_path / folder)
    (file,) = [one for part in ("unet", "transformer") for one in (tmp_path / "turbo" / part).glob("*.safetensors")]
    moved = {key: value * 1.3 for key, value in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    family = open_family(tiny.config(tmp_path / "base", student=str(tmp_path / "turbo")))
    start = open_start(family)
    compare_samplers(start, UNIFORM, "renoise")
    assert "adds no noise between the steps" in caplog.text and "method.student_sampler=ode keeps" in caplog.text
    assert start.pipe.vae is family.pipe.vae and start.pipe.text_encoder is family.pipe.text_encoder
    roles, alone = DiffusersRoles(family, start=start), open_family(tiny.config(tmp_path / "turbo"))
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    at = (x_t, torch.tensor([0.9, 0.3]), family.encoder.encode(tiny.WORDS[:2]))
    with torch.no_grad():
        student, teacher, wanted = roles.student(*at).x0, roles.teacher(*at).x0, alone.predict(alone.net, *at).x0
    assert torch.allclose(student, wanted, atol=1e-5)
    assert not torch.allclose(student, teacher, atol=1e-3)


def changed(folder: Path, **settings: object) -> None:
    """Change the scheduler of a pipeline."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux2_klein"])
def test_times_of_the_pipelines_call(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SD3's call of N steps is not at the shifted uniform times, SDXL's is not with "leading" spacing; the note has them."""
    tiny.save(name, tmp_path)
    changed(tmp_path, **{"timestep_spacing": "leading"} if name == "sdxl" else {})
    start = open_family(tiny.config(tmp_path, student=str(tmp_path)).start)
    compare_samplers(start, UNIFORM, "ode")
    if name == "flux2_klein":
        assert not caplog.text
        return
    assert "the first images differ from those of that call" in caplog.text
    (steps,) = re.findall(r"method.student_steps=(\[.*?\]) are its times", caplog.text)
    found = DistillationConfig(student_steps=json.loads(steps)).student_steps
    assert start.student_times(found) == pytest.approx(start.teacher_times(4)[:-1].tolist(), abs=1e-4)
    caplog.clear()
    compare_samplers(start, found, "ode")
    assert not caplog.text


def test_note_about_the_sampler_of_a_pipeline_that_renoises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save("flux2_klein", tmp_path)
    changed(tmp_path, stochastic_sampling=True)
    start = open_family(tiny.config(tmp_path, student=str(tmp_path)).start)
    compare_samplers(start, UNIFORM, "renoise")
    assert not caplog.text
    compare_samplers(start, UNIFORM, "ode")
    assert "adds new noise" in caplog.text and "method.student_sampler=renoise keeps" in caplog.text


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["ode", "renoise"])
def test_note_about_a_sampler_that_replaces_a_part_of_the_noise(
    steps: int, sampler: StudentSampler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SDXL-Turbo's scheduler: no student sampler is like it, but in one step they are all the same."""
    tiny.save("sdxl", tmp_path)
    changed(tmp_path, timestep_spacing="trailing")
    start = open_family(tiny.config(tmp_path, student=str(tmp_path)).start)
    start.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(start.pipe.scheduler.config)
    compare_samplers(start, uniform_times(steps), sampler)
    assert ("EulerAncestralDiscreteScheduler, which replaces a part of the noise" in caplog.text) == (steps > 1)
    assert "keeps them" not in caplog.text and "are its times" not in caplog.text


def test_vae_config_of_an_old_file(tmp_path: Path) -> None:
    """That of the first SD 1.5 has no scaling_factor: it is the default of the class."""
    for folder in ("base", "turbo"):
        tiny.save("sd15", tmp_path / folder)
    file = tmp_path / "turbo" / "vae" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("scaling_factor") == 0.18215
    file.write_text(json.dumps(config))
    family = open_family(tiny.config(tmp_path / "base", student=str(tmp_path / "turbo")))
    assert open_start(family).net is not family.net


@pytest.mark.parametrize("change", ["rounded", "trained", "damaged"])
def test_note_about_other_text_encoders(change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All roles read the teacher's embeddings, and the exported pipeline its own; a file's precision does not matter."""
    for folder in ("base", "turbo"):
        tiny.save("sdxl", tmp_path / folder)
    (file,) = (tmp_path / "turbo" / "text_encoder_2").glob("*.safetensors")
    weights, generator = load_file(file), torch.Generator().manual_seed(0)
    if change == "damaged":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    elif change == "rounded":
        save_file({key: value.half() for key, value in weights.items()}, file, metadata={"format": "pt"})
    else:
        noise = {key: torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file({k: v + 1e-4 * noise[k] for k, v in weights.items()}, file, metadata={"format": "pt"})
    open_start(open_family(tiny.config(tmp_path / "base", student=str(tmp_path / "turbo"))))
    assert ("turbo' has other weights in text_encoder_2 than the teacher" in caplog.text) == (change == "trained")


def test_fake_score_of_a_student_with_another_output(tmp_path: Path) -> None:
    """Its native loss is that of its own network: here v, where the teacher predicts eps."""
    for folder in ("base", "student"):
        tiny.save("sdxl", tmp_path / folder)
    changed(tmp_path / "student", prediction_type="v_prediction")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.WORDS))
    model = tiny.config(tmp_path / "base", student=str(tmp_path / "student"), fake_from="student")
    loop, prompts = LoopConfig(batch_size=2), PromptConfig(file=str(tmp_path / "prompts.txt"))
    built = build(RunConfig(name="v", model=model, method=DMDConfig(guidance=3.0), loop=loop, prompts=prompts), "cpu")
    method, drawn = built.method, built.stream.at(0)
    assert isinstance(method, Dmd)
    rng = SampleRng(0, 0, drawn.index)
    batch = method.fake_batch(method.rollout(drawn, rng), rng, 0)
    schedule = built.roles.schedule
    alpha, sigma = (level(batch.t)[:, None, None, None] for level in (schedule.alpha, schedule.sigma))
    fake = built.roles.fake(batch.x_t, batch.t, batch.cond)
    error = alpha * (fake.eps - batch.eps) - sigma * (fake.x0 - batch.x0)
    wanted = error.square().mean((1, 2, 3))
    torch.testing.assert_close(method.fake_loss(batch).per_sample, wanted, rtol=1e-3, atol=1e-6)
