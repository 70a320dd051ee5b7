"""Every export of trained pipelines: with each, plain diffusers draws the trainer's images."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from huggingface_hub import constants
from PIL import Image
from stock_pipelines import UNIFORM, stock_images, trainers_images
from torch import Tensor
from upload_hub import TOKEN, account, logged_in

from gdmd.cli.app import main
from gdmd.config.shapes_pipeline import located
from gdmd.export.lora import KOHYA_FILE
from gdmd.models.roles import DiffusersRoles
from gdmd.recipes.contents import checkpoint_content
from gdmd.recipes.open_run import open_student
from gdmd.recipes.run_folders import config_of
from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.student import load_student
from gdmd.types import StudentSampler

SETTINGS = {
    "method": "{kind: dmd, fake_updates: 1, guidance: 3.0}",
    "model.lora_rank": "8",
    "model.lora_alpha": "16",
    "loop.steps": "5",
    "loop.batch_size": "4",
    "loop.lr_student": "3.0e-3",
    "loop.lr_schedule": "constant",
    "loop.warmup": "0",
    "loop.ema": "0.5",
    "validation.every": "0",
    "loop.threads": "1",
}
TOLERANCE = 1e-4
"""Largest difference in a channel of a pixel, on a scale from 0 to 1."""


@dataclass(frozen=True)
class Trained:
    """A run with its exports, and images by the trainer's sampler."""

    run: Path
    roles: DiffusersRoles
    captions: tuple[str, ...]
    noises: list[Tensor]
    wanted: Tensor

    def difference(self, pipe: Any, patch: pytest.MonkeyPatch, *, bound: bool = False) -> float:
        """The largest difference of the pipeline's images from the trainer's."""
        drawn = stock_images(pipe, self.roles, self.noises, patch, self.captions, bound=bound)
        return float((drawn - self.wanted).abs().max())

    def code(self, export: str) -> str:
        """The example of the model card."""
        (code,) = re.findall(r"```python\n(.*?)```", (self.run / export / "README.md").read_text(), re.S)
        return str(code).replace("THIS_FOLDER", str(self.run / export))


def gdmd(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert not end.value.code


@pytest.fixture(
    scope="module", params=[f"{name}{how}" for name in ("sdxl", "sd3", "flux2_klein") for how in ("", " ode")]
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name, _, ode = request.param.partition(" ")
    sampler: StudentSampler = "ode" if ode else "renoise"
    run = tmp_path_factory.mktemp(name) / "run"
    small = (f"{key}={value}" for key, value in (SETTINGS | {"method.student_sampler": sampler}).items())
    gdmd("train", f"shapes_{name}", *small, "--run", str(run), "--no-eval")
    gdmd("export", str(run))
    gdmd("export", str(run), "--merged")
    roles: Any = open_student(config_of(run), run)[0].roles
    captions = catalog().texts(fixed_rows("eval", 1))
    drawn = torch.Generator().manual_seed(0)
    noises = [torch.randn(len(captions), *roles.family.latent_shape, generator=drawn) for _ in UNIFORM]
    return Trained(run, roles, captions, noises, trainers_images(roles, noises, captions, sampler))


@pytest.mark.parametrize("export", ["export", "export-merged"])
def test_code_of_the_card(trained: Trained, export: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(trained.code(export), names)
    assert names["image"].size == (32, 32)
    assert trained.difference(names["pipe"], monkeypatch) <= TOLERANCE
    if names["pipe"].config.get("is_distilled") is not None:  # a distilled klein is marked, its base is not
        assert names["pipe"].config["is_distilled"] == (export == "export-merged")
    if export == "export":
        names["pipe"].unload_lora_weights()
        assert trained.difference(names["pipe"], monkeypatch) > 0.2, "the base draws the student's images"


@pytest.mark.parametrize("where", ["", "export", "export-merged"])
def test_load_student(trained: Trained, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = load_student(trained.run / where)
    assert trained.difference(pipe, monkeypatch, bound=True) <= TOLERANCE


@pytest.mark.parametrize("trained", ["sdxl"], indirect=True)
def test_student_of_an_offloaded_run_is_on_its_device(trained: Trained, tmp_path: Path) -> None:
    """The stock call does not know that a text encoder is on the CPU."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    file = run / "config.yaml"
    assert "\n  offload: none\n" in file.read_text()
    file.write_text(file.read_text().replace("\n  offload: none\n", "\n  offload: base\n"))
    parts = [part for part in load_student(run).components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4 and not any(one._forward_pre_hooks for part in parts for one in part.modules())


@pytest.mark.parametrize("trained", ["sdxl"], indirect=True)
def test_student_on_the_hub(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with logged_in(tmp_path / "hub", monkeypatch) as hub:
        gdmd("export", str(trained.run), "-o", str(tmp_path / "out"), "--push-to-hub", "me/student", "--private")
        printed = capfd.readouterr()
        assert f"uploaded to {constants.ENDPOINT}/me/student" in printed.err
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hub/me/student/README.md").read_text(), re.S)
        names: dict[str, Any] = {}
        exec(code, names)  # the card's code loads from the hub
        pipe: Any = load_student("me/student")
        texts = [
            file.read_text(errors="ignore")
            for file in (*trained.run.rglob("*"), *tmp_path.rglob("*"))
            if file.is_file()
        ]
        assert not any(TOKEN in text for text in (*texts, printed.out, printed.err))
        hub.account = account(role="read")
        with pytest.raises(SystemExit):
            main(["export", str(trained.run), "-o", str(tmp_path / "refused"), "--push-to-hub", "me/student"])
        assert "the token is read-only" in capfd.readouterr().err and not (tmp_path / "refused").exists()
    assert trained.difference(pipe, monkeypatch, bound=True) <= TOLERANCE
    assert trained.difference(names["pipe"], monkeypatch) <= TOLERANCE


def test_training_uploads_its_checkpoints_and_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint replaces the one before, and a resume from the downloaded folder continues it."""
    small = [f"{key}={value}" for key, value in SETTINGS.items()]
    command = ["train", "shapes_sdxl", *small, "loop.steps=2", "loop.checkpoint_every=1", "--no-eval"]
    with logged_in(tmp_path / "hub", monkeypatch):
        gdmd(*command, "loop.push_checkpoints=me/run", "--push-to-hub", "me/student", "--run", str(tmp_path / "run"))
        assert "uploaded to" in capfd.readouterr().err
        with pytest.raises(SystemExit) as refused:
            main([*command, "--push-to-hub", "someone/else", "--run", str(tmp_path / "other")])
        assert refused.value.code == 2 and "is not a member of someone" in capfd.readouterr().err
        assert not (tmp_path / "other").exists(), "refused before training"
    there = tmp_path / "hub" / "me"
    assert (there / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert [one.name for one in (there / "run" / "checkpoints").iterdir()] == ["step_000002"]
    gdmd("train", "--resume", str(there / "run"), "loop.steps=3", "loop.push_checkpoints=''", "--no-eval")
    assert (there / "run" / "checkpoints" / "step_000003").is_dir()


@pytest.mark.parametrize("trained", ["sdxl"], indirect=True)
def test_kohya_keys_and_scheduler(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    pipe.load_lora_weights(trained.run / "export", weight_name=KOHYA_FILE)
    assert trained.difference(pipe, monkeypatch) > 0.2, "the base's scheduler draws the student's images"
    pipe.scheduler = diffusers.LCMScheduler.from_pretrained(trained.run / "export", subfolder="scheduler")
    assert trained.difference(pipe, monkeypatch) <= TOLERANCE


@pytest.mark.parametrize("trained", ["sdxl"], indirect=True)
def test_all_exports_on_one_page(trained: Trained, tmp_path: Path) -> None:
    run, page = trained.run, tmp_path / "all"
    info = json.loads((run / "export" / "gdmd_export.json").read_text())
    steps = "+".join(map(str, info["arguments"]["timesteps"]))
    foreign = f"kohya=shapes:sdxl,lora={run / 'export' / KOHYA_FILE},scheduler=lcm,timesteps={steps},guidance=0"
    exports = (f"lora={run / 'export'}", f"merged={run / 'export-merged'}")
    sources = (f"run={run}", *exports, f"{foreign},dtype=fp32", "base=shapes:sdxl,steps=4,guidance=1,dtype=fp32")
    gdmd("eval", "compare", *sources, "-o", str(page), "--per-task", "4", "-n", "1")
    rows = json.loads((page / "compare.json").read_text())["rows"]
    student = rows["run"]
    assert student["shapeseval"]["overall"] > 0
    for name in ("lora", "merged", "kohya"):
        assert rows[name]["shapeseval"] == student["shapeseval"], name
        for scorer, found in rows[name]["scores"].items():
            assert found["mean"] == pytest.approx(student["scores"][scorer]["mean"], abs=2e-3), (name, scorer)
    assert rows["base"]["scores"] != student["scores"]


@pytest.mark.parametrize("trained", ["sdxl"], indirect=True)
def test_scores_of_the_ema_are_not_on_the_card_of_the_last_weights(trained: Trained, tmp_path: Path) -> None:
    """The card of the last weights has neither the scores nor the sample images of the EMA weights."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    step = config_of(run).loop.steps
    (run / "grids").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(run / "grids" / f"step_{step:06d}.png")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "validation/shapes_clip": 0.4321}) + "\n")
    score = {"mean": 0.1234, "low": 0.1, "high": 0.2, "trained": True}
    measured = {
        "prompts": 6,
        "prompt_file": "a.txt",
        "images_per_prompt": 1,
        "seed": 0,
        "scores": {"shapes_pref": score},
    }
    measured |= {"source": {"step": step}, "weights": checkpoint_content(run, step)}
    (run / "preference").mkdir()
    (run / "preference" / "preference.json").write_text(json.dumps(measured))
    for option, shown in (("--ema", True), ("--no-ema", False)):
        out = tmp_path / option
        gdmd("export", str(run), option, "-o", str(out))
        card = (out / "README.md").read_text()
        assert [text in card for text in ("0.1234", "0.4321", "![samples]")] == [shown] * 3, option
        assert ("these are the last weights of the run" in card) is not shown
