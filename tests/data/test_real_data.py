"""Training on real images with tiny pipelines: `gdmd latents`, DMD on data, and DMD2's GAN."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
import yaml
from PIL import Image

from gdmd.cli.app import main
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.captioned_images import pixels
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import build
from gdmd.recipes.build_data import store_of

DMD = {"kind": "dmd", "fake_updates": 1, "student_input": "data", "step_draw": "batch"}
GAN = {"kind": "dmd2", "fake_updates": 1, "step_draw": "batch"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sdxl", tmp_path_factory.mktemp("pipelines") / "sdxl")


def recipe(pipeline: Path, folder: Path, method: dict[str, object]) -> RunConfig:
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for i, text in enumerate(tiny.WORDS[:3]):
            Image.effect_noise((tiny.SIZE + 9, tiny.SIZE), 90 + i).convert("RGB").save(images / f"{i}.png")
            (images / f"{i}.txt").write_text(text)
    return RunConfig(
        name="tiny",
        model=tiny.config(pipeline),
        method=method,
        loop={"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 1, "threads": 1},
        real_data={"source": str(images), "latents": str(folder / "latents")},
        rewards=[],
        validation={"every": 0},
    )


def gdmd(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_latents_are_computed_once_and_trained_on(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = recipe(pipeline, tmp_path, DMD)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert gdmd("train", str(file), "--run", str(tmp_path / "run")) == 2
    assert "run `gdmd latents`" in capsys.readouterr().err and not (tmp_path / "run").exists()
    for encoded in (3, 0):
        assert gdmd("latents", str(file), "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["images"], summary["encoded"], summary["unusable"]) == (3, encoded, [])
    assert gdmd("train", str(file), "--run", str(tmp_path / "run"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert gdmd("train", str(file), "model.height=64", "--run", str(tmp_path / "other")) == 2
    assert "no complete latents" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an unknown thing")
    assert gdmd("train", str(file), f"prompts.file={prompts}", "--run", str(tmp_path / "other")) == 2
    assert "1 of 1 prompts have no image in real_data ('an unknown thing')" in capsys.readouterr().err
    components = build(cfg, "cpu")
    batch = components.stream.at(0)
    content = [(tmp_path / "images" / f"{tiny.WORDS.index(text)}.png").read_bytes() for text in batch.text]
    direct = components.codec.encode(torch.stack([pixels(own, tiny.SIZE, tiny.SIZE) for own in content]).float() / 255)
    stored = components.method.real_latents(batch, SampleRng(0, 0, batch.index))  # type: ignore[attr-defined]
    torch.testing.assert_close(stored, direct, rtol=1e-4, atol=1e-4)


def test_gan_of_dmd2(pipeline: Path, tmp_path: Path) -> None:
    cfg = recipe(pipeline, tmp_path, GAN)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert gdmd("latents", str(file)) == 0
    assert gdmd("train", str(file), "loop.steps=1", "--run", str(tmp_path / "run")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("gan/real" in row for row in rows), rows[-1]
    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(cfg.real_data.latents if cfg.real_data else "")
    assert gdmd("sample", str(tmp_path / "run"), "-p", "two red dogs", "--out", str(tmp_path / "a.png")) == 0
    assert gdmd("export", str(tmp_path / "run")) == 0
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| prompts | the captions of the real images |\n| real images | images |" in card
    assert "| real images | images | fill in source and license |" in card


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("images/0.txt", "its files changed since the latents were computed"),
        ("images/0.png", "its files changed since the latents were computed"),
        ("sdxl/vae/diffusion_pytorch_model.safetensors", "no complete latents"),
        ("sdxl/unet/diffusion_pytorch_model.safetensors", ""),
    ],
)
def test_changed_captions_images_and_vaes(pipeline: Path, tmp_path: Path, changed: str, message: str) -> None:
    base = Path(shutil.copytree(pipeline, tmp_path / "sdxl"))
    cfg = recipe(base, tmp_path, DMD)
    assert cfg.real_data is not None and isinstance(cfg.model, DiffusersModel)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert gdmd("latents", str(file)) == 0
    store_of(cfg.real_data, cfg.model).open()
    target = tmp_path / changed
    target.write_bytes(target.read_bytes()[:-1] + bytes([target.read_bytes()[-1] ^ 1]))
    if not message:
        store_of(cfg.real_data, cfg.model).open()
        return
    with pytest.raises(ValueError, match=message):
        store_of(cfg.real_data, cfg.model).open()


def test_resume_after_images_were_touched_moved_and_changed(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = recipe(pipeline, tmp_path, DMD)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    assert gdmd("latents", str(file)) == 0
    assert gdmd("train", str(file), "loop.steps=1", "--run", "run") == 0
    os.utime("images/0.png", (1, 1))
    assert gdmd("train", "--resume", "run", "loop.steps=2") == 2
    assert "run `gdmd latents`" in capsys.readouterr().err
    assert gdmd("latents", str(file)) == 0
    assert gdmd("train", "--resume", "run", "loop.steps=2") == 0, capsys.readouterr().err
    Path("images").rename("far")
    assert gdmd("train", "--resume", "run", "loop.steps=3", "real_data.source=far") == 0, capsys.readouterr().err
    Path("far").rename("images")
    Path("images/0.png").write_bytes(Path("images/1.png").read_bytes())
    assert gdmd("latents", str(file)) == 0
    assert gdmd("train", "--resume", "run", "loop.steps=4", f"real_data.source={tmp_path / 'images'}") == 2
    assert "real_data.latents: " in (error := capsys.readouterr().err) and "has different content" in error
