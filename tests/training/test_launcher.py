"""`gdmd train --gpus 2`: kills, signals and restarts through torchrun's launcher; and the example scripts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from gdmd.cli.app import main
from gdmd.cli.train import TrainOptions
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, read_facts, read_metrics
from gdmd.training.distributed import _exit_code
from gdmd.training.rank import module_arguments
from gdmd.types import PromptBatch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name: tiny
model: {kind: shapes}
method: {kind: gdmd, group_size: 1}
loop: {steps: 10000, batch_size: 4, checkpoint_every: 10000, log_every: 1, threads: 1}
validation: {every: 0}
rewards: [{kind: callable, target: 'test_launcher:deadly'}]
"""


def deadly(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward that kills rank 1 in the launcher's first attempt."""
    if os.environ["GDMD_TEST_KILL"] and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[bytes], Path]]:
    """Starts `gdmd train ... --gpus 2`; returns the launcher and the file of its output."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, kill: bool = False) -> tuple[subprocess.Popen[bytes], Path]:
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gdmd", "train", *arguments, "--no-eval", "--gpus", "2"]
        log = tmp_path / f"log_{len(started)}"
        with log.open("w") as output:
            environment = os.environ | own | {"GDMD_TEST_KILL": "1" if kill else ""}
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return started[-1], log

    yield start
    for launcher in started:
        launcher.kill()


def recipe(folder: Path) -> str:
    (folder / "recipe.yaml").write_text(RECIPE)
    return str(folder / "recipe.yaml")


def wait(seconds: float, log: Path, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_kill_restart_and_sigterm(tmp_path: Path, launch: Callable[..., tuple[subprocess.Popen[bytes], Path]]) -> None:
    """Ranks save and stop when their launcher is killed; torchrun restarts a killed rank; SIGTERM stops them all."""
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
    reached = lambda: int(rows[-1]["step"]) if (rows := read_metrics(run)) else 0  # noqa: E731

    launcher, log = launch(recipe(tmp_path), "--run", str(run))
    wait(200, log, lambda: reached() > 0)
    launcher.kill()
    wait(60, log, lambda: "stopped at step" in log.read_text())
    before = reached()
    assert checkpoint.steps(saved) == [before]

    launcher, log = launch("--resume", str(run), "--restarts", "1", kill=True)
    wait(250, log, lambda: reached() > before)
    assert [one["step"] for one in read_facts(run)["resumed"]] == [before, before]
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(100) == 143, log.read_text()
    assert "stopped at step" in log.read_text()
    assert checkpoint.steps(saved)[-1] == reached()
    assert [row["step"] for row in read_metrics(run)] == list(range(1, reached() + 1))


@pytest.mark.parametrize(("code", "hint"), [(137, True), (4, True), (2, False), (143, False)])
def test_resume_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, hint: bool
) -> None:
    """After a failure of a rank; not after bad input or a signal, which rank 0 reports itself."""
    monkeypatch.setattr("gdmd.training.distributed.launch", lambda *given: code)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "shapes_smoke", "--gpus", "2", "--run", str(tmp_path)])
    assert stopped.value.code == code
    assert (f"resume with: gdmd train --resume {tmp_path} --gpus 2" in capsys.readouterr().err) == hint


@pytest.mark.parametrize(
    ("first", "other", "code"), [(-9, 4, 137), (-9, -15, 137), (-9, 143, 137), (2, 4, 2), (-6, 4, 4)]
)
def test_exit_code_of_a_failed_run(first: int, other: int, code: int) -> None:
    """It is that of the rank that failed first; an abort is NCCL's timeout."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failures = {rank: ProcessFailure(rank, 100 + rank, end, "") for rank, end in enumerate((other, first))}
    for failure in failures.values():
        failure.timestamp = 7  # whole seconds: the others end within the same one
    assert _exit_code(failures) == code


def test_module_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the current folder does not hide a module of a rank."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # as the program ``gdmd`` is found: not by the current folder
    call = [sys.executable, *module_arguments("gdmd"), "--version"]
    found = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("gdmd "), found.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module_arguments("gdmd") == ["-m", "gdmd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loop.batch_size=3", "--gpus", "2"], "loop.batch_size = 3 does not divide among 2 ranks"),
        (["--restarts", "2"], "--restarts needs --gpus N"),
    ],
)
def test_wrong_launch_options_create_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "shapes_smoke", *arguments, "--run", str(tmp_path / "run")])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert message in capsys.readouterr().err


def test_restarted_ranks_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torchrun --max-restarts` starts again with the same arguments resumes the run, if there is one."""
    options = TrainOptions("shapes_smoke", (), tmp_path / "run", None, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert options.after_restart() == options
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert options.after_restart() == options  # killed before there was a run
    create(tmp_path / "run", {})
    assert options.after_restart() == replace(options, run=None, resume=tmp_path / "run")
    with pytest.raises(ValueError, match="no --run names the folder"):
        replace(options, run=None).after_restart()


# ---------------------------------------------------------------- examples/*.sh


JOB = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
HEAD = {"HEAD": "node1", "NODES": "2"}


@pytest.fixture
def example(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs an example with a torchrun and a gdmd that only print their arguments, one per line."""
    (tmp_path / "bin").mkdir()
    stubs = {"nvidia-smi": 'printf "GPU\\nGPU\\nGPU\\n"', "srun": 'exec "$@"', "scontrol": 'printf "node1\\nnode2\\n"'}
    stubs |= {name: f'printf "%s\\n" {name} "$@"' for name in ("torchrun", "gdmd")}
    for name, stub in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{stub}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script: str, *arguments: str, **environment: str) -> list[str]:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        line = ["bash", str(ROOT / "examples" / script), *arguments]
        done = subprocess.run(line, env={"PATH": path} | environment, capture_output=True, text=True, cwd=tmp_path)
        if done.returncode:
            raise ValueError(done.stderr)
        return done.stdout.splitlines()

    return run


def test_example_for_one_machine(example: Callable[..., list[str]], tmp_path: Path) -> None:
    fresh = example("one_node.sh", "sdxl_gdmd", "prompts.file=a file.txt")
    assert fresh == shlex.split("gdmd train sdxl_gdmd 'prompts.file=a file.txt' --run runs/sdxl_gdmd --gpus 3")
    (tmp_path / "runs/sdxl_gdmd/checkpoints/step_000050").mkdir(parents=True)
    again = example("one_node.sh", "sdxl_gdmd", "prompts.file=a file.txt", GPUS="2")
    assert again == shlex.split("gdmd train --resume runs/sdxl_gdmd --gpus 2")
    with pytest.raises(ValueError, match="give a recipe"):
        example("one_node.sh")


@pytest.mark.parametrize(
    ("script", "environment", "asked"),
    [
        ("several_nodes.sh", HEAD, ("2", "3", "node1:29500", "sdxl")),
        ("slurm_train.sh", JOB, ("2", "4", "node1:29500", "17")),
    ],
)
def test_examples_for_several_machines(
    example: Callable[..., list[str]], tmp_path: Path, script: str, environment: dict[str, str], asked: tuple[str, ...]
) -> None:
    """torchrun understands them, and the same command resumes the run."""
    from torch.distributed.run import parse_args

    given = environment | {"RUN": str(tmp_path / "sdxl")}
    torchrun, *arguments = example(script, "sdxl_gdmd", "prompts.file=p.txt", **given)
    found = parse_args(arguments)
    assert torchrun == "torchrun" and found.module and found.training_script == "gdmd"
    assert (found.nnodes, found.nproc_per_node, found.rdzv_endpoint, found.rdzv_id) == asked
    fresh = f"train sdxl_gdmd prompts.file=p.txt --run {given['RUN']} --no-eval"
    assert found.training_script_args == shlex.split(fresh)
    (tmp_path / "sdxl/checkpoints/step_000050").mkdir(parents=True)
    again = parse_args(example(script, "sdxl_gdmd", **given)[1:])
    assert again.training_script_args == shlex.split(f"train --resume {given['RUN']} --no-eval")
    if script == "several_nodes.sh":
        for missing in given:
            with pytest.raises(ValueError, match=missing):
                example(script, "sdxl_gdmd", **{name: value for name, value in given.items() if name != missing})


def test_a_script_may_train_several_times(tmp_path: Path) -> None:
    """Ranks found the addresses of the session before: the second training failed to connect, or never began."""
    script = tmp_path / "several.py"
    script.write_text(
        """
from gdmd.training.distributed import session
for number in range(4):
    with session() as context:
        assert context.all_gather_object((number, context.rank)) == [(number, 0), (number, 1)]
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
