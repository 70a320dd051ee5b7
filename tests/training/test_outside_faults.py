"""Faults outside a run: the clock jumps, the reward server fails and recovers, the disk fills or becomes read-only."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import TIMED, Toy, full_disk, student_weights, toy_config, untimed_metrics

from gdmd.config.load import load_config
from gdmd.config.rewards import RemoteConfig
from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream
from gdmd.io import RunError
from gdmd.recipes.build import SHAPES, method_of
from gdmd.rewards.remote import RemoteError, RemoteReward
from gdmd.runs import checkpoint
from gdmd.runs import run_folder as rundir
from gdmd.shapes.grammar import training_captions
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.roles import ShapesCodec, ShapesRoles, ShapesTextEncoder
from gdmd.training.loop import train

pytestmark = pytest.mark.usefixtures("no_fsync")

HEARD: list[str | None] = []
"""The Authorization of each request to the server."""


def same_run(first: Path, second: Path) -> bool:
    a, b = student_weights(first), student_weights(second)
    return all(torch.equal(a[name], b[name]) for name in a) and untimed_metrics(first) == untimed_metrics(second)


def test_jumps_of_the_system_clock_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Toy(tmp_path / "steady", toy_config(12)).train()
    real, draws = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + draws.choice((-1, 1)) * draws.uniform(0, 1e6))

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path / "jumping", toy_config(12), stop).train()
    assert Toy(tmp_path / "jumping", toy_config(12)).train().step == 12
    assert same_run(tmp_path / "steady", tmp_path / "jumping")
    assert all(row[TIMED] > 0 for row in rundir.read_metrics(tmp_path / "jumping"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
def test_disk_full_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fill(step: int) -> None:
        if step == 7:
            monkeypatch.setattr(RecordWriter, "write", full_disk)

    notes: list[str] = []
    toy = Toy(tmp_path / "run", toy_config(12), fill)
    monkeypatch.setattr(toy.hooks.progress, "note", notes.append)
    assert toy.train().step == 12, "metrics.jsonl has every row"
    assert len(notes) == 1 and "tensorboard failed" in notes[0] and "No space left" in notes[0]
    monkeypatch.undo()
    Toy(tmp_path / "whole", toy_config(12)).train()
    assert same_run(tmp_path / "whole", tmp_path / "run")


def test_folder_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.mkdir

    def locked(self: Path, *arguments: Any, **options: Any) -> None:
        if "checkpoints" in self.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        original(self, *arguments, **options)

    def lock(step: int) -> None:
        if step == 7:
            monkeypatch.setattr(Path, "mkdir", locked)

    with pytest.raises(RunError, match=r"step_000010.*Read-only.*step 5 is intact.*read-only: choose another"):
        Toy(tmp_path / "run", toy_config(12), lock).train()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]


@pytest.fixture
def server() -> Iterator[tuple[str, Callable[[int], None]]]:
    """A reward server that scores images by their length in bytes; ``limit(n)``: it fails after n more requests."""
    left = [10**9]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            HEARD.append(self.headers["Authorization"])
            left[0] -= 1
            if left[0] < 0:
                self.connection.close()
                return
            scores = [len(image) % 97 / 97 for image in body["images"]]
            answer = json.dumps({"protocol": 1, "reward": body["reward"], "scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            return

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.handle_error = lambda *_: None  # type: ignore[method-assign]  # closed connections are intended
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()

    def limit(requests: int) -> None:
        left[0] = requests

    yield f"http://127.0.0.1:{web.server_port}", limit
    web.shutdown()
    web.server_close()


def rewarded_training(folder: Path, url: str) -> int:
    """Three iterations of GDMD on tiny networks with the server's reward, resumed if there is a checkpoint."""
    text = "{name: tiny, method: {kind: gdmd, group_size: 2}, loop: {steps: 3, batch_size: 4, checkpoint_every: 1}}"
    cfg = load_config(RunConfig, text, ["validation.every=0", "loop.log_every=1", "loop.lr_student=0.01"])
    torch.manual_seed(0)
    roles, codec = ShapesRoles(ShapesDit(width=16, depth=1, heads=2)), ShapesCodec(ShapesVae(16))
    remote = RemoteConfig(url=url, reward="length", timeout_s=10, retries=1)
    cfg = cfg.model_copy(update={"rewards": (remote,)})
    rewards = (RemoteReward(**remote.model_dump()),)
    rewards[0]._pause = lambda seconds: None
    stream = PromptStream(training_captions(), ShapesTextEncoder(), 4, cfg.loop.seed)
    exists = (folder / "config.yaml").exists()
    run = rundir.open_run(folder) if exists else rundir.create(folder, cfg.model_dump(mode="json"))
    method = method_of(cfg.method, roles, codec, rewards, SHAPES, None)
    return train(method, roles, stream, cfg.loop, run).step


def test_reward_server_outage_costs_no_step(tmp_path: Path, server: tuple[str, Callable[[int], None]]) -> None:
    url, limit = server
    assert rewarded_training(tmp_path / "whole", url) == 3
    limit(4)  # three requests an iteration: it goes away inside the second one
    with pytest.raises(RemoteError, match="no answer.*after 2 tries.*resume the run"):
        rewarded_training(tmp_path / "run", url)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1]
    limit(10**9)
    assert rewarded_training(tmp_path / "run", url) == 3
    assert same_run(tmp_path / "whole", tmp_path / "run")
    assert any(row["reward/target"] > 0 for row in rundir.read_metrics(tmp_path / "run"))


def test_reward_server_token_is_not_written(
    tmp_path: Path,
    server: tuple[str, Callable[[int], None]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (url, limit), secret, run = server, "a-token-that-nobody-else-knows", tmp_path / "run"
    monkeypatch.setenv("GDMD_REWARD_TOKEN", secret)
    limit(4)
    with pytest.raises(RemoteError) as gone:
        rewarded_training(run, url)
    limit(10**9)
    assert rewarded_training(run, url) == 3
    assert HEARD[-1] == f"Bearer {secret}"
    assert "GDMD_REWARD_TOKEN" in (run / "config.yaml").read_text()  # the variable's name, not its content
    said = "".join(capfd.readouterr()) + str(gone.value)
    files = [file for file in run.rglob("*") if file.is_file()]
    assert secret not in said and not [file for file in files if secret.encode() in file.read_bytes()]
