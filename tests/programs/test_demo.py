"""``gdmd demo``: DMD and GDMD from one start, against their teacher, and what the difference shows."""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from cli_world import TINY, Gdmd
from rich.console import Console

from gdmd.config.methods.all import without_rewards
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.evaluation.run_report import read_rows
from gdmd.evaluation.verdict import PER_IMAGE, per_image
from gdmd.io import RunError
from gdmd.programs import demo_work
from gdmd.programs.demo import Demo, control, run_demo
from gdmd.recipes.read import read_recipe, shapes_names
from gdmd.recipes.run_folders import demo_recipe
from gdmd.runs import checkpoint
from gdmd.shapes.grammar import TASKS


def sets(*overrides: str) -> list[str]:
    """The overrides as --set options of the demo."""
    return [one for override in overrides for one in ("--set", override)]


def test_demo_trains_dmd_and_gdmd_and_reports_both(gdmd: Gdmd) -> None:
    arguments = ["demo", "--recipe", "shapes_smoke", *sets(*TINY), "--run", "demo"]
    finished = gdmd(*arguments, "--json")
    assert finished.code == 0, finished.err
    ended = json.loads(finished.out)
    assert [row["nfe"] for row in ended["rows"].values()] == [2, 8, 4, 4, 4]
    assert ended["trained_on"] == ["shapes_clip", "shapes_pref"]
    assert "data:image/png" in Path("demo/report.html").read_text()
    states = [checkpoint.load_newest(Path("demo") / name / "checkpoints") for name in ("dmd", "gdmd")]
    updates = [state.state["roles"]["student"]["updates"] for state in states if state]
    assert len(updates) == 2 and updates[0] == updates[1] > 0, "the control has the same student updates"
    stored = Path("demo/evaluation.json").read_text()
    assert json.loads(stored) == ended["rows"]
    again = gdmd(*arguments)
    assert again.code == 0, again.err
    assert Path("demo/evaluation.json").read_text() == stored, "a finished demo measures nothing again"
    assert again.err.count("(measured before)") == 5
    for score in ("shapes_clip *", "shapes_pref *", "shapes_clip_heldout ", "fidelity", "coverage", "NFE", "images/s"):
        assert score in again.out
    assert "shapes_clip_heldout *" not in again.out
    assert "report.html" in again.err
    refused = gdmd("demo", "--recipe", "sdxl_gdmd")
    assert refused.code == 2 and "in the Shapes world" in refused.err and "model.kind = diffusers" in refused.err


def test_demo_continues_the_shipped_student(gdmd: Gdmd) -> None:
    """The table has a row of stage 1, both trainings start from it, and nothing is claimed without an interval."""
    finished = gdmd("demo", *sets(*TINY), "--run", "demo")
    assert finished.code == 0, finished.err
    rows = json.loads(Path("demo/evaluation.json").read_text())
    assert list(rows) == [
        *("teacher, 1 steps", "teacher, 4 plain steps"),
        *("stage 1, 4 steps", "DMD, 4 steps", "GDMD, 4 steps"),
    ]
    assert finished.err.count("fake score start from shapes:dmd, step 1 of `none`") == 2
    assert "[4/7] training DMD: 2 updates from the student of shapes:dmd" in finished.err
    assert "GDMD minus DMD with 4 calls:" in finished.out and "is not shown to be above" in finished.out
    assert max(map(len, finished.out.splitlines())) <= 80
    page = Path("demo/report.html").read_text()
    assert "First stage, run earlier and shipped with the package: 4 updates of DMD (none)" in page


def test_demo_from_scratch_is_the_recipe_shapes_demo() -> None:
    assert demo_recipe(None, ["loop.seed=3"], from_scratch=True) == read_recipe("shapes_demo", ["loop.seed=3"])
    second = demo_recipe(None)
    assert second.loop.start_from == "shapes:dmd" and second.method == read_recipe("shapes_gdmd").method
    with pytest.raises(ValueError, match="--recipe shapes was given too"):
        demo_recipe("shapes", from_scratch=True)


def demo_of(*shares: float) -> Demo:
    """A finished demo of teacher, DMD and GDMD in which these shares of the images are right, the same in every caption."""
    names = ("teacher, 50 steps", "DMD, 4 steps", "GDMD, 4 steps")
    rows = {}
    for name, share in zip(names, shares, strict=True):
        correct = [k % 10 < 10 * share for _ in TASKS for k in range(200)]
        texts = [f"caption {k}" for k in range(6 * 20)]
        marks = per_image(correct, [task for task in TASKS for _ in range(20)], texts, 10, "eval", 7)
        rows[name] = {"nfe": 100 if name.startswith("teacher") else 4, PER_IMAGE: marks}
    return Demo(Path("demo"), 1.0, rows)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.5, 0.6, 0.7), "GDMD with 4 calls is above teacher with 100 calls, and above DMD with 4 calls."),
        ((0.7, 0.5, 0.6), "GDMD with 4 calls is below teacher with 100 calls, and above DMD with 4 calls."),
        ((0.6, 0.7, 0.7), "not shown to be above DMD with 4 calls, because the interval includes 0."),
    ],
)
def test_demo_says_what_its_differences_show(shares: tuple[float, ...], words: str) -> None:
    demo = demo_of(*shares)
    assert words in " ".join(demo.conclusion()) and all(len(line) <= 80 for line in demo.conclusion())
    found = demo.differences["teacher, 50 steps"]
    assert found.mean == pytest.approx(shares[2] - shares[0]) and found.low == pytest.approx(found.mean)
    assert demo.json()["gdmd_minus"]["DMD, 4 steps"]["mean"] == pytest.approx(shares[2] - shares[1])


def test_demo_on_few_captions_claims_no_interval() -> None:
    demo = demo_of(0.5, 0.6, 0.7)
    for row in demo.rows.values():
        row[PER_IMAGE]["captions"] = {task: ["the same"] * 20 for task in TASKS}
    assert "because so few captions give no interval" in " ".join(demo.conclusion())


@pytest.mark.parametrize("name", [name for name in shapes_names() if read_recipe(name).model.kind == "shapes"])
def test_demo_control_is_plain_dmd(name: str) -> None:
    cfg = read_recipe(name)
    if not isinstance(cfg.method, GDMDConfig | TiltedGDMDConfig):
        with pytest.raises(ValueError, match="compares GDMD with DMD"):
            control(cfg)
        return
    plain = control(cfg)
    assert plain.method == without_rewards(cfg.method) and not plain.method.rewarded
    assert (plain.loop, plain.eval, plain.rewards) == (cfg.loop, cfg.eval, cfg.rewards)


SMALL = (
    *("loop.steps=2", "loop.batch_size=4", "loop.checkpoint_every=1", "loop.log_every=1", "validation.every=0"),
    *("eval.per_task=1", "eval.images=2", "eval.teacher_steps=1"),
)


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DMD and the rows of the teacher and the first stage in a second process; its failure and its end are noticed."""
    monkeypatch.setattr(demo_work, "cores", lambda: 2)
    cfg, folder, threads = demo_recipe(None, SMALL), tmp_path / "demo", torch.get_num_threads()
    assert demo_work.two_processes(cfg, "cpu")
    said = io.StringIO()
    demo = run_demo(cfg, folder, Console(file=said, width=80), "cpu")
    assert [row["nfe"] for row in demo.rows.values()] == [2, 4, 4, 4, 4] and demo.report is not None
    assert len(read_rows(folder / "dmd")) == 4 and read_rows(folder) == demo.rows
    assert "[1/5] teacher, 1 steps" in said.getvalue() and "[1/2] training GDMD" in said.getvalue()
    assert torch.get_num_threads() == threads

    (folder / "dmd" / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match=r"second process of the demo failed: error: cannot read .*evaluation.json"):
        run_demo(cfg, folder, Console(quiet=True), "cpu")

    began = time.monotonic()
    monkeypatch.setattr(demo_work, "work", lambda *_: 15)
    stopped = run_demo(cfg, folder, Console(file=said, width=80), "cpu")
    assert stopped.signal == 15 and f"continue with the same command and --run {tmp_path / 'demo'}" in said.getvalue()
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()


def test_one_process_where_two_would_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """From scratch (its numbers are published), with a set number of threads, on one core, and on a GPU."""
    cfg = demo_recipe(None)
    monkeypatch.setattr(demo_work, "cores", lambda: 2)
    assert demo_work.two_processes(cfg, "cpu") and not demo_work.two_processes(cfg, "cuda")
    assert not demo_work.two_processes(demo_recipe(None, from_scratch=True), "cpu")
    assert not demo_work.two_processes(demo_recipe(None, ["loop.threads=2"]), "cpu")
    monkeypatch.setattr(demo_work, "cores", lambda: 1)
    assert not demo_work.two_processes(cfg, "cpu")
