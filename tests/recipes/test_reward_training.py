"""A student trained on a composite of a Python function and a scorer: from the recipe to the log."""

from __future__ import annotations

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
