"""torchrun's restarts: a rank is killed, all are started again, and the run ends as the undisturbed one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from gdmd.cli.app import main
from gdmd.cli.training import Asked
from gdmd.runs.rundir import create, read_facts, read_metrics
from gdmd.types import PromptBatch

ROOT = Path(__file__).resolve().parents[2]


def deadly(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward that kills rank 1 once, as soon as there is a checkpoint."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and list(folder().glob("step_*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))


def folder() -> Path:
    return Path(os.environ["GDMD_TEST_RUN"]) / "checkpoints"


def test_a_killed_rank_is_started_again_with_all_others_and_the_run_goes_on_by_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\nmodel: {kind: shapes}\nmethod: {kind: gdmd, group_size: 1}\n"
        "loop: {steps: 4, batch_size: 2, checkpoint_every: 1, log_every: 1, grid_every: 0, threads: 1}\n"
        "rewards: [{kind: callable, target: 'test_restarts:deadly'}]\n"
    )
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GDMD_TEST_RUN": str(run)}
    words = ["train", str(tmp_path / "recipe.yaml"), "--no-eval", "--run", str(run), "--gpus", "2", "--restarts", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "gdmd", *words], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    resumed = read_facts(run)["resumed"]
    assert len(resumed) == 1 and resumed[0]["step"] >= 1, done.stderr
    assert "resumed from step" in done.stderr


def test_only_restarted_ranks_take_up_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked("shapes_smoke", (), tmp_path / "run", None, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert asked.again() == asked
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert asked.again() == asked  # killed before there was a run
    create(tmp_path / "run", {})
    assert asked.again() == replace(asked, run=None, resume=tmp_path / "run")
    assert asked.again().again() == asked.again()
    with pytest.raises(ValueError, match="no --run names the folder"):
        replace(asked, run=None).again()


def test_restarts_without_several_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "shapes_smoke", "--restarts", "2"])
    assert stopped.value.code == 2 and "--restarts belongs to --gpus N" in capsys.readouterr().err


def test_the_commands_that_are_shown_are_understood_by_torchrun() -> None:
    from torch.distributed.run import parse_args

    script = (
        (ROOT / "examples" / "slurm_train.sh")
        .read_text()
        .replace('"${WORDS[@]}"', "train shapes --run runs/x --no-eval")
    )
    shown = (ROOT / "docs" / "distributed.md").read_text() + script
    commands = re.findall(r"^(?:srun )?torchrun ((?:.*\\\n)*.*)$", shown, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        said = parse_args(shlex.split(command.replace("\\\n", " "), comments=True))
        assert said.module and said.training_script == "gdmd" and said.training_script_args[0] == "train", command
    assert sum("--run" in command for command in commands) == 2
