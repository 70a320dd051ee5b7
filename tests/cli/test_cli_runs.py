"""The program from the first word to the report: train, stop, resume, evaluate, sample, compare, pretrain, examine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cli_world import TINY, Gdmd, make_assets

from gdmd.cli.app import main
from gdmd.config.metric_keys import metric_keys
from gdmd.programs import pretrain
from gdmd.programs.demo import control
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import read_metrics
from gdmd.shapes.grammar import TASKS
from gdmd.shapes.pretrain import scorers as pretrain_scorers

COMMANDS = ("train", "demo", "eval", "sample", "report", "recipes", "doctor", "pretrain")
EVALUATION = ("shapeseval", "rewards", "fidelity", "coverage", "nfe", "images_per_s")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gdmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gdmd:
    """The program in an empty current folder, with untrained networks in place of the shipped ones."""
    return Gdmd(main, make_assets(tmp_path / "assets"), tmp_path, monkeypatch, capsys)


def sets(*overrides: str) -> list[str]:
    """The overrides as --set options of the demo."""
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples(gdmd: Gdmd, command: str) -> None:
    finished = gdmd(command, "--help")
    assert finished.code == 0
    assert f"gdmd {command}" in finished.out.split("Examples:")[1]


def test_the_version_is_that_of_the_package(gdmd: Gdmd) -> None:
    from gdmd import __version__

    assert gdmd("--version").out == f"gdmd {__version__}\n"


def test_recipes_are_listed_with_what_they_are_for(gdmd: Gdmd) -> None:
    listed = json.loads(gdmd("recipes", "--json").out)
    assert {"shapes", "shapes_demo", "shapes_smoke", "gdmd_paper"} <= listed.keys()
    lines = gdmd("recipes").out.splitlines()
    first = {line.split()[0] for line in lines if line}
    assert {"shapes", "gdmd_paper", "sdxl", "flux2_klein", "gdmd", "dmd2"} <= first and "sdxl_gdmd" in listed
    assert all(len(line) <= 80 for line in lines) and listed["shapes_smoke"] in " ".join(" ".join(lines).split())


def test_a_printed_recipe_can_be_trained_again(gdmd: Gdmd) -> None:
    Path("mine.yaml").write_text(gdmd("recipes", "shapes_smoke", "method.gamma=0.5", *TINY).out)
    finished = gdmd("train", "mine.yaml", "--no-eval", "--json")
    assert finished.code == 0, finished.err
    assert json.loads(finished.out)["run"] == "runs/shapes_smoke-seed0"
    assert "gamma: 0.5" in Path("runs/shapes_smoke-seed0/config.yaml").read_text()


def test_a_run_ends_with_an_evaluation_and_a_report(gdmd: Gdmd) -> None:
    finished = gdmd("train", "shapes_smoke", *TINY, "loop.grid_every=1", "--run", "run", "--json")
    assert finished.code == 0, finished.err
    ended = json.loads(finished.out)
    assert ended["step"] == 2 and ended["finished"] and Path(ended["checkpoint"]).is_dir()
    assert set(ended["evaluation"]["shapeseval"]) == {"overall", *TASKS}
    assert Path("run/report.html").read_text().count("data:image/png") >= 3
    assert len(read_metrics(Path("run"))) == 2


def test_a_second_run_of_a_recipe_goes_to_another_folder(gdmd: Gdmd) -> None:
    folders = {json.loads(gdmd.train("--json").out)["run"] for _ in range(2)}
    assert len(folders) == 2


def test_a_resumed_run_equals_the_uninterrupted_one(gdmd: Gdmd) -> None:
    assert gdmd.train("loop.steps=4", "--run", "whole").code == 0
    assert gdmd.train("loop.steps=2", "--run", "parts").code == 0
    finished = gdmd("train", "--resume", "parts", "loop.steps=4", "--no-eval", "--json")
    assert finished.code == 0 and json.loads(finished.out)["step"] == 4, finished.err
    whole, parts = (checkpoint.load_newest(Path(name) / "checkpoints") for name in ("whole", "parts"))
    assert whole and parts and whole.tensors.keys() == parts.tensors.keys()
    for part, tensors in whole.tensors.items():
        assert all(torch.equal(value, parts.tensors[part][name]) for name, value in tensors.items()), part


NAMED = ((("run",), "777"), (("run", "run"), "778"))
"""`gdmd eval run` is the folder "run", `gdmd eval run run` as well, with the sub-command spelled out."""


def test_eval_prints_one_json_object_with_the_promised_keys(gdmd: Gdmd) -> None:
    assert gdmd.train("--run", "run").code == 0
    finished = gdmd("eval", "run", "--json", "--split", "dev")
    row = json.loads(finished.out)
    assert set(EVALUATION) <= row.keys() and set(row["shapeseval"]) == {"overall", *TASKS}
    assert set(row["rewards"]) == {"shapes_clip", "shapes_pref", "shapes_clip_heldout"}
    assert row["nfe"] == 4 and row["images_per_s"] > 0
    own, other = (json.loads(gdmd("eval", *run, "--json", "--split", "dev", "--seed", seed).out) for run, seed in NAMED)
    assert own["rewards"] == row["rewards"] != other["rewards"]


def test_a_checkpoint_is_chosen_by_name_or_step(gdmd: Gdmd) -> None:
    best = ("loop.best_metric=loss/student", "loop.best_direction=min", "loop.checkpoint_every=1", "loop.log_every=1")
    assert gdmd.train("--run", "run", *best).code == 0
    size = ("--json", "--per-task", "1", "--images", "2")
    assert json.loads(gdmd("eval", "run", "--checkpoint", "1", *size).out)["step"] == 1
    chosen = json.loads(Path("run/checkpoints/best.json").read_text())["step"]
    assert json.loads(gdmd("eval", "run", "--checkpoint", "best", *size).out)["step"] == chosen
    pictures = []
    for words in (("run", "--checkpoint", "1"), ("run,checkpoint=1",), ("run",)):
        assert gdmd("sample", *words, "-p", "a red ring", "-n", "2", "-o", "a.png").code == 0
        pictures.append(Path("a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    refused = gdmd("sample", "run", "-p", "a red ring", "--checkpoint", "7")
    assert refused.code == 2 and "give best, last or a step (there are: 1, 2)" in refused.err
    assert gdmd("eval", "teacher", "--checkpoint", "best").code == 2


def test_eval_measures_the_averaged_student_and_not_the_last_one(gdmd: Gdmd) -> None:
    assert gdmd.train("--run", "run").code == 0
    saved = checkpoint.load_newest(Path("run/checkpoints"))
    from gdmd.recipes.open_run import open_named

    assert saved
    components = open_named("run")[1]
    for name, weight in components.roles.parameters("student").items():
        assert torch.equal(weight, saved.part("ema")[name])
    assert any(not torch.equal(saved.part("ema")[name], value) for name, value in saved.part("student").items())


@pytest.mark.parametrize(("what", "nfe"), [("teacher", 100), ("teacher-4", 8), ("teacher-4-plain", 4)])
def test_the_rows_of_the_teacher_count_guided_steps_twice(gdmd: Gdmd, what: str, nfe: int) -> None:
    finished = gdmd("eval", what, "--json", "--per-task", "1", "--images", "2")
    assert json.loads(finished.out)["nfe"] == nfe


def test_sample_draws_the_same_png_for_the_same_seed(gdmd: Gdmd) -> None:
    words = ("sample", "teacher-4", "-p", "a red ring", "-p", "two squares", "-n", "3", "--scale", "2")
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert gdmd(*words, "--seed", seed, "-o", name).code == 0
    first, again, other = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other
    width, height = struct.unpack(">II", first[16:24])
    assert width > 3 * 64 and height > 2 * 64


def test_report_measures_the_rows_that_are_missing(gdmd: Gdmd) -> None:
    assert gdmd.train("--run", "run").code == 0
    assert gdmd("report", "run").code == 0
    rows = json.loads(Path("run/evaluation.json").read_text())
    assert [row["nfe"] for row in rows.values()] == [2, 8, 4, 4]
    first = Path("run/evaluation.json").read_text()
    assert gdmd("report", "run").code == 0
    assert Path("run/evaluation.json").read_text() == first, "stored rows are not measured again"
    assert gdmd.train("--run", "other", "loop.seed=1").code == 0
    shutil.rmtree("run/checkpoints")
    shutil.copytree("other/checkpoints", "run/checkpoints")  # other weights at the same step
    assert gdmd("report", "run").code == 0
    again = json.loads(Path("run/evaluation.json").read_text())
    *teachers, student = rows
    assert again[student]["rewards"] != rows[student]["rewards"] and again[student]["step"] == rows[student]["step"]
    assert [again[name] for name in teachers] == [rows[name] for name in teachers]
    settings = Path("run/config.yaml")
    settings.write_text(settings.read_text().replace("per_task: 1", "per_task: 2"))
    assert gdmd("report", "run").code == 0
    assert {row["images"] for row in json.loads(Path("run/evaluation.json").read_text()).values()} == {24}
    settings.write_text(settings.read_text().replace("teacher_steps: 1", "teacher_steps: 4"))
    assert gdmd("report", "run").code == 0  # two rows of the teacher are now one
    assert [row["nfe"] for row in json.loads(Path("run/evaluation.json").read_text()).values()] == [8, 4, 4]


def test_the_demo_trains_both_students_measures_five_rows_and_prints_them_again_with_the_trained_scores_marked(
    gdmd: Gdmd,
) -> None:
    words = ["demo", "--recipe", "shapes_smoke", *sets(*TINY), "--run", "demo"]
    finished = gdmd(*words, "--json")
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
    again = gdmd(*words)
    assert again.code == 0, again.err
    assert Path("demo/evaluation.json").read_text() == stored, "a finished demo measures nothing again"
    assert again.err.count("(measured before)") == 5
    for score in ("shapes_clip *", "shapes_pref *", "shapes_clip_heldout ", "fidelity", "coverage", "NFE", "images/s"):
        assert score in again.out
    assert "shapes_clip_heldout *" not in again.out
    assert "report.html" in again.err


SHAPES = [name for name in recipe_names() if read_recipe(name).model.kind == "shapes"]
GDMD = [name for name in SHAPES if read_recipe(name).method.kind in ("gdmd", "gdmd_tilted")]


@pytest.mark.parametrize("name", SHAPES)
def test_the_control_of_a_demo_is_plain_dmd_with_as_many_student_updates(name: str) -> None:
    cfg = read_recipe(name)
    if name not in GDMD:
        with pytest.raises(ValueError, match="compares GDMD with DMD"):
            control(cfg)
        return
    plain = control(cfg)
    assert plain.method == cfg.method.model_copy(update={"gamma": 0.0}) and not plain.method.rewarded
    assert (plain.loop, plain.eval, plain.rewards) == (cfg.loop, cfg.eval, cfg.rewards)


def test_the_demo_of_the_recipe_with_reward_gradients_runs(gdmd: Gdmd) -> None:
    words = ("demo", "--recipe", "shapes_gradient", *sets(*TINY, "method.continuations=2"), "--run", "demo", "--json")
    finished = gdmd(*words)
    assert finished.code == 0, finished.err
    rows = json.loads(finished.out)["rows"]
    assert [name for name in rows if name.endswith("4 steps")][-2:] == ["DMD, 4 steps", "GDMD, 4 steps"]
    refused = gdmd("demo", "--recipe", "sdxl_gdmd")
    assert refused.code == 2 and "in the Shapes world" in refused.err and "model.kind = diffusers" in refused.err


@pytest.mark.parametrize("name", SHAPES)
def test_the_metrics_of_a_recipe_are_known_before_it_is_trained(gdmd: Gdmd, name: str) -> None:
    overrides = [word for word in TINY if "group_size" not in word or name in GDMD]
    size = {"dmd_nft": 2, "dmd_grpo": 2}.get(name)
    overrides += [f"method.images_per_prompt={size}"] if size else []
    overrides += ["method.cold_start=1"] if name == "dmdr" else []
    cfg = read_recipe(name, overrides)
    finished = gdmd("train", name, *overrides, "--no-eval", "--run", "run")
    assert finished.code == 0, finished.err
    logged = {key for row in read_metrics(Path("run")) for key in row} - {"step"}
    assert logged == set(metric_keys(cfg))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("loop.best_metric=reward/targt",), "reward/targt is not logged by this recipe: did you mean reward/target?"),
        (("loop.best_metric=reward/foo",), "reward/foo is not logged by this recipe: did you mean reward/"),
        (("loop.best_metric=shapeseval",), "take reward/target, or a key of metrics.jsonl"),
        (("loop.best_metric=reward/target", "method.gamma=0"), "reads no rewards; take a loss, such as loss/student"),
    ],
)
def test_a_best_metric_that_is_never_logged_is_refused_before_the_folder_is_made(
    gdmd: Gdmd, given: tuple[str, ...], message: str
) -> None:
    finished = gdmd.train(*given, "--run", "run")
    assert finished.code == 2 and message in finished.err and not Path("run").exists(), finished.err


def test_the_printed_length_is_that_of_this_run(gdmd: Gdmd) -> None:
    finished = gdmd.train("method.group_size=2", "loop.steps=3", "--run", "run")
    assert "4-step student; 3 iterations of 2 samples, 6 student updates" in finished.err
    assert not [name for name in recipe_names() if re.search(r"\d updates|student updates", read_recipe(name).about)]


def test_every_reader_of_a_run_names_the_checkpoint_that_it_reads_in_the_place_of_a_damaged_one(gdmd: Gdmd) -> None:
    assert gdmd.train("--run", "run").code == 0
    size = ("--per-task", "1", "--images", "2")
    first = gdmd("eval", "run", "--json", *size)
    assert json.loads(first.out)["step"] == 2 and "note:" not in first.err
    (Path("run/checkpoints/step_000002/student.safetensors")).write_bytes(b"")
    note = "step 2 was skipped; step 1 is used"
    measured = gdmd("eval", "run", "--json", *size)
    assert json.loads(measured.out)["step"] == 1 and measured.err.count(note) == 1
    sampled = gdmd("sample", "run", "-p", "a red ring", "-n", "1", "-o", "a.png")
    assert sampled.code == 0 and note in sampled.err
    assert note in gdmd("report", "run").err
    assert note in gdmd("eval", "preference", "run", "--per-task", "1", "-n", "1", "--json").err
    assert "step 2 was skipped" in gdmd.train("loop.start_from=run", "loop.seed=1", "--run", "next").err
    chosen = gdmd("eval", "run", "--checkpoint", "2", "--json", *size)
    assert chosen.code == 2 and "student.safetensors is damaged" in chosen.err and not chosen.out


def test_a_run_without_its_checkpoints_says_that_it_starts_over(gdmd: Gdmd) -> None:
    gdmd.train("--run", "run")
    shutil.rmtree("run/checkpoints")
    again = gdmd("train", "--resume", "run", "loop.steps=1", "--no-eval")
    assert again.code == 0
    assert "run/checkpoints holds no checkpoint: the run starts over, without its 2 logged rows" in again.err


def test_the_teacher_and_plain_dmd_are_trained_on_no_reward(gdmd: Gdmd) -> None:
    assert "*" not in gdmd("eval", "teacher-4", "--per-task", "1", "--images", "2").out.split("* trained on")[0]
    assert gdmd.train("method.gamma=0", "--run", "run").code == 0
    assert "*" not in gdmd("eval", "run", "--per-task", "1", "--images", "2").out.split("* trained on")[0]
    assert gdmd("report", "run").code == 0 and "mark trained" not in Path("run/report.html").read_text()


@pytest.mark.parametrize("network", ["vae", "teacher", "scorers"])
def test_pretrain_remakes_each_network_in_a_few_steps(
    gdmd: Gdmd, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("vae_job", {}), ("teacher_job", {}), ("pretrain_scorer", {"per_task": 4})):
        monkeypatch.setattr(pretrain, name, partial(getattr(pretrain, name), batch=4, **size))
    monkeypatch.setattr(pretrain_scorers, "POOL", 2)
    pretrain_scorers._pool.cache_clear()
    extra = ["--kind", "shapes_clip"] if network == "scorers" else []
    finished = gdmd("pretrain", network, "--steps", "2", "--out", "nets", *extra)
    assert finished.code == 0, finished.err
    name = "shapes_clip" if network == "scorers" else f"shapes_{network}"
    assert f"nets/{name}.safetensors" in finished.err and "2/2" in finished.err
    assert [path.name for path in Path("nets").iterdir()] == [f"{name}.safetensors"]


def test_doctor_finds_a_damaged_asset(gdmd: Gdmd) -> None:
    healthy = gdmd("doctor", "--json")
    assert healthy.code == 0 and json.loads(healthy.out)["ok"], healthy.out
    (gdmd.assets / "shapes_pref.safetensors").write_bytes(b"garbage")
    finished = gdmd("doctor")
    assert finished.code == 2 and "FAIL asset shapes_pref" in finished.out
    assert "asset shapes_pref" in finished.err and "Traceback" not in finished.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    assets = make_assets(tmp_path / "assets")
    own = [f"model.{name}={assets}/shapes_{name}.safetensors" for name in ("teacher", "vae")]
    own += [f"rewards.{k}.asset={assets}/{name}.safetensors" for k, name in enumerate(("shapes_clip", "shapes_pref"))]
    words = ["train", "shapes_smoke", *own, *TINY, "loop.steps=100000", "loop.checkpoint_every=100000", "--run", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "gdmd", *words], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "gdmd train --resume run" in said and "Traceback" not in said
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints") is not None


def test_a_loss_that_is_not_finite_ends_with_exit_code_3(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.lr_student=1e30", "loop.lr_fake=1e30", "method.gamma=0", "loop.steps=8", "--run", "run")
    assert finished.code == 3, finished.err
    assert "not finite" in finished.err and "Traceback" not in finished.err


def test_a_start_from_a_run_that_is_not_there_is_an_error_of_the_input(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.start_from=nowhere", "--run", "run")
    assert finished.code == 2 and "loop.start_from" in finished.err, finished.err
