"""benchmarks/startup.py sees what a program makes, in its order, and says when the program ends before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import startup

if not sys.platform.startswith("linux"):
    pytest.skip("it reads /proc", allow_module_level=True)

PROGRAM = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[1])
(run / "grids").mkdir(parents=True)
time.sleep(0.2)
(run / "grids" / "step_000000.png").touch()
(run / "metrics.jsonl").touch()
time.sleep(0.2)
(run / "metrics.jsonl").write_text("{}")
time.sleep(float(sys.argv[2]))
"""


def test_it_sees_when_a_run_is_loaded_begins_and_logs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen = startup.started([sys.executable, "-c", PROGRAM, str(run), "60"], run)
    walls = [wall for wall, _ in seen.values()]
    assert list(seen) == ["loaded", "first step begins", "first step is logged"]
    assert walls[0] < walls[1] < walls[2] and walls[2] - walls[0] > 0.3


def test_a_program_that_ends_before_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there was only: {}; exit code 3"):
        startup.started([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "run")
