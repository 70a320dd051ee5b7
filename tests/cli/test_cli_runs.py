"""Whole commands: train, stop, resume, evaluate, sample, report, demo, pretrain, doctor."""

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
from typing import Any

import pytest
import torch
from cli_world import TINY, Gdmd
from typer.main import get_command

from gdmd.cli.app import app
from gdmd.config import shapes_pipeline
from gdmd.config.metric_keys import metric_keys
from gdmd.programs import doctor, pretrain
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import read_metrics
from gdmd.shapes.grammar import TASKS
from gdmd.shapes.pretrain import scorers as pretrain_scorers


def commands(group: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command with its sub-commands."""
    group = group or get_command(app)
    if not hasattr(group, "commands"):
        return [path]
    return [one for name, part in group.commands.items() for one in commands(part, (*path, name))]


EVALUATION = ("shapeseval", "rewards", "fidelity", "coverage", "nfe", "images_per_s")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_examples(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    finished = gdmd(*command, "--help")
    name = " ".join(command).removesuffix(" run")
    assert finished.code == 0 and f"gdmd {name}" in finished.out.split("Examples:")[1]
    assert max(map(len, finished.out.splitlines())) <= 80


def test_short_help_fits(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ((), ("eval",), ("eval", "geneval"), ("rewards",), ("study",)):
        listed = gdmd(*group, "--help").out.split("Commands:" if group else "Start:")[1]
        assert "..." not in listed, listed


def test_every_command_is_in_a_group(gdmd: Gdmd) -> None:
    shown = re.findall(r"^  ([a-z]+)  ", gdmd("--help").out.split("Start:")[1], re.M)
    assert sorted(shown) == sorted(get_command(app).commands)


def test_device_option(gdmd: Gdmd) -> None:
    """One process takes any device that exists, ranks take their own."""
    several = gdmd.train("--device", "cpu", "--gpus", "2")
    assert several.code == 2 and "each rank uses the GPU of its local rank" in several.err
    command = ("sample", "teacher-4", "-p", "a ring", "-n", "1")
    missing = gdmd(*command, "--device", "cuda:99")
    assert missing.code == 2 and re.search(r"device cuda:99: torch \S+ finds \d+ CUDA GPUs", missing.err)
    assert gdmd(*command, "--device", "cpu").code == 0


def test_version(gdmd: Gdmd) -> None:
    from gdmd import __version__

    assert gdmd("--version").out == f"gdmd {__version__}\n"


def test_list_of_recipes(gdmd: Gdmd) -> None:
    listed = json.loads(gdmd("recipes", "--json").out)
    assert {"shapes", "shapes_demo", "shapes_smoke", "gdmd_paper"} <= listed.keys()
    lines = gdmd("recipes").out.splitlines()
    first = {line.split()[0] for line in lines if line}
    assert {"shapes", "gdmd_paper", "sdxl", "flux2_klein", "gdmd", "dmd2"} <= first and "sdxl_gdmd" in listed
    assert all(len(line) <= 80 for line in lines) and listed["shapes_smoke"] in " ".join(" ".join(lines).split())


def test_explained_recipe(gdmd: Gdmd) -> None:
    """Only the requested fields are shown, with overrides applied; an unknown field gets a suggestion."""
    shown = gdmd("recipes", "shapes", "--explain", "loop.steps", "prompts", "loop.steps=7").out
    keys = re.findall(r"^([* ]) (\S+)=", shown, re.M)
    assert keys == [(" ", "prompts.file"), (" ", "prompts.column"), ("*", "loop.steps")]
    assert "* loop.steps=7\n    int >= 1; default 200\n    Total number of outer iterations" in shown
    refused = gdmd("recipes", "shapes", "--explain", "loop.learning_rate")
    assert refused.code == 2 and "loop.lr_student and loop.lr_fake" in refused.err


def test_printed_recipe_can_be_trained(gdmd: Gdmd) -> None:
    Path("mine.yaml").write_text(gdmd("recipes", "shapes_smoke", "method.gamma=0.5", *TINY).out)
    finished = gdmd("train", "mine.yaml", "--no-eval", "--json")
    assert finished.code == 0, finished.err
    assert json.loads(finished.out)["run"] == "runs/shapes_smoke-seed0"
    assert "gamma: 0.5" in Path("runs/shapes_smoke-seed0/config.yaml").read_text()


def test_train_evaluates_and_reports(gdmd: Gdmd) -> None:
    finished = gdmd("train", "shapes_smoke", *TINY, "validation.every=1", "--run", "run", "--json")
    assert finished.code == 0, finished.err
    ended = json.loads(finished.out)
    assert ended["step"] == 2 and ended["finished"] and Path(ended["checkpoint"]).is_dir()
    assert set(ended["evaluation"]["shapeseval"]) == {"overall", *TASKS}
    assert Path("run/report.html").read_text().count("data:image/png") >= 3
    assert [row["step"] for row in read_metrics(Path("run"))] == [0, 1, 2]


def test_what_a_reward_prints_is_not_in_the_json(gdmd: Gdmd) -> None:
    Path("mine.py").write_text(
        "print('loading')\ndef red(images, prompts):\n    print('scoring')\n    return images[:, 0].mean((1, 2))\n"
    )
    reward = 'rewards=[{kind: callable, target: "mine.py:red"}]'
    finished, plain = (gdmd.train(reward, "--run", run, *flag) for run, flag in (("a", ["--json"]), ("b", [])))
    assert json.loads(finished.out)["run"] == "a", finished.out
    assert "loading" in finished.err and "scoring" in finished.err and "scoring" in plain.out


def test_second_run_gets_another_folder(gdmd: Gdmd) -> None:
    folders = {json.loads(gdmd.train("--json").out)["run"] for _ in range(2)}
    assert len(folders) == 2


def test_resume_is_bit_exact(gdmd: Gdmd) -> None:
    gdmd.trained("loop.steps=4", run="whole")
    gdmd.trained(run="parts")
    finished = gdmd("train", "--resume", "parts", "loop.steps=4", "--no-eval", "--json")
    assert finished.code == 0 and json.loads(finished.out)["step"] == 4, finished.err
    whole, parts = (checkpoint.load_newest(Path(name) / "checkpoints") for name in ("whole", "parts"))
    assert whole and parts and whole.tensors.keys() == parts.tensors.keys()
    for part, tensors in whole.tensors.items():
        assert all(torch.equal(value, parts.tensors[part][name]) for name, value in tensors.items()), part
    moved = [[row["student/moved"] for row in read_metrics(Path(name))] for name in ("whole", "parts")]
    assert moved[0] == moved[1] and moved[0][-1] > moved[0][0] > 0


NAMED = ((("run",), "777"), (("run", "run"), "778"))
"""`gdmd eval run` is the folder "run", `gdmd eval run run` as well, with the sub-command spelled out."""


def test_eval_json(gdmd: Gdmd) -> None:
    gdmd.trained()
    finished = gdmd("eval", "run", "--json", "--split", "dev")
    row = json.loads(finished.out)
    assert set(EVALUATION) <= row.keys() and set(row["shapeseval"]) == {"overall", *TASKS}
    assert set(row["rewards"]) == {"shapes_clip", "shapes_pref", "shapes_clip_heldout"}
    assert row["nfe"] == 4 and row["images_per_s"] > 0
    own, other = (json.loads(gdmd("eval", *run, "--json", "--split", "dev", "--seed", seed).out) for run, seed in NAMED)
    assert own["rewards"] == row["rewards"] != other["rewards"]


def test_choice_of_checkpoint(gdmd: Gdmd) -> None:
    best = ("loop.best_metric=loss/student", "loop.best_direction=min", "loop.checkpoint_every=1", "loop.log_every=1")
    gdmd.trained(*best)
    size = ("--json", "--per-task", "1", "--images", "2")
    assert json.loads(gdmd("eval", "run", "--checkpoint", "1", *size).out)["step"] == 1
    chosen = json.loads(Path("run/checkpoints/best.json").read_text())["step"]
    assert json.loads(gdmd("eval", "run", "--checkpoint", "best", *size).out)["step"] == chosen
    files = []
    for arguments in (("run", "--checkpoint", "1"), ("run,checkpoint=1",), ("run",)):
        assert gdmd("sample", *arguments, "-p", "a red ring", "-n", "2", "-o", "a.png").code == 0
        files.append(Path("a.png").read_bytes())
    assert files[0] == files[1] != files[2]
    refused = gdmd("sample", "run", "-p", "a red ring", "--checkpoint", "7")
    assert refused.code == 2 and "give best, last or a step (there are: 1, 2)" in refused.err
    assert gdmd("eval", "teacher", "--checkpoint", "best").code == 2


def test_eval_uses_the_ema_student(gdmd: Gdmd) -> None:
    gdmd.trained()
    saved = checkpoint.load_newest(Path("run/checkpoints"))
    from gdmd.recipes.open_run import open_named

    assert saved
    components = open_named("run")[1]
    for name, weight in components.roles.parameters("student").items():
        assert torch.equal(weight, saved.part("ema")[name])
    assert any(not torch.equal(saved.part("ema")[name], value) for name, value in saved.part("student").items())


@pytest.mark.parametrize(("what", "nfe"), [("teacher", 100), ("teacher-4", 8), ("teacher-4-plain", 4)])
def test_nfe_of_the_teacher(gdmd: Gdmd, what: str, nfe: int) -> None:
    finished = gdmd("eval", what, "--json", "--per-task", "1", "--images", "2")
    assert json.loads(finished.out)["nfe"] == nfe


def test_sample_is_deterministic(gdmd: Gdmd) -> None:
    arguments = ("sample", "teacher-4", "-p", "a red ring", "-p", "two squares", "-n", "3", "--scale", "2")
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert gdmd(*arguments, "--seed", seed, "-o", name).code == 0
    first, again, other = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other
    width, height = struct.unpack(">II", first[16:24])
    assert width > 3 * 64 and height > 2 * 64


def test_report_measures_missing_rows(gdmd: Gdmd) -> None:
    gdmd.trained()
    file, settings = Path("run/evaluation.json"), Path("run/config.yaml")
    assert gdmd("report", "run").code == 0
    rows, first = json.loads(file.read_text()), file.read_text()
    assert [row["nfe"] for row in rows.values()] == [2, 8, 4, 4]
    shutil.rmtree("run/checkpoints")
    shutil.copytree(gdmd.trained("loop.seed=1", run="other") / "checkpoints", "run/checkpoints")
    assert gdmd("report", "run").code == 0  # other weights at the same step: only the student is measured again
    again = json.loads(file.read_text())
    *teachers, student = rows
    assert again[student]["rewards"] != rows[student]["rewards"] and again[student]["step"] == rows[student]["step"]
    assert [again[name] for name in teachers] == [rows[name] for name in teachers] and file.read_text() != first
    changed = settings.read_text().replace("per_task: 1", "per_task: 2").replace("teacher_steps: 1", "teacher_steps: 4")
    settings.write_text(changed)
    assert gdmd("report", "run").code == 0  # all are measured again, and two rows of the teacher are now one
    rows = json.loads(file.read_text())
    assert [(row["nfe"], row["images"]) for row in rows.values()] == [(8, 24), (4, 24), (4, 24)]


def test_progress_of_a_measurement_counts_its_images(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the images of the warm-up, which are thrown away."""
    monkeypatch.setattr("gdmd.reporting.progress_bar.SECONDS_PER_LINE", -1.0)
    done = gdmd("eval", "teacher-4", "--per-task", "2", "--images", "2")
    assert "on 24 images: 24 of 24" in done.err and "25 of" not in done.err and " of 32" not in done.err, done.err


def test_end_of_training_keeps_current_rows_only(gdmd: Gdmd) -> None:
    """A resumed run leaves out teacher rows that were measured with other settings or by an older version."""
    gdmd.trained()
    file = Path("run/evaluation.json")
    assert gdmd("report", "run").code == 0
    rows = json.loads(file.read_text())
    stale, *current, _ = rows
    rows[stale]["key"] = "older"
    file.write_text(json.dumps(rows))
    finished = gdmd("train", "--resume", "run", "loop.steps=3")
    assert finished.code == 0, finished.err
    kept = json.loads(file.read_text())
    assert stale not in kept and [kept[name] for name in current] == [rows[name] for name in current]


SHAPES = [name for name in recipe_names() if read_recipe(name).model.kind == "shapes"]
BY_METHOD = list({read_recipe(name).method.kind: name for name in SHAPES}.values())


@pytest.mark.parametrize("name", BY_METHOD)
def test_metric_keys_of_a_recipe(gdmd: Gdmd, name: str) -> None:
    """The keys known before training are those that the training logs."""
    kind = read_recipe(name).method.kind
    overrides = [one for one in TINY if "group_size" not in one or kind == "gdmd"]
    overrides += ["method.images_per_prompt=2"] if kind in ("dmd_nft", "dmd_grpo") else []
    overrides += ["method.cold_start=1"] if kind == "dmdr" else []
    overrides += ["validation.every=2", "validation.prompts=[a ring]"]
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
def test_unknown_best_metric(gdmd: Gdmd, given: tuple[str, ...], message: str) -> None:
    finished = gdmd.train(*given, "--run", "run")
    assert finished.code == 2 and message in finished.err and not Path("run").exists(), finished.err


def test_printed_length(gdmd: Gdmd) -> None:
    finished = gdmd.train("method.group_size=2", "loop.steps=3", "--run", "run")
    assert "4-step student; 3 iterations of 2 samples, 6 student updates" in finished.err
    assert not [name for name in recipe_names() if re.search(r"\d updates|student updates", read_recipe(name).about)]


def test_damaged_checkpoint_falls_back(gdmd: Gdmd) -> None:
    gdmd.trained()
    size = ("--per-task", "1", "--images", "2")
    first = gdmd("eval", "run", "--json", *size)
    assert json.loads(first.out)["step"] == 2 and "note:" not in first.err
    (Path("run/checkpoints/step_000002/student.safetensors")).write_bytes(b"")
    note = "step 2 was skipped; step 1 is used"
    measured = gdmd("eval", "run", "--json", *size)
    assert json.loads(measured.out)["step"] == 1 and measured.err.count(note) == 1
    sampled = gdmd("sample", "run", "-p", "a red ring", "-n", "1", "-o", "a.png")
    assert sampled.code == 0 and note in sampled.err
    assert "step 2 was skipped" in gdmd.train("loop.start_from=run", "loop.seed=1", "--run", "next").err
    chosen = gdmd("eval", "run", "--checkpoint", "2", "--json", *size)
    assert chosen.code == 2 and "student.safetensors is damaged" in chosen.err and not chosen.out


def test_resume_without_checkpoints(gdmd: Gdmd) -> None:
    gdmd.trained()
    shutil.rmtree("run/checkpoints")
    again = gdmd("train", "--resume", "run", "loop.steps=1", "--no-eval")
    assert again.code == 0
    assert "run/checkpoints holds no checkpoint: the run starts over, without its 2 logged rows" in again.err


def test_trained_marks(gdmd: Gdmd) -> None:
    assert "*" not in gdmd("eval", "teacher-4", "--per-task", "1", "--images", "2").out.split("* used in training")[0]
    gdmd.trained("method.gamma=0")
    assert "*" not in gdmd("eval", "run", "--per-task", "1", "--images", "2").out.split("* used in training")[0]
    assert gdmd("report", "run").code == 0 and "mark trained" not in Path("run/report.html").read_text()


@pytest.mark.parametrize("network", ["vae", "teacher", "scorers"])
def test_pretrain(gdmd: Gdmd, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    again = gdmd("pretrain", network, "--steps", "2", "--out", "nets", "--resume", *extra)
    assert again.code == 0 and f"nets/{name}.safetensors" in again.err and "2/2" not in again.err


def test_doctor(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = gdmd("doctor", "--json")
    assert healthy.code == 0 and json.loads(healthy.out)["ok"], healthy.out
    found = {check["name"]: check["found"] for check in json.loads(healthy.out)["checks"]}
    assert found["asset shapes:sdxl"].endswith("sha256 verified, loads")
    folder = Path(shutil.copytree(gdmd.assets, "assets")).resolve()
    monkeypatch.setattr("gdmd.runs.assets.asset_folder", lambda: folder)
    shutil.copytree(shapes_pipeline.PIPELINES / "sdxl", folder / "pipelines" / "sdxl")
    (folder / doctor.SUMS).write_text(json.dumps(doctor.checksums(folder)))
    (folder / "shapes_pref.safetensors").write_bytes(b"garbage")
    for user in (shapes_pipeline, doctor):
        monkeypatch.setattr(user, "PIPELINES", folder / "pipelines")
    with (folder / "pipelines" / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"x")
    finished = gdmd("doctor")
    assert finished.code == 2 and "FAIL asset shapes_pref" in finished.out
    assert "FAIL asset shapes:sdxl" in finished.out and "the shipped one" in finished.out
    assert "asset shapes_pref" in finished.err and "Traceback" not in finished.err


def test_signal_saves_a_checkpoint(shared_assets: Path, tmp_path: Path) -> None:
    """A signal to the real program; tests/training has the other signals."""
    assets = shared_assets
    own = [f"model.{name}={assets}/shapes_{name}.safetensors" for name in ("teacher", "vae")]
    own += [f"rewards.{k}.asset={assets}/{name}.safetensors" for k, name in enumerate(("shapes_clip", "shapes_pref"))]
    arguments = [
        "train",
        "shapes_smoke",
        *own,
        *TINY,
        "loop.steps=100000",
        "loop.checkpoint_every=100000",
        "--run",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "gdmd", *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "gdmd train --resume run" in printed and "Traceback" not in printed
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints") is not None


def test_nonfinite_loss(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.lr_student=1e30", "loop.lr_fake=1e30", "method.gamma=0", "loop.steps=8", "--run", "run")
    assert finished.code == 3, finished.err
    assert "not finite" in finished.err and "Traceback" not in finished.err


def test_start_from_a_missing_run(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.start_from=nowhere", "--run", "run")
    assert finished.code == 2 and "loop.start_from" in finished.err, finished.err
