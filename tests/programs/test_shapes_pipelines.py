"""A diffusers pipeline trained on the Shapes world trains, evaluates, reports and compares as the Shapes teacher does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import numpy as np
import tiny_pipelines as tiny
import yaml
from cli_world import Gdmd
from PIL import Image

from gdmd.config import shapes_pipeline
from gdmd.config.image_source import read_source
from gdmd.config.run import RunConfig
from gdmd.recipes.build import build
from gdmd.recipes.open_run import teacher_row
from gdmd.sources.base import SourceInfo, image_slots
from gdmd.sources.open import open_source
from gdmd.sources.runs import RunSource

TILTED = {"kind": "gdmd_tilted", "group_size": 1, "continuations": 2, "reward_gradient": 1.0, "guidance": 3.0}
PLAIN = {"kind": "dmd", "fake_updates": 1, "guidance": 3.0}
QUICK = ("--per-task", "1", "-n", "1")


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained pipelines marked as trained on the Shapes world, by family; "sd15" is not marked."""
    folder = tmp_path_factory.mktemp("miniatures")
    for name in ("sd3", "sdxl"):
        tiny.save_shapes(name, folder / name)
    tiny.save("sd15", folder / "sd15")
    return folder


@pytest.fixture(autouse=True)
def _shipped(miniatures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_pipeline, "PIPELINES", miniatures)


def write_recipe(path: str, method: dict[str, Any], **model: Any) -> RunConfig:
    cfg = RunConfig(
        name="tiny",
        model={"kind": "diffusers", "path": path, "height": 32, "width": 32, "dtype": "fp32", "lora_rank": 2, **model},
        method=method,
        loop={"steps": 2, "batch_size": 2, "threads": 1, "checkpoint_every": 1, "lr_student": 1e-2},
        validation={"every": 2},
        eval={"per_task": 1, "images": 2, "teacher_steps": 2},
    )
    Path("tiny.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    return cfg


def test_prompts_and_rewards_of_the_shapes_world(miniatures: Path) -> None:
    cfg = RunConfig(
        name="x",
        model=tiny.config(miniatures / "sd3", max_tokens=tiny.SHAPES_TOKENS),
        method=TILTED,
        loop={"batch_size": 2},
    )
    components = build(cfg, "cpu")
    assert [reward.name for reward in components.rewards] == ["shapes_clip", "shapes_pref"]
    assert len(components.stream.groups) == 6  # one per task


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_run_is_measured_as_a_shapes_run(gdmd: Gdmd, miniatures: Path, name: str) -> None:
    path, tokens = ("shapes:sd3", tiny.SHAPES_TOKENS) if name == "sd3" else (str(miniatures / "sdxl"), 0)
    cached = {"embeddings": "texts"} if name == "sdxl" else {}  # of the evaluation's captions, too
    write_recipe(path, TILTED if name == "sd3" else PLAIN, max_tokens=tokens, **cached)
    trained = gdmd("train", "tiny.yaml", "--run", "run", "--json")
    assert trained.code == 0, trained.err
    assert "gdmd export run" in trained.err and "eval preference" not in trained.err
    found = json.loads(trained.out)["evaluation"]
    assert found["nfe"] == 4 and found["images"] == 12 and {*found["rewards"]} > {"shapes_clip", "shapes_clip_heldout"}
    assert Path("run/grids/comparison.png").is_file() and Path("run/grids/step_000002.png").is_file()
    again = gdmd("eval", "run", "--json")
    assert again.code == 0, again.err
    for key in ("shapeseval", "rewards", "fidelity", "coverage", "frechet"):
        assert json.loads(again.out)[key] == pytest.approx(found[key], abs=1e-5, nan_ok=True)
    assert gdmd("report", "run").code == 0
    rows = json.loads(Path("run/evaluation.json").read_text())
    assert [(name, row["nfe"]) for name, row in rows.items()][:3] == [
        ("teacher, 2 steps", 4),
        ("teacher, 4 steps", 8),
        ("teacher, 4 plain steps", 4),
    ]
    assert len(rows) == 4 and "ShapesEval" in Path("run/report.html").read_text()
    if name == "sd3":
        recorded = Path("run/run.json").read_text() + Path("run/config.yaml").read_text()
        assert "shapes:sd3" in recorded and str(miniatures) not in recorded


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_teacher_row_is_the_stock_pipeline(gdmd: Gdmd, name: str) -> None:
    cfg = write_recipe(f"shapes:{name}", PLAIN, max_tokens=tiny.SHAPES_TOKENS if name == "sd3" else 0)
    components = build(cfg, "cpu")
    own = RunSource(SourceInfo("own", "teacher", "teacher"), components, teacher_row(cfg, components, "teacher"))
    stock = open_source(read_source(f"shapes:{name},steps=2,guidance=3,dtype=fp32"))
    slots = image_slots(["a red circle", "two blue rings"], 2)
    pairs = zip(own.generate(slots, 5), stock.generate(slots, 5), strict=True)
    assert max(abs(np.asarray(one, int) - np.asarray(other, int)).max() for one, other in pairs) <= 1
    assert stock.info.shapes and stock.info.trained == () and stock.info.batch == 100


def test_run_of_a_moved_pipeline_needs_its_new_path(gdmd: Gdmd, miniatures: Path) -> None:
    write_recipe(str(shutil.copytree(miniatures / "sd3", "before")), TILTED, max_tokens=tiny.SHAPES_TOKENS)
    assert gdmd("train", "tiny.yaml", "--run", "run").code == 0
    Path("before").rename("now")
    missing = gdmd("eval", "run")
    assert missing.code == 2 and "gdmd train --resume run model.path=FOLDER" in missing.err
    Path("run/report.html").unlink()
    assert gdmd("report", "run").code == 0 and "ShapesEval" in Path("run/report.html").read_text()
    assert gdmd("export", "run", "--base", "now").code == 0
    drawn = gdmd("sample", "run,base=now", "-p", "a red circle", "-n", "1")
    assert drawn.code == 0, drawn.err


def test_student_of_a_distilled_base(gdmd: Gdmd) -> None:
    """Guidance 1, as a distilled base needs it, is that of the run when its student is opened again."""
    write_recipe("shapes:sdxl", PLAIN | {"guidance": 1.0}, distilled=True)
    assert gdmd("train", "tiny.yaml", "--run", "run", "--no-eval").code == 0
    drawn = gdmd("sample", "run", "-p", "a red circle", "-n", "1")
    assert drawn.code == 0, drawn.err


def test_compare_pipeline_run_and_exports(gdmd: Gdmd, miniatures: Path) -> None:
    write_recipe("shapes:sd3", PLAIN, max_tokens=tiny.SHAPES_TOKENS)
    assert gdmd("train", "tiny.yaml", "--run", "run", "--no-eval").code == 0
    assert gdmd("export", "run").code == 0 and gdmd("export", "run", "--merged").code == 0
    assert json.loads(Path("run/export/gdmd_export.json").read_text())["base"] == "shapes:sd3"
    assert 'from_pretrained(files("gdmd") / "assets/pipelines/sd3"' in Path("run/export/README.md").read_text()
    sources = ("lora=run/export", "merged=run/export-merged", "run", "base=shapes:sd3,steps=2,guidance=3,dtype=fp32")
    compared = gdmd("eval", "compare", *sources, "-o", "all", *QUICK)
    assert compared.code == 0, compared.err
    rows = json.loads(Path("all/compare.json").read_text())["rows"]
    assert all("shapeseval" in row and "shapes_clip_heldout" in row["scores"] for row in rows.values())
    pixels = {
        name: np.stack([np.asarray(Image.open(file), int) for file in sorted(Path("all", name).rglob("*.png"))])
        for name in rows
    }
    assert pixels["base"].shape == (6, 32, 32, 3)
    for name in ("lora", "merged"):
        assert abs(pixels[name] - pixels["run"]).max() <= 2
    assert abs(pixels["base"] - pixels["run"]).mean() > 2
    word = gdmd("sample", "shapes:sd3", "-p", "a red zebra", "-o", "zebra.png")
    assert word.code == 2 and "unknown word 'zebra'" in word.err
    mixed = gdmd("eval", "compare", "shapes:sd3", str(miniatures / "sd15"), "-o", "both", *QUICK)
    assert mixed.code == 2 and "no prompts or scorers suit both" in mixed.err
    unknown = gdmd("eval", "preference", "shapes:sd4", "-o", "none")
    assert unknown.code == 2 and "did you mean 'shapes:sd3'" in unknown.err


def test_prompts_must_be_captions(gdmd: Gdmd) -> None:
    write_recipe("shapes:sd3", TILTED, max_tokens=tiny.SHAPES_TOKENS)
    Path("prompts.txt").write_text("a red circle\na cat on a sofa\n")
    refused = gdmd("train", "tiny.yaml", "prompts.file=prompts.txt", "--run", "run")
    assert refused.code == 2 and "prompts.txt, line 2: not a caption" in refused.err and not Path("run").exists()


def test_other_pipelines_are_not_measured(gdmd: Gdmd, miniatures: Path) -> None:
    write_recipe(str(miniatures / "sd15"), PLAIN)
    nothing = gdmd("train", "tiny.yaml", "--run", "run")
    assert nothing.code == 2 and "prompts.file is not set" in nothing.err
    Path("prompts.txt").write_text("a red circle\n")
    trained = gdmd("train", "tiny.yaml", "prompts.file=prompts.txt", "--run", "run", "--json")
    assert trained.code == 0 and json.loads(trained.out)["evaluation"] is None, trained.err
    refused = gdmd("eval", "run")
    assert refused.code == 2 and "gdmd eval preference run" in refused.err
    assert gdmd("report", "run").code == 0 and not Path("run/evaluation.json").exists()
    assert "ShapesEval" not in Path("run/report.html").read_text()
