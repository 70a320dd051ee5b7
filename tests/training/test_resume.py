"""Resume == no interruption, bit for bit: parameters, EMA, optimizer state, old policy, method state and metrics."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import Toy, signal_at, toy_config, untimed_metrics

from gdmd.runs import checkpoint

pytestmark = pytest.mark.usefixtures("no_fsync")

ROOT = Path(__file__).resolve().parents[2]


def final_tensors(folder: Path) -> dict[str, Tensor]:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    return {f"{part}/{name}": tensor for part, named in saved.tensors.items() for name, tensor in named.items()}


def assert_same_run(first: Path, second: Path) -> None:
    a, b = final_tensors(first), final_tensors(second)
    assert a.keys() == b.keys()
    assert {name.split("/")[0] for name in a} == {
        "student", "fake", "ema", "optim_student", "optim_fake", "old", "method"
    }  # fmt: skip
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert untimed_metrics(first) == untimed_metrics(second)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    Toy(folder, toy_config(40)).train()
    return folder


@pytest.mark.parametrize("stop", [1, 7, 20, 39])
def test_resume_after_ctrl_c_is_bit_exact(stop: int, uninterrupted: Path, tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    end = Toy(folder, toy_config(40), interrupt).train()
    assert (end.step, end.signal, end.exit_code) == (stop, signal.SIGINT, 130)
    assert Toy(folder, toy_config(40)).train().exit_code == 0
    assert_same_run(uninterrupted, folder)


def test_resume_after_sigkill_is_bit_exact(uninterrupted: Path, tmp_path: Path) -> None:
    folder, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "tests" / "support" / "toy_training.py"), str(folder), "40", "0.02"]
    steps = random.SystemRandom().randint(2, 35)
    process = subprocess.Popen(words, env=environment)
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert process.poll() is None and time.monotonic() < deadline, "the toy program did not get so far"
        time.sleep(0.003)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = json.loads(metrics.read_text().rstrip("\n").split("\n")[-1])["step"]
    newest = max(checkpoint.steps(folder / "checkpoints"), default=0)
    assert newest >= reached - 5, f"killed after step {reached}: more than the interval of 5 was lost"
    Toy(folder, toy_config(40)).train()
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize(
    ("moment", "newest"), [("_sha256", 5), ("_digest", 5), ("_choose_and_rotate", 10)], ids=lambda value: str(value)
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sigkill_while_writing_loses_at_most_that_checkpoint(
    uninterrupted: Path, tmp_path: Path, moment: str, newest: int
) -> None:
    folder, real = tmp_path / "run", getattr(checkpoint, moment)

    def killed(*given: object) -> object:
        if list((folder / "checkpoints").glob("*step_000010*")):
            assert threading.current_thread().name == "gdmd-checkpoint"
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    def life() -> None:
        setattr(checkpoint, moment, killed)
        Toy(folder, toy_config(40, checkpoint_async=True)).train()

    child = multiprocessing.get_context("fork").Process(target=life)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None and saved.step == newest and saved.messages == ()
    Toy(folder, toy_config(40)).train()
    assert_same_run(uninterrupted, folder)
    assert not list((folder / "checkpoints").glob(".*"))


def test_resume_after_damage_is_bit_exact(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    assert Toy(folder, toy_config(40), signal_at(16)).train().exit_code == 143
    weights = folder / "checkpoints" / "step_000017" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    Toy(folder, toy_config(40)).train()
    assert_same_run(uninterrupted, folder)
    assert (folder / "checkpoints" / "step_000017.damaged").is_dir()


def test_another_seed_gives_another_run(uninterrupted: Path, tmp_path: Path) -> None:
    Toy(tmp_path / "run", toy_config(40, seed=4)).train()
    assert not torch.equal(
        final_tensors(uninterrupted)["student/layers.0.weight"],
        final_tensors(tmp_path / "run")["student/layers.0.weight"],
    )
