"""A student trained on a composite of a Python function and a scorer: from the recipe to the log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import TINY, Gdmd, make_assets

from gdmd.cli.app import main
from gdmd.runs.run_folder import read_metrics

FUNCTION = "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n"
COMPOSITE = "{kind: composite, parts: [{reward: {kind: callable, target: 'bright_reward:bright'}, std: 0.1}]}"


def test_composite_of_a_python_function_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gdmd = Gdmd(main, make_assets(tmp_path / "assets"), tmp_path, monkeypatch, capsys)
    (tmp_path / "bright_reward.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = f"rewards=[{COMPOSITE}, {{kind: shapes_clip}}]"
    finished = gdmd("train", "shapes_smoke", rewards, *TINY, "--run", "run", "--no-eval")
    sys.modules.pop("bright_reward", None)
    assert finished.code == 0, finished.err
    for row in read_metrics(Path("run")):
        raw, standardized = row["reward/composite/bright_reward:bright"], row["reward/composite/target"]
        assert 0 <= raw <= 1 and abs(standardized) <= 10
        assert "reward/shapes_clip/sample" in row


def test_questions_of_the_prompts_train_a_pipeline(tmp_path: Path) -> None:
    """GenEval 2 from a folder, with the gradient of ReFL: every prompt's questions reach the model that answers them."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines
    import tiny_vlms

    from gdmd.config.run import RunConfig
    from gdmd.recipes.build import build
    from gdmd.runs.run_folder import create
    from gdmd.training.loop import train

    tiny_pipelines.save("sd3", tmp_path / "sd3")
    tiny_vlms.save_geneval2(tmp_path / "vlm")
    rows = [
        {"prompt": text, "vqa_list": [[f"How many parts has {text}?", "two"], ["Is it red?", "Yes"]]}
        for text in tiny_pipelines.WORDS
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = RunConfig(
        name="tiny",
        model=tiny_pipelines.config(tmp_path / "sd3"),
        method={"kind": "dmd_refl", "fake_updates": 1, "guidance": 1.0},
        loop={"steps": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 2, "threads": 1},
        prompts={"file": str(tmp_path / "asked.jsonl")},
        rewards=[{"kind": "geneval2", "path": str(tmp_path / "vlm"), "dtype": "fp32"}],
        validation={"every": 0},
        eval={"teacher_steps": 2},
    )
    components, run = build(cfg, "cpu"), create(tmp_path / "run", cfg.model_dump(mode="json"))
    train(components.method, components.roles, components.stream, cfg.loop, run)
    logged = read_metrics(run.path)
    assert len(logged) == 2 and all(0 < row["reward/geneval2/sample"] < 1 and row["loss/refl"] > 0 for row in logged), (
        logged
    )
