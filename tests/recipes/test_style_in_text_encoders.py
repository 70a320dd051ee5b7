"""A run whose teacher has a LoRA of its UNet and text encoders: embeddings on disk, resume, and every export."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from cli_world import run_gdmd
from random_loras import KOHYA, pipeline, write_lora
from safetensors.torch import load_file, save_file
from stock_pipelines import UNIFORM, stock_images, trainers_images
from torch import Tensor

from gdmd import load_student
from gdmd.cli.app import main
from gdmd.export.lora import KOHYA_FILE
from gdmd.export.pipeline import student_scheduler
from gdmd.models.lora_files import add_lora
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.recipes.build import build
from gdmd.recipes.open_run import open_student
from gdmd.recipes.run_folders import config_of
from gdmd.shapes.grammar import catalog, fixed_rows

SETTINGS = (
    "method={kind: dmd, fake_updates: 1, guidance: 3.0}",
    "model.lora_rank=4",
    "loop.batch_size=4",
    "loop.lr_student=3.0e-3",
    "loop.lr_schedule=constant",
    "loop.warmup=0",
    "loop.checkpoint_every=1",
    "loop.ema=0.5",
    "validation.every=0",
    "loop.threads=1",
)
CAPTIONS = catalog().texts(fixed_rows("eval", 1))[:3]
ENDS = ("to_q", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc2")


@pytest.fixture(scope="module")
def loras(folders: Path) -> dict[str, Path]:
    few = write_lora(folders / "few-step.safetensors", "sdxl", 2, ENDS, kohya=True)
    return {
        "style": write_lora(folders / "style.safetensors", "sdxl", 1, ENDS, tuple(KOHYA), kohya=True),
        "few-step": few,
    }


@pytest.fixture(scope="module")
def styled(folders: Path, loras: dict[str, Path]) -> Path:
    """A run of two steps with the style in UNet and text encoders, and a few-step LoRA of the UNet; embeddings on disk."""
    run = folders / "run"
    options = (
        f"model.teacher_loras=[{{path: {loras['style']}, weight: 0.7}}]",
        f"model.student_lora={loras['few-step']}",
        f"model.embeddings={folders / 'embeddings'}",
    )
    run_gdmd("train", "shapes_sdxl", *SETTINGS, *options, "loop.steps=2", "--run", run, "--no-eval")
    return run


def opened(run: Path) -> Any:
    """The trainer's networks, with the text encoders instead of stored embeddings."""
    return open_student(config_of(run, ["model.embeddings=null"]), run)[0].roles


def images(roles: Any, pipe: Any, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    noises = [torch.randn(len(CAPTIONS), *roles.family.latent_shape, generator=drawn) for _ in UNIFORM]
    return stock_images(pipe, roles, noises, patch, CAPTIONS), trainers_images(roles, noises, CAPTIONS)


def difference(roles: Any, pipe: Any, patch: pytest.MonkeyPatch) -> float:
    theirs, ours = images(roles, pipe, patch)
    return float((theirs - ours).abs().max())


def by_the_card(export: Path) -> Any:
    """The pipeline of the model card's example, on the CPU."""
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(str(code).replace("THIS_FOLDER", str(export)), names)
    return names["pipe"]


def test_training_reads_the_changed_embeddings(styled: Path, folders: Path) -> None:
    """What is on disk are the embeddings of the encoders with the LoRA, not those of the base model."""
    roles = opened(styled)
    (folder,) = (folders / "embeddings").iterdir()
    stored = build(config_of(styled), "cpu").encoder
    assert stored.folder == folder  # type: ignore[attr-defined]
    captions = CAPTIONS[:2]
    found, wanted = stored.encode(captions), roles.family.encoder.encode(captions)
    plain, *_ = pipeline("sdxl").encode_prompt(captions, do_classifier_free_guidance=False)
    assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)
    assert not torch.allclose(found["embeds"], plain, atol=0.05)


@pytest.mark.parametrize("options", [(), ("--no-loras",), ("--merged",)])
def test_exports_draw_the_images_of_the_student(
    options: tuple[str, ...], styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "export"
    run_gdmd("export", styled, *options, "-o", export)
    roles = opened(styled)
    for pipe in (by_the_card(export), load_student(export, device="cpu")):
        assert difference(roles, pipe, monkeypatch) <= 1e-4
    with_text = any(key.startswith("text_encoder") for file in export.glob("*.safetensors") for key in load_file(file))
    assert with_text == (options == ())
    card = (export / "README.md").read_text()
    assert ("contained in these weights, also in the text encoders |" in card) == (options != ("--no-loras",))
    assert ("components=['unet', 'text_encoder', 'text_encoder_2'], lora_scale=0.7" in card) == (
        options == ("--no-loras",)
    )


def test_pipelines_from_the_run_and_its_lora(styled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles, export = opened(styled), tmp_path / "export"
    run_gdmd("export", styled, "-o", export)
    assert difference(roles, load_student(styled, device="cpu"), monkeypatch) <= 1e-4
    student = load_student(export, device="cpu")
    student.save_pretrained(tmp_path / "saved")  # a plain pipeline: the LoRA is merged, in the text encoders, too
    assert difference(roles, diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"), monkeypatch) <= 1e-4
    for file in (DIFFUSERS_FILE, KOHYA_FILE):
        pipe = pipeline("sdxl")
        add_lora(pipe, str(export / file), 1.0)
        pipe.scheduler = student_scheduler(roles.start, UNIFORM)
        assert difference(roles, pipe, monkeypatch) <= 1e-4
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            encoder.disable_adapters()
        assert difference(roles, pipe, monkeypatch) > 1e-2


def test_resume_is_bit_exact(
    styled: Path, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the LoRA and the embeddings are elsewhere; other text layers in the file are another run."""
    halves, moved = tmp_path / "halves", tmp_path / "moved.safetensors"
    shutil.copytree(styled, halves)
    shutil.rmtree(halves / "checkpoints" / "step_000002")
    shutil.copy(loras["style"], moved)
    options = (f"model.teacher_loras=[{{path: {moved}, weight: 0.7}}]",)
    run_gdmd("train", "--resume", halves, *options, "--no-eval")
    for part in ("student", "fake", "ema"):
        wanted, found = (
            load_file(run / "checkpoints" / "step_000002" / f"{part}.safetensors") for run in (styled, halves)
        )
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    tensors = load_file(moved)
    key = next(name for name in tensors if name.startswith("lora_te2") and "lora_up" in name)
    save_file(tensors | {key: 2 * tensors[key]}, moved)
    with pytest.raises(SystemExit) as end:
        main(["train", "--resume", str(halves), *options, "loop.steps=3", "--no-eval"])
    assert end.value.code and "model.teacher_loras.0.path" in "".join(capsys.readouterr())


def test_another_weight_has_other_embeddings(styled: Path, folders: Path, tmp_path: Path) -> None:
    """No run reads the embeddings of another LoRA or weight, even from the same folder."""
    settings = json.dumps([{"path": str(folders / "style.safetensors"), "weight": 0.2}])
    first = build(config_of(styled), "cpu").encoder
    other = build(config_of(styled, [f"model.teacher_loras={settings}"]), "cpu").encoder
    assert first.missing(CAPTIONS) == [] and other.missing(CAPTIONS) == list(CAPTIONS)  # type: ignore[attr-defined]
