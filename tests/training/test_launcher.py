"""The real `gdmd train --gpus 2`: its launcher is killed outright, and its run goes on with another number of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdmd.cli.app import main
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import read_facts, read_metrics
from gdmd.training.distributed import _first_failure, _told
from gdmd.training.rank import module_words
from gdmd.types import PromptBatch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name: tiny
model: {kind: shapes}
method: {kind: gdmd, group_size: 1}
loop: {steps: STEPS, batch_size: 4, checkpoint_every: 1, log_every: 1, grid_every: 0, threads: 1}
rewards: [{kind: callable, target: 'test_launcher:signed'}]
"""


def signed(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward that leaves the number of its process in the folder PIDS."""
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    return images.mean((1, 2, 3))


def command(folder: Path, *words: str) -> tuple[Sequence[str], dict[str, str]]:
    """Words and environment of `gdmd train` with two ranks on this CPU."""
    (folder / "pids").mkdir(exist_ok=True)
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PIDS": str(folder / "pids")}
    return [sys.executable, "-m", "gdmd", "train", *words, "--no-eval"], os.environ | own


def test_a_file_of_the_current_folder_hides_no_module_of_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # as the program ``gdmd`` is found: not by the current folder
    call = [sys.executable, *module_words("gdmd"), "--version"]
    found = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("gdmd "), found.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module_words("gdmd") == ["-m", "gdmd"]  # python -m gdmd: its ranks find what it finds


def recipe(folder: Path, steps: int) -> str:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("STEPS", str(steps)))
    return str(path)


def ranks(folder: Path) -> list[int]:
    """The processes that have scored something and are still there; one that only waits to be collected is not."""
    return [int(pid.name) for pid in (folder / "pids").iterdir() if _works(pid.name)]


def _works(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(seconds: float, what: str, told: Path, done: Callable[[], bool]) -> None:
    """Until ``done()``; AssertionError with the end of the log after that."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{told.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_a_killed_launcher_a_killed_rank_and_sigterm_end_all_ranks_and_the_run_goes_on_each_time(
    tmp_path: Path,
) -> None:
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
    launched: list[subprocess.Popen[bytes]] = []

    def life(name: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
        asked, environment = command(tmp_path, *words, "--gpus", "2")
        log = tmp_path / name
        with log.open("w") as told:
            launched.append(subprocess.Popen(asked, env=environment, stdout=told, stderr=told, start_new_session=True))
        return launched[-1], log

    reached = lambda: int(rows[-1]["step"]) if (rows := read_metrics(run)) else 0  # noqa: E731
    try:
        launcher, log = life("first", recipe(tmp_path, 10_000), "--run", str(run))
        wait(200, "two ranks with a checkpoint", log, lambda: saved.exists() and len(checkpoint.steps(saved)) > 1)
        assert len(ranks(tmp_path)) == 2
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(20)
        wait(100, "the end of both ranks", log, lambda: not ranks(tmp_path))
        assert "lost" in log.read_text(), log.read_text()[-3000:]

        before = checkpoint.load_newest(saved).step
        launcher, log = life("second", "--resume", str(run))
        wait(200, "a checkpoint after the resume", log, lambda: checkpoint.steps(saved)[-1] > before)
        assert len(ranks(tmp_path)) == 2
        os.kill(ranks(tmp_path)[1], signal.SIGKILL)
        assert launcher.wait(100) == 137, log.read_text()[-3000:]
        assert "was ended by SIGKILL" in log.read_text()
        assert f"go on with: gdmd train --resume {run} --gpus 2" in log.read_text()

        before = reached()
        launcher, log = life("third", "--resume", str(run), "loop.checkpoint_every=10000")
        wait(200, "a step after the resume", log, lambda: reached() > before)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(100) == 143, log.read_text()[-3000:]
        assert "stopped at step" in log.read_text()
    finally:
        for launcher in launched:
            launcher.kill()
        for pid in ranks(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert checkpoint.steps(saved)[-1] == reached() > before
    assert [row["step"] for row in read_metrics(run)] == list(range(1, reached() + 1))


@pytest.mark.parametrize(("other", "code"), [(4, 137), (-15, 137), (143, 137), (2, 2)])
def test_the_code_is_that_of_the_rank_that_failed_before_the_others_lost_it(other: int, code: int) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failures = {rank: ProcessFailure(rank, 100 + rank, end, "") for rank, end in enumerate((other, -9))}
    for failure in failures.values():
        failure.timestamp = 7  # whole seconds: in one of them the others end, too
    assert _told(*_first_failure(failures)) == code


def test_a_run_of_one_process_goes_on_with_two_and_ends_as_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, environment = command(tmp_path, "--resume", str(tmp_path / "grown"), "loop.steps=4", "--gpus", "2")
    monkeypatch.setenv("PIDS", environment["PIDS"])

    def run_to_end(*words: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["train", recipe(tmp_path, 4), *words, "--no-eval"])
        assert not ended.value.code

    alone, grown = tmp_path / "alone", tmp_path / "grown"
    run_to_end("--run", str(alone))
    run_to_end("--run", str(grown), "loop.steps=2")
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert read_facts(grown)["resumed"][0]["step"] == 2
    assert [row["step"] for row in read_metrics(grown)] == [1, 2, 3, 4]
    ends = [checkpoint.load_newest(folder / "checkpoints").tensors for folder in (alone, grown)]
    for part in ("student", "ema", "fake"):
        one, two = (torch.cat([end[part][name].double().flatten() for name in sorted(end[part])]) for end in ends)
        assert (one - two).norm() < 1e-5 * one.norm(), part
        assert not torch.equal(one, torch.zeros_like(one))
