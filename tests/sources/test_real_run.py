"""A run of a diffusers pipeline by its commands: train, evaluate, report, export, sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_world import Gdmd

pytest.importorskip("diffusers")

import tiny_pipelines as tiny

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig

CAPTIONS = ["a photo of two red apples", "a blue ring"]


def brightness(images: torch.Tensor, prompts: object) -> torch.Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


def test_real_run_end_to_end(folders: Path, gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    cfg = RunConfig(
        name="tiny",
        model=tiny.config(tiny.saved(folders, "sd3")),
        method=DMDConfig(fake_updates=1, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(steps=2, batch_size=2, threads=1, checkpoint_every=1, lr_student=1e-2),
        prompts={"file": "prompts.txt"},
        validation={"every": 2},
        eval={"teacher_steps": 2},
    )
    Path("tiny.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    trained = gdmd("train", "tiny.yaml", "--run", "run", "--json")
    assert trained.code == 0, trained.err
    ended = json.loads(trained.out)
    assert ended["evaluation"] is None and ended["report"] == "run/report.html"
    assert "gdmd eval preference run --prompts FILE" in trained.err and "gdmd export run" in trained.err
    assert "Not scored yet" in Path("run/report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("gdmd.recipes.open_run.build", None)  # nothing is loaded for these
        refused = gdmd("eval", "run")
        assert refused.code == 2 and "gdmd eval preference run --prompts FILE" in refused.err
        assert "ShapesEval" in refused.err and gdmd("report", "run", "--fresh").code == 2
        mixed = gdmd("eval", "compare", "teacher", "run", "-o", "both", "--prompts", "prompts.txt")
        assert mixed.code == 2 and "no prompts or scorers suit both" in mixed.err
    assert gdmd("export", "run", "-o", "before").code == 0
    assert "Not evaluated" in Path("before/README.md").read_text()
    arguments = ("--prompts", "prompts.txt", "-n", "2", "--scorer", "test_real_run:brightness")
    done = gdmd("eval", "preference", "run", *arguments)
    assert done.code == 0 and "test_real_run" in done.out, done.err
    Path("run/evaluation.json").write_text("{}")  # as an earlier version left it
    assert gdmd("report", "run").code == 0
    page = Path("run/report.html").read_text()
    for seen in (
        "test_real_run:brightness",
        "2 prompts of prompts.txt, 2 images per prompt, seed 777; step 2.",
        "Losses",
    ):
        assert seen in page
    assert "ShapesEval" not in page and page.count("data:image/png") == 2 + len(CAPTIONS)
    assert gdmd("export", "run").code == 0
    card = Path("run/export/README.md").read_text()
    assert "| test_real_run:brightness |" in card and "| unseen |" in card
    assert "2 prompts of prompts.txt, 2 images each" in card and "`license`: that of" in card
    measured = Path("run/preference/preference.json")
    answer = "These scores belong to other weights than this run has now at that step"
    assert answer not in page
    measured.write_text(json.dumps(json.loads(measured.read_text()) | {"weights": "of a run before"}))
    assert gdmd("report", "run").code == 0 and answer in Path("run/report.html").read_text()
    assert gdmd("export", "run", "-o", "after").code == 0
    assert "Not evaluated" in Path("after/README.md").read_text()
    assert "| base model |" in card and "SHA-256" in card and "`gdmd train" not in card.split("## Metrics")[1]
    assert "Distilled by DMD (arXiv 2311.18828) with the gdmd library" in card and "| student updates | 2 |" in card
    for what, name in (("run", "a.png"), ("run/export", "b.png"), ("run,height=32,width=32", "c.png")):
        drawn = gdmd("sample", what, "-p", CAPTIONS[0], "-n", "2", "-o", name)
        assert drawn.code == 0 and Path(name).is_file(), drawn.err
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes(), "the size of the run may be given"
    other = gdmd("sample", "run,height=64", "-p", CAPTIONS[0])
    assert (
        "height = 64, width = 32, but the run was trained at height=32,width=32; give these, or leave both out"
        in other.err
    )
    Path("run/checkpoints/step_000002/ema.safetensors").write_bytes(b"")
    exported = gdmd("export", "run", "-o", "older")
    assert exported.code == 0 and "step 2 was skipped; step 1 is used" in exported.err
    assert json.loads(Path("older/gdmd_export.json").read_text())["step"] == 1
