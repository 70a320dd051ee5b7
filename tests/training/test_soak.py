"""A few kills of ``make soak``; and that it would notice a difference, a leftover or a leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "tests" / "support" / "soak.py"

if not sys.platform.startswith("linux"):
    pytest.skip("the soak reads /proc", allow_module_level=True)

import soak  # noqa: E402
from toy_training import Toy, toy_config  # noqa: E402


def test_killed_runs_equal_the_whole_one(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    words = ["--kills", "5", "--steps", "30", "--flat-steps", "50", "--json", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, str(SOAK), *words], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(report.read_text())
    assert found["ok"] and found["kills"]["kills"] == 5 and found["kills"]["runs"] >= 1


def test_soak_notices_differences(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for run, seed in ((one, 3), (other, 4)):
        Toy(run, toy_config(5, seed=seed)).train()
    assert {"student/layers.0.weight", "ema/layers.0.weight", "metrics.jsonl"} <= set(soak.differences(one, other))
    assert soak.differences(one, one) == [] and soak.leftovers(one) == []
    (one / "checkpoints" / ".step_000005.partial").mkdir()
    (one / "core").touch()
    assert soak.leftovers(one) == ["core", ".step_000005.partial"]


def test_soak_notices_deaths_and_leaks() -> None:
    assert soak.attempt(lambda: None) == 0 and soak.attempt(lambda: os.kill(os.getpid(), 15)) == -15
    assert soak.Flat(9, [6, 6], [200.0, 201.0], [450.0, 455.0]).ok()
    assert not soak.Flat(9, [6, 7], [200.0, 201.0], [450.0, 455.0]).ok()
    assert not soak.Flat(9, [6, 6], [200.0, 230.0], [450.0, 455.0]).ok()
    assert not soak.Flat(9, [6, 6], [200.0, 201.0], [450.0, 900.0]).ok()
    assert soak.Kills(kills=1, most_steps_lost=5).ok(5) and not soak.Kills(most_steps_lost=6).ok(5)
    assert not soak.Kills(died_by_themselves=[1]).ok(5) and not soak.Kills(leftovers=["x"]).ok(5)
