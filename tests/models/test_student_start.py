"""The student's start in every family: another pipeline, with the teacher's VAE and text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from safetensors.torch import load_file, save_file

from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.models.student_start import open_start


@pytest.mark.parametrize("name", list(tiny.BUILD))
def test_student_starts_as_the_other_pipeline(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("base", "turbo"):
        tiny.save(name, tmp_path / folder)
    (file,) = [one for part in ("unet", "transformer") for one in (tmp_path / "turbo" / part).glob("*.safetensors")]
    moved = {key: value * 1.3 for key, value in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    family = open_family(tiny.config(tmp_path / "base", student=str(tmp_path / "turbo")))
    start = open_start(family)
    assert "adds no noise between the steps" in caplog.text
    assert start.pipe.vae is family.pipe.vae and start.pipe.text_encoder is family.pipe.text_encoder
    roles, alone = DiffusersRoles(family, start=start), open_family(tiny.config(tmp_path / "turbo"))
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    at = (x_t, torch.tensor([0.9, 0.3]), family.encoder.encode(tiny.WORDS[:2]))
    with torch.no_grad():
        student, teacher, wanted = roles.student(*at).x0, roles.teacher(*at).x0, alone.predict(alone.net, *at).x0
    assert torch.allclose(student, wanted, atol=1e-5)
    assert not torch.allclose(student, teacher, atol=1e-3)
