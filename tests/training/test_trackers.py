"""Trackers, with the libraries themselves: wandb offline and trackio's local database; SwanLab by its signatures."""

from __future__ import annotations

import inspect
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from PIL import Image
from toy_training import Toy, toy_config

from gdmd.config.load import ConfigError
from gdmd.config.training import LoopConfig
from gdmd.programs import train as programs
from gdmd.recipes.read import read_recipe
from gdmd.runs.inputs import CHANGES
from gdmd.runs.run_folder import create, read_facts, read_metrics, write_facts
from gdmd.training import trackers
from gdmd.training.callbacks import TrainerState
from gdmd.training.loop import Hooks, NoProgress

PROGRAM = """
import sys
from pathlib import Path
from PIL import Image
from toy_training import Toy, toy_config
from gdmd.training.loop import Hooks

def validate(step, path):
    Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
    return {}

def kill(step):
    if step == int(sys.argv[2]):
        raise KeyboardInterrupt

hooks = Hooks(validate=validate, validate_every=6)
Toy(Path(sys.argv[1]), toy_config(12, report_to=("wandb", "trackio")), kill, hooks).train()
"""


def run_program(folder: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    place = {"TRACKIO_DIR": str(folder.parent / "trackio"), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])])}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(kill_at)]
    return subprocess.run(command, env=kept | place | path, capture_output=True, text=True)


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of wandb's offline files: LevelDB's log format, in it wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, at, part = file.read_bytes(), 7, b""  # after the file's header
        while at + 7 <= len(content):
            if 2**15 - at % 2**15 < 7:  # no header fits: the rest of the block is padding
                at += 2**15 - at % 2**15
                continue
            length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            part, at = part + content[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # complete, or the last part
                yield Record.FromString(part)
                part = b""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with wandb and trackio that was interrupted after 7 of 12 steps and resumed from step 5."""
    folder = tmp_path_factory.mktemp("tracked") / "mine"
    first = run_program(folder, 7)
    assert "KeyboardInterrupt" in first.stderr, first.stderr
    second = run_program(folder, -1)
    assert second.returncode == 0, second.stderr
    assert not first.stdout and not second.stdout, "standard output belongs to --json"
    return folder


def check_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Each logged row arrived once, with its values; images at steps 0, 6 and 12."""
    scalars = {row["_step"]: row for row in rows if "loss/student" in row}
    images = [row["_step"] for row in rows if "validation/images" in row]
    assert Counter(row["_step"] for row in rows if "loss/student" in row) == Counter(range(1, 13)), "no step twice"
    assert images == [0, 6, 12]
    for logged in read_metrics(folder):
        own = {key for key in logged if key not in ("step", "speed/images_per_s")}  # steps 6 and 7 were timed twice
        assert all(math.isclose(scalars[int(logged["step"])][key], logged[key]) for key in own)


def test_wandb_has_every_row_once(resumed: Path) -> None:
    records = list(wandb_records(resumed))
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {
        (json.loads((resumed / "trackers.json").read_text())["wandb"]["id"], "mine", "gdmd")
    }
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["lr_student"] == 0.01
    rows = []
    for record in records:
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:  # an image is a mapping, its keys are nested
                name, *inner = item.nested_key or [item.key]
                holder = row.setdefault(name, {}) if inner else row
                holder[inner[0] if inner else name] = json.loads(item.value_json)
            rows.append(row)
    check_rows(resumed, rows)
    shown = [row["validation/images"] for row in rows if "validation/images" in row]
    files = [next(resumed.glob(f"wandb/offline-run-*/files/{image['path']}")) for image in shown]
    assert [Image.open(file).getpixel((0, 0)) for file in files] == [(step, 0, 0) for step in (0, 6, 12)]


def test_trackio_has_every_row_once(resumed: Path) -> None:
    (database,) = (resumed.parent / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        config = json.loads(connection.execute("SELECT config FROM configs").fetchone()[0])
    assert database.stem == "gdmd" and config["lr_student"] == 0.01
    assert len({run for run, *_ in found}) == 1 and {name for _, name, *_ in found} == {"mine"}
    rows = [{"_step": step, **json.loads(values)} for _, _, step, values in found]
    check_rows(resumed, rows)
    files = [row["validation/images"]["file_path"] for row in rows if "validation/images" in row]
    colors = [Image.open(resumed.parent / "trackio" / "media" / file).getpixel((0, 0)) for file in files]
    assert colors == [(step, 0, 0) for step in (0, 6, 12)]


def test_a_second_trackio_run_in_a_folder_of_the_same_name_is_another_run(resumed: Path) -> None:
    other = resumed.parent / "other" / "mine"
    other.parent.mkdir()
    (resumed.parent / "other" / "trackio").symlink_to(resumed.parent / "trackio")
    assert "KeyboardInterrupt" in run_program(other, 2).stderr
    assert json.loads((other / "trackers.json").read_text())["trackio"]["id"].startswith("mine-")


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_scalars_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def validate(step: int, path: Path) -> dict[str, float]:
        Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
        return {}

    def kill(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    cfg, hooks = toy_config(12), Hooks(validate=validate, validate_every=6)
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path / "run", cfg, kill, hooks).train()
    Toy(tmp_path / "run", cfg, hooks=hooks).train()
    board = EventAccumulator(str(tmp_path / "run" / "tb"), {"scalars": 0, "images": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss/student")] == [*range(1, 13)]
    assert [event.step for event in board.Images("validation/images")] == [0, 6, 12]


def test_tensorboard_shows_a_run_that_starts_over_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def kill(step: int) -> None:
        if step == 3:  # before the first checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path / "run", toy_config(6), kill).train()
    Toy(tmp_path / "run", toy_config(6)).train()
    board = EventAccumulator(str(tmp_path / "run" / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/student")] == [*range(1, 7)]


# ---------------------------------------------------------------- SwanLab


class SwanlabRun:
    """The run object of swanlab 0.10.3, with its signatures."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.state = ""

    def log(self, data: Mapping[str, Any], step: int | None = None) -> None:
        self.logged.append((dict(data), step))

    def finish(
        self,
        state: Literal["success", "crashed", "aborted"] = "success",
        error: str | None = None,
        async_log_timeout: int | None = None,
    ) -> None:
        self.state = state


@pytest.fixture
def swanlab(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What swanlab.init was called with, each with its ``run``."""
    begun: list[dict[str, Any]] = []

    def init(
        *,
        log_dir: str | None = None,
        project: str | None = None,
        name: str | None = None,
        id: str | None = None,
        resume: Literal["must", "allow", "never"] | bool | None = None,
        config: dict[str, Any] | None = None,
    ) -> SwanlabRun:
        begun.append(locals().copy() | {"run": SwanlabRun()})
        return begun[-1]["run"]

    def image(data_or_path: str, mode: str | None = None, caption: str | None = None) -> tuple[str, str]:
        return ("image", data_or_path)

    module = SimpleNamespace(init=init, Image=image, __spec__=inspect.getmodule(Toy).__spec__ or object())
    monkeypatch.setitem(sys.modules, "swanlab", module)
    return begun


def test_swanlab_run_is_continued(tmp_path: Path, swanlab: list[dict[str, Any]]) -> None:
    def validate(step: int, path: Path) -> dict[str, float]:
        path.write_bytes(b"image")
        return {}

    def kill(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    cfg, hooks = toy_config(12, report_to="swanlab"), Hooks(validate=validate, validate_every=6)
    with pytest.raises(KeyboardInterrupt):
        Toy(tmp_path / "mine", cfg, kill, hooks).train()
    Toy(tmp_path / "mine", cfg, hooks=hooks).train()
    first, second = swanlab
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["name"], first["project"], first["config"]["steps"]) == ("mine", "gdmd", 12)
    assert (first["run"].state, second["run"].state) == ("crashed", "success")
    sent = [*first["run"].logged, *second["run"].logged]
    assert [step for values, step in sent if "loss/student" in values] == [*range(1, 13)]
    images = [(values["validation/images"][1], step) for values, step in sent if "validation/images" in values]
    assert images == [(str(tmp_path / "mine" / "grids" / f"step_{step:06d}.png"), step) for step in (0, 6, 12)]


def test_repeated_steps_with_other_numbers_go_to_a_new_run(tmp_path: Path, swanlab: list[dict[str, Any]]) -> None:
    """An accepted change of an input: the steps after the checkpoint are trained again, with other numbers."""

    def kill(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    folder, cfg = tmp_path / "mine", toy_config(12, report_to="swanlab")
    with pytest.raises(KeyboardInterrupt):
        Toy(folder, cfg, kill).train()
    write_facts(folder, read_facts(folder) | {CHANGES: [{"step": 5, "input": "prompts.file"}]})
    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        Toy(folder, cfg, kill, Hooks(notes)).train()
    Toy(folder, cfg).train()
    first, second, third = swanlab
    assert first["id"] != second["id"] == third["id"]
    assert "swanlab: a new run begins at step 5, because the repeated steps have other numbers" in notes.notes
    sent = [step for one in (second, third) for values, step in one["run"].logged if "loss/student" in values]
    assert sent == [*range(6, 13)]


# ---------------------------------------------------------------- faults


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_tracker_that_fails_later_is_reported_once_and_training_continues(
    tmp_path: Path, swanlab: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", "abcdef0123456789")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to https://host/?key=zyx987 with abcdef0123456789")

    monkeypatch.setattr(SwanlabRun, "log", fail)
    notes = Notes()
    assert Toy(tmp_path / "run", toy_config(6, report_to="swanlab"), hooks=Hooks(notes)).train().step == 6
    assert len(read_metrics(tmp_path / "run")) == 6
    (message,) = notes.notes
    assert message == (
        "swanlab failed and gets no more data from this run: ConnectionError: no route to https://host/?key=*** with ***. "
        f"Training continues; {tmp_path / 'run' / 'metrics.jsonl'} has every row."
    )


def test_a_tracker_that_does_not_start_is_an_error_before_training(
    tmp_path: Path, swanlab: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in\nlong advice")

    monkeypatch.setattr(sys.modules["swanlab"], "init", refuse)
    steps: list[int] = []
    with pytest.raises(
        ValueError, match="swanlab did not start: RuntimeError: not logged in. Log in with `swanlab login`"
    ):
        Toy(tmp_path / "run", toy_config(6, report_to="swanlab"), steps.append).train()
    assert not steps


def test_a_missing_library_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"loop.report_to = wandb needs the package wandb.*pip install -e '.\[wandb\]'"
    ):
        trackers.require_trackers(["wandb"])
    with pytest.raises(ValueError, match=r"(?s)package wandb.*package trackio"):
        trackers.require_trackers(["wandb", "trackio"])


def test_a_missing_library_is_reported_before_the_networks_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(programs, "build", lambda cfg: pytest.fail("the networks were loaded"))
    with pytest.raises(ValueError, match="loop.report_to = swanlab"):
        programs.prepare(read_recipe("shapes_smoke", ["loop.report_to=swanlab"]))


def test_a_missing_login_is_reported_before_the_networks_are_loaded(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    command = [sys.executable, "-m", "gdmd", "train", "shapes_smoke", "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "loop.report_to=wandb", "loop.best_metric=x"],
        env=kept | {"HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "loading the networks" not in done.stderr
    assert "loop.report_to: wandb did not start: UsageError" in done.stderr and "`wandb login`" in done.stderr
    assert "loop.best_metric = x is not logged" in done.stderr  # with all other mistakes


def test_scores_that_are_missing_are_not_sent(tmp_path: Path, swanlab: list[dict[str, Any]]) -> None:
    (tracker,) = trackers.trackers(["swanlab"], create(tmp_path / "run", {}), print)
    state = TrainerState(0, 2, tmp_path, is_main=True)
    tracker.start(state)
    state.step = 1
    tracker.on_log(state, {"reward/a": math.nan, "reward/b": 0.5})
    assert swanlab[0]["run"].logged == [({"reward/b": 0.5}, 1)]


def test_config_takes_one_name_or_a_list() -> None:
    assert read_recipe("shapes_smoke", ["loop.report_to=wandb"]).loop.report_to == ("wandb",)
    assert read_recipe("shapes_smoke", ["loop.report_to=[wandb,tensorboard]"]).loop.report_to == (
        "wandb",
        "tensorboard",
    )
    with pytest.raises(ConfigError, match="report_to"):
        read_recipe("shapes_smoke", ["loop.report_to=comet"])


@pytest.mark.parametrize("given", ["none", ["none"], []], ids=str)
def test_no_tracker(given: Any) -> None:
    """transformers and TRL write "none"."""
    assert LoopConfig(report_to=given).report_to == ()
