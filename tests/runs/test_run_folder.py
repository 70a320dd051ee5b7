"""The run folder: who may use it, what it records, and how its metrics survive a crash."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdmd.config.training import LoopConfig
from gdmd.io import RunError
from gdmd.runs import run_folder as rundir

CONFIG = {"method": {"gamma": 1.0, "modes": ("t", "fake")}, "loop": {"steps": 10, "seed": 0}}


def test_create(tmp_path: Path) -> None:
    run = rundir.create(tmp_path / "a" / "b", CONFIG, ["gdmd", "train", "shapes"])
    assert rundir.open_run(run.path).config == {
        "method": {"gamma": 1.0, "modes": ["t", "fake"]},
        "loop": CONFIG["loop"],
    }
    facts = rundir.read_facts(run.path)
    assert facts["command"] == ["gdmd", "train", "shapes"]
    assert facts["config_sha256"] == rundir.config_hash(CONFIG)
    assert {"python", "torch", "gdmd"} <= facts["versions"].keys()
    assert {"started", "commit", "platform", "cpu_count"} <= facts.keys()
    assert {entry.name for entry in run.path.iterdir()} == {"config.yaml", "run.json", "tb", "grids", "checkpoints"}


def test_config_hash() -> None:
    assert rundir.config_hash({"a": 1, "b": 2}) == rundir.config_hash({"b": 2, "a": 1})
    assert rundir.config_hash({"a": 1, "b": 2}) != rundir.config_hash({"a": 1, "b": 3})


def test_config_round_trip(tmp_path: Path) -> None:
    cfg = LoopConfig(lr_student=3e-5)
    run = rundir.create(tmp_path / "run", cfg.model_dump(mode="json"))
    assert LoopConfig(**rundir.open_run(run.path).config) == cfg


def test_folder_of_another_configuration(tmp_path: Path) -> None:
    rundir.create(tmp_path, CONFIG)
    other = {"method": {"gamma": 0.5, "modes": ["t", "fake"]}, "loop": {"steps": 10, "seed": 0, "clip": 1}}
    with pytest.raises(RunError) as caught:
        rundir.create(tmp_path, other)
    message = str(caught.value)
    assert "method.gamma: 1.0 -> 0.5" in message and "loop.clip: nothing -> 1" in message and "--resume" in message
    assert "modes" not in message and "seed" not in message
    assert rundir.open_run(tmp_path).config["method"]["gamma"] == 1.0


def test_check_same_config(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    longer = {"method": CONFIG["method"], "loop": {"steps": 20, "seed": 0}}
    rundir.check_same_config(run, longer, allowed=["loop.steps"])
    with pytest.raises(RunError, match=r"loop\.steps: 10 -> 20"):
        rundir.check_same_config(run, longer)


def test_same_run_starts_over_without_checkpoints(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    run.log(1, {"loss/student": 1.0})
    assert rundir.read_metrics(rundir.create(tmp_path, CONFIG).path) == []
    (run.checkpoints / "step_000005").mkdir()
    with pytest.raises(RunError, match="already holds this run.*--resume"):
        rundir.create(tmp_path, CONFIG)


def test_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"not empty and is not a run folder.*thesis\.tex"):
        rundir.create(tmp_path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_a_killed_create(tmp_path: Path) -> None:
    (tmp_path / "tb").mkdir()
    (tmp_path / ".config.yaml.partial").write_text("half")
    rundir.create(tmp_path, CONFIG)
    assert rundir.open_run(tmp_path).config["loop"]["steps"] == 10


def test_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file, not a folder"):
        rundir.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunError, match=r"cannot write the run folder.*--run"):
        rundir.create(tmp_path / "file" / "run", CONFIG)


def test_unwritable_place_is_found_before_the_networks_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``check_new``, which ``gdmd train`` calls first, reports it; the folder itself is created last."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the run folder .*file/run: .*file is a file. A part of the path"):
        rundir.check_new(tmp_path / "file" / "run", CONFIG)
    monkeypatch.setattr(rundir.os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(RunError, match=r"no permission to write in .*Check the folder's permissions.*--run"):
        rundir.check_new(tmp_path / "a" / "b", CONFIG)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some disk space"), (errno.EACCES, "permissions"), (errno.EROFS, "read-only")],
)
def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(RunError, match=advice):
            rundir.create(tmp_path / "run", CONFIG)
    run = rundir.create(tmp_path / "run", CONFIG)
    monkeypatch.setattr(rundir.os, "fsync", refuse)
    with pytest.raises(RunError, match=advice):
        run.note_resume(3)
    assert "resumed" not in rundir.read_facts(run.path)
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize("content", ["", "just words", "a: [1", "\0"])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    rundir.create(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunError, match=r"config\.yaml.*Restore it"):
        rundir.open_run(tmp_path)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it does not exist"):
        rundir.open_run(tmp_path / "absent")
    with pytest.raises(RunError, match=r"it holds no config\.yaml"):
        rundir.open_run(tmp_path)


def test_metrics_round_trip(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    run.log(1, {"loss/student": 0.5, "reward/sample": math.nan})
    run.log(2, {"loss/student": 0.25, "reward/sample": 1.0})
    assert '"reward/sample": null' in run.metrics.read_text()
    first, second = rundir.read_metrics(run.path)
    assert first["step"] == 1 and math.isnan(first["reward/sample"])
    assert second == {"step": 2, "loss/student": 0.25, "reward/sample": 1.0}


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\0\0\0", '{"ste'])
def test_rewind(tmp_path: Path, torn: str) -> None:
    run = rundir.create(tmp_path, CONFIG)
    for step in (1, 2, 3):
        run.log(step, {"loss/student": float(step)})
    with run.metrics.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in rundir.read_metrics(run.path)] == [1, 2, 3]
    for step in (2, 3):
        run.grid(step).touch()
    (run.path / "grids" / "comparison.png").touch()
    run.rewind(2)
    assert sorted(grid.name for grid in (run.path / "grids").iterdir()) == ["comparison.png", "step_000002.png"]
    run.log(3, {"loss/student": 9.0})
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()][1:] == [
        {"step": 2, "loss/student": 2.0},
        {"step": 3, "loss/student": 9.0},
    ]


def test_damaged_line(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    for line in ("not json", "[]", "{}", '{"step": "x"}', '{"step": null}'):
        run.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
            rundir.read_metrics(run.path)


def test_last_line_without_newline(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    run.metrics.write_text('{"step": 1}\n{"step": 2}')
    run.log(3, {})
    assert [row["step"] for row in rundir.read_metrics(run.path)] == [1, 2, 3]


def test_note_resume(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, CONFIG)
    run.note_resume(5)
    run.note_resume(8)
    facts = rundir.read_facts(tmp_path)
    assert [entry["step"] for entry in facts["resumed"]] == [5, 8] and "started" in facts


def test_no_torch_import() -> None:
    script = (
        "import sys, gdmd.runs.run_folder, gdmd.runs.assets, gdmd.runs.checkpoint; sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("micro_batch", 5, "micro_batch = 5 does not divide batch_size = 32"),
        ("micro_batch", 64, "does not divide"),
        ("ema", 1.0, "less than 1"),
        ("betas", [0.9, 1.0], "less than 1"),
        ("steps", 0, "greater than or equal to 1"),
        ("lr_student", 0, "greater than 0"),
        ("lr_schedule", "cos", "did you mean 'cosine'"),
    ],
)
def test_invalid_loop_config(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**{field: value})


def test_every_loop_field_has_a_description() -> None:
    assert [name for name, field in LoopConfig.model_fields.items() if not field.description] == []
