"""torchrun's restarts: a rank is killed, all are started again, and the run ends as the undisturbed one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from gdmd.cli.app import main
from gdmd.cli.train import Asked
from gdmd.runs.run_folder import create, read_facts, read_metrics
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


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs an example with a torchrun and a gdmd that only print their words, each on a line."""
    (tmp_path / "bin").mkdir()
    stubs = {"nvidia-smi": 'printf "GPU\\nGPU\\nGPU\\n"', "srun": 'exec "$@"', "scontrol": 'printf "node1\\nnode2\\n"'}
    stubs |= {name: f'printf "%s\\n" {name} "$@"' for name in ("torchrun", "gdmd")}
    for name, stub in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{stub}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script: str, *words: str, **environment: str) -> list[str]:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        line = ["bash", str(ROOT / "examples" / script), *words]
        done = subprocess.run(line, env={"PATH": path} | environment, capture_output=True, text=True, cwd=tmp_path)
        if done.returncode:
            raise ValueError(done.stderr)
        return done.stdout.splitlines()

    return run


def test_the_example_for_one_machine_trains_and_goes_on(said: Callable[..., list[str]], tmp_path: Path) -> None:
    fresh = said("one_node.sh", "sdxl_gdmd", "prompts.file=a file.txt")
    assert fresh == ["gdmd", "train", "sdxl_gdmd", "prompts.file=a file.txt", "--run", "runs/sdxl_gdmd", "--gpus", "3"]
    (tmp_path / "runs/sdxl_gdmd/checkpoints/step_000050").mkdir(parents=True)
    again = said("one_node.sh", "sdxl_gdmd", "prompts.file=a file.txt", GPUS="2")
    assert again == ["gdmd", "train", "--resume", "runs/sdxl_gdmd", "--gpus", "2"]
    with pytest.raises(ValueError, match="give a recipe"):
        said("one_node.sh")


def test_the_example_for_several_machines_is_understood_by_torchrun(
    said: Callable[..., list[str]], tmp_path: Path
) -> None:
    from torch.distributed.run import parse_args

    given = {"HEAD": "node1", "NODES": "2", "RUN": str(tmp_path / "first")}
    torchrun, *words = said("several_nodes.sh", "sdxl_gdmd", "prompts.file=p.txt", **given)
    asked = parse_args(words)
    assert torchrun == "torchrun" and asked.module and asked.training_script == "gdmd"
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_endpoint, asked.rdzv_id) == (
        "2",
        "3",
        "node1:29500",
        "first",
    )
    assert asked.training_script_args == [
        "train", "sdxl_gdmd", "prompts.file=p.txt", "--run", given["RUN"], "--no-eval",
    ]  # fmt: skip
    (tmp_path / "first/checkpoints/step_000050").mkdir(parents=True)
    again = parse_args(said("several_nodes.sh", "sdxl_gdmd", **given)[1:])
    assert again.training_script_args == ["train", "--resume", given["RUN"], "--no-eval"]
    for missing in given:
        with pytest.raises(ValueError, match=missing):
            said("several_nodes.sh", "sdxl_gdmd", **{name: value for name, value in given.items() if name != missing})


def test_the_example_for_slurm_asks_for_all_machines_and_goes_on_when_it_is_submitted_again(
    said: Callable[..., list[str]], tmp_path: Path
) -> None:
    from torch.distributed.run import parse_args

    job = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    torchrun, *words = said("slurm_train.sh", "sdxl_gdmd", "loop.batch_size=256", **job)
    asked = parse_args(words)
    assert torchrun == "torchrun" and asked.module and asked.training_script == "gdmd"
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_endpoint, asked.rdzv_id) == ("2", "4", "node1:29500", "17")
    assert asked.training_script_args == [
        "train", "sdxl_gdmd", "loop.batch_size=256", "--run", "runs/sdxl_gdmd", "--no-eval",
    ]  # fmt: skip
    (tmp_path / "runs/sdxl_gdmd/checkpoints/step_000050").mkdir(parents=True)
    again = parse_args(said("slurm_train.sh", "sdxl_gdmd", "loop.batch_size=256", **job)[1:])
    assert again.training_script_args == ["train", "--resume", "runs/sdxl_gdmd", "--no-eval"]
