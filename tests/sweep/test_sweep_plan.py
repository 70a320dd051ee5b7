"""What a sweep config may contain, which runs it defines, and in which order they are done. Nothing here trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gdmd.config.load import ConfigError
from gdmd.config.methods.all import without_rewards
from gdmd.io import RunError
from gdmd.sweep import pool
from gdmd.sweep import runs as sweep_runs
from gdmd.sweep.budgets import Pace, iterations, pace
from gdmd.sweep.pool import FAILED_FIRST, MISSING_FIRST, Table, duration, run_sweep
from gdmd.sweep.results import other_seeds
from gdmd.sweep.runs import SECOND_STAGE, SweepRun, outdated, plan, read_table, selected, unique, with_first_stages
from gdmd.sweep.spec import Sweep, read_sweep, sweep_names
from gdmd.sweep.worker import settings

HEAD = "name: mine\nbase: shapes_smoke\nstudent_updates: 4\nseeds: [0, 1]\nbudgets: [updates, passes]\n"
ROWS = """rows:
  - {name: gdmd, kind: gdmd}
  - {name: dmd, kind: baseline, recipe: dmd}
  - {name: "off", kind: control, overrides: {method.gamma: 0.0}, budgets: [updates]}
"""
STAGES = """teachers: []
rows:
  - {name: gdmd, kind: gdmd, start_from: first}
  - {name: first, kind: baseline, recipe: dmd, student_updates: 7, budgets: [updates]}
  - {name: dmd, kind: baseline, recipe: dmd, start_from: first, budgets: [passes]}
"""


def read(tmp_path: Path, text: str = HEAD + ROWS) -> Sweep:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read_sweep(str(path))


def by_name(tmp_path: Path, text: str = HEAD + ROWS) -> dict[str, SweepRun]:
    return {run.name: run for run in plan(read(tmp_path, text))}


def hashes(tmp_path: Path, text: str = HEAD + ROWS) -> dict[str, str]:
    return {name: run.hash for name, run in by_name(tmp_path, text).items()}


def store_job(run: SweepRun, out: Path, job: Any) -> None:
    run.folder(out).mkdir(parents=True, exist_ok=True)
    (run.folder(out) / "job.json").write_text(json.dumps(job))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_resolve(name: str) -> None:
    """Rows are trained on the two seen rewards only, unless their name says otherwise."""
    shipped = read_sweep(name)
    assert shipped.config.name == name and shipped.config.about
    assert shipped.config.row(shipped.config.headline).kind == "gdmd"
    kinds = {row.kind for row in shipped.config.rows}
    assert kinds == {"baseline", "gdmd", *([] if shipped.of_pipelines else ["control"])}
    for row, recipe in shipped.recipes.items():
        if "partial_credit" not in row:
            assert {reward.kind for reward in recipe.rewards} == {"shapes_clip", "shapes_pref"}
        plain = without_rewards(recipe.method)
        assert (plain is None) == (not recipe.method.rewarded) and (plain is None or not plain.rewarded)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    rows = "rows:\n  - {name: gdmd, kind: gdmd, overrides: {method.gama: 1, method.eta: 2}}\n"
    rows += "  - {name: dmd, kind: baseline, recipe: dmdd}\n"
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, HEAD + rows)
    text = str(raised.value)
    assert len(raised.value.errors) == 3
    assert "row 'gdmd'" in text and "'gamma'" in text and "method.eta" in text
    assert "row 'dmd'" in text and "did you mean 'dmd'" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + ROWS + "  - {name: dmd, kind: baseline}\n", "'dmd' is used 2 times"),
        (HEAD + ROWS + "past_rows: [{name: dmd, kind: baseline}]\n", "'dmd' is used 2 times"),
        (HEAD.replace("[0, 1]", "[0, 0]") + ROWS, "seed 0 is listed twice"),
        (HEAD + ROWS.replace('"off",', '"off", seeds: [3, 3],'), "seed 3 of row 'off' is listed twice"),
        (HEAD + "headline: ours\n" + ROWS, "headline 'ours' is not one of the rows"),
        (HEAD + "overrides: {loop.steps: 9}\n" + ROWS, "'loop.steps', which the sweep sets"),
        (HEAD + "overrides: {eval.images: 1}\n" + ROWS, "'eval.images', which the sweep sets"),
        (HEAD + ROWS + "images: {rows: [nobody]}\n", "'nobody', which is not a row of"),
        (HEAD + ROWS.replace("recipe: dmd", "recipe: sdxl_gdmd"), "row 'dmd': a sweep measures ShapesEval"),
        (
            HEAD + STAGES.replace("start_from: first, b", "start_from: frist, b"),
            "'frist', which is not one of the rows",
        ),
        (HEAD + STAGES.replace("student_updates: 7", "start_from: dmd"), "only two stages"),
        (
            HEAD + STAGES.replace("7, budgets: [updates]", "7, budgets: [passes]"),
            "not trained under the budget updates",
        ),
        (HEAD + STAGES.replace("gdmd, start", "gdmd, seeds: [0, 5], start"), "'first', which does not have seed 5"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_unknown_sweeps_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        read_sweep("smok")
    with pytest.raises(ConfigError, match="no such file"):
        read_sweep("nowhere.yaml")


def test_errors_import_no_torch_and_write_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gdmd", "sweep", "smoke", "--only", "nobody"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and "gdmd.cli.sweep" in modules and "error: --only nobody" in done.stderr
    assert not {"torch", "matplotlib", "numpy", "scipy"} & modules and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- runs and their hashes


def test_runs_are_rows_times_seeds_times_budgets(tmp_path: Path) -> None:
    runs = plan(read(tmp_path))
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) == 2 * (3 + 3 + 2)  # teachers, updates, passes
    assert "off/0/updates" in names and "off/0/passes" not in names
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {(r.seed, r.job["recipe"]["eval"]["seed"]) for r in runs} == {(0, 777), (1, 778)}  # paired noise


def test_rows_may_have_more_seeds(tmp_path: Path) -> None:
    more = ROWS.replace("{name: gdmd,", "{name: gdmd, seeds: [0, 1, 5],")
    more += "teachers:\n  - {name: teacher_4, steps: 4, seeds: [0, 1, 5]}\n  - {name: teacher_50, steps: 50}\n"
    sweep = read(tmp_path, HEAD + more)
    assert {run.method for run in plan(sweep) if run.seed == 5} == {"gdmd", "teacher_4"}
    before = {run.key for run in plan(read(tmp_path)) if run.kind != "teacher"}
    assert before < {run.key for run in plan(sweep)}  # runs that were there stay valid
    assert other_seeds(sweep.config) == ", **teacher_4** and **gdmd** over seeds 0, 1, 5"


def test_hash_depends_on_what_is_computed(tmp_path: Path) -> None:
    """Names, and fields set to their default, do not enter the hash: a new option keeps finished runs valid."""
    before = hashes(tmp_path)
    renamed = HEAD.replace("mine", "other") + ROWS.replace("name: dmd", "label: Another, name: dmd")
    assert hashes(tmp_path, renamed) == before
    default = ROWS.replace("name: gdmd, kind: gdmd", "name: gdmd, kind: gdmd, overrides: {method.dmd_weight: 1.0}")
    assert hashes(tmp_path, HEAD + default) == before
    changed = hashes(tmp_path, HEAD + ROWS.replace("method.gamma: 0.0", "method.gamma: 0.5"))
    assert {name for name in before if before[name] != changed[name]} == {"off/0/updates", "off/1/updates"}
    longer = hashes(tmp_path, HEAD.replace("updates: 4", "updates: 5") + ROWS)
    assert {name.split("_")[0] for name in before if before[name] == longer[name]} == {"teacher"}


def test_reference_row_is_trained_once_for_both_budgets(tmp_path: Path) -> None:
    runs = by_name(tmp_path)
    assert runs["gdmd/0/passes"].hash == runs["gdmd/0/updates"].hash
    assert runs["dmd/0/passes"].hash != runs["dmd/0/updates"].hash
    assert runs["dmd/0/passes"].job["passes_of"] and runs["dmd/0/updates"].job["passes_of"] is None
    assert len(unique(runs.values())) == len(runs) - 2
    firsts = list({run.hash: None for run in runs.values()})
    assert [run.hash for run in unique(runs.values())] == firsts  # in the order of the sweep


def test_changed_defaults_are_found(tmp_path: Path) -> None:
    run = by_name(tmp_path)["gdmd/0/updates"]
    stored = json.loads(json.dumps(run.job))
    del stored["recipe"]["method"]["gamma"]  # an option that did not exist then
    store_job(run, tmp_path, stored)
    assert outdated([run], tmp_path) == []
    stored["recipe"]["loop"]["clip"] = 2.0
    store_job(run, tmp_path, stored)
    assert "recipe.loop.clip: 2.0 -> 1.0" in outdated([run], tmp_path)[0]
    with pytest.raises(RunError, match="other defaults.*recipe.loop.clip"):
        run_sweep(read(tmp_path), "mine.yaml", tmp_path, 1, ["gdmd"], print)
    (run.folder(tmp_path) / "job.json").write_text('{"teach')
    with pytest.raises(RunError, match="job.json: .* Delete .* to repeat the run"):
        outdated([run], tmp_path)


def test_other_files_make_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's file is part of the hash; a shipped file that changed makes the run outdated."""
    teacher = tmp_path / "teacher.safetensors"
    found = []
    for number, content in enumerate((b"one", b"two", b"one")):
        teacher.write_bytes(content)
        os.utime(teacher, ns=(0, number))
        found.append(hashes(tmp_path, HEAD + f"overrides: {{model.teacher: {teacher}}}\n" + ROWS))
    assert found[0] == found[2] and all(found[0][name] != found[1][name] for name in found[0])
    shipped = plan(read(tmp_path))[0]
    store_job(shipped, tmp_path, shipped.job)
    assert outdated([shipped], tmp_path) == []
    monkeypatch.setattr(sweep_runs, "asset_path", lambda name: teacher)
    later = plan(read(tmp_path))[0]
    assert later.hash == shipped.hash and "contents.shapes_vae" in outdated([later], tmp_path)[0]


def test_only_selects_by_pattern(tmp_path: Path) -> None:
    runs = plan(read(tmp_path))
    assert {run.name for run in selected(runs, ["dmd/1"])} == {"dmd/1/updates", "dmd/1/passes"}
    assert {run.method for run in selected(runs, ["*dmd", "off/0"])} == {"gdmd", "dmd", "off"}
    assert selected(runs, []) == runs
    with pytest.raises(ValueError, match="--only dmdr: matches no run.*gdmd"):
        selected(runs, ["gdmd", "dmdr"])


def test_read_table_reports_damage(tmp_path: Path) -> None:
    line = '{"method": "dmd", "seed": 0, "budget": "updates", "hash": "x", "shapeseval": 0.5}\n'
    path = tmp_path / "table.jsonl"
    path.write_text(line + line[:20])  # cut off by a crash
    assert len(read_table(path)) == 1
    path.write_text('{"method": "dmd"}\n' + line)
    with pytest.raises(ValueError, match="line 1 is not a line of a sweep"):
        read_table(path)


def test_table_replaces_the_line_of_a_repeated_run(tmp_path: Path) -> None:
    runs = plan(read(tmp_path))[:2]
    for score in (0.25, 0.5):
        table = Table(tmp_path, "mine.yaml")
        for run in runs:
            run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
            run.result(tmp_path).write_text(json.dumps({"shapeseval": score if run is runs[0] else 0.125}))
            table.add(run)
    assert [row["shapeseval"] for row in read_table(tmp_path / "table.jsonl")] == [0.5, 0.125]
    runs[0].result(tmp_path).write_text("")
    with pytest.raises(RunError, match=r"result\.json: .* Delete it to measure the run again"):
        table.add(runs[0])


# ---------------------------------------------------------------- budgets


def test_pace_turns_budgets_into_iterations() -> None:
    assert [Pace(90.0, 4.0).steps_for_updates(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [Pace(90.0, 4.0).steps_for_passes(p) for p in (1, 134, 136, 900)] == [1, 1, 2, 10]


def test_equal_passes_from_a_dry_run(tmp_path: Path) -> None:
    """DMD: 5 rollouts of 1 to 4 calls, 5 x 3 for the fake score, 2 + 1 for the target, 3 for the student: 33.5."""
    job = by_name(tmp_path)["dmd/0/passes"].job
    own = pace(job["recipe"], 40)
    batch = job["recipe"]["loop"]["batch_size"]
    assert own.updates == 1 and batch * 32 < own.passes < batch * 35
    reference = pace(job["passes_of"], 4)
    steps = iterations(job | {"student_updates": 400})
    assert steps * own.passes == pytest.approx(400 / reference.updates * reference.passes, rel=0.02)
    assert iterations(job | {"passes_of": None}) == 4


# ---------------------------------------------------------------- stages


def test_second_stage_starts_from_the_first_of_its_seed(tmp_path: Path) -> None:
    runs = by_name(tmp_path, HEAD + STAGES)
    for seed in (0, 1):
        first = runs[f"first/{seed}/updates"]
        for name in (f"gdmd/{seed}/updates", f"gdmd/{seed}/passes", f"dmd/{seed}/passes"):
            assert runs[name].first_stage == first and runs[name].job["first_stage"] == first.hash
            assert runs[name].job["recipe"]["loop"]["seed"] == seed + SECOND_STAGE
            started = settings(runs[name].job, 3, tmp_path / "runs").loop.start_from
            assert started == str(first.folder(tmp_path) / "run")
        assert first.first_stage is None and first.job["recipe"]["loop"]["seed"] == seed
        assert first.job["student_updates"] == 7 and runs[f"dmd/{seed}/passes"].job["student_updates"] == 4
    longer = hashes(tmp_path, HEAD + STAGES.replace("updates: 7", "updates: 8"))
    assert all(run.hash != longer[name] for name, run in runs.items())
    wanted = with_first_stages(selected(list(runs.values()), ["dmd/1"]))
    assert [run.name for run in wanted] == ["first/1/updates", "dmd/1/passes"]


def test_one_stage_shares_the_runs_of_stages() -> None:
    """DMD, and GDMD after it, have equal hashes in both sweeps, so that one training serves both tables."""
    stages = {(r.method, r.seed): r.hash for r in plan(read_sweep("stages")) if r.budget == "updates"}
    same = {"dmd": "dmd_first", "then_gdmd": "gdmd"}
    shared = [run for run in plan(read_sweep("one_stage")) if run.method in same]
    assert len({run.method for run in shared}) == len(same)
    assert [run.name for run in shared if run.hash != stages[same[run.method], run.seed]] == []


class Worker:
    """A process that has ended, with a result or with the exit code of a failure."""

    def __init__(self, folder: Path, *, fails: bool) -> None:
        self.returncode = int(fails)
        if not fails:
            (folder / "result.json").write_text(json.dumps({"shapeseval": 0.5, "images": 1}))

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def instant_pool(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(pool, "_images_drawn", lambda *_: True)
    monkeypatch.setattr(pool, "POLL", 0.0)
    return monkeypatch


def test_second_stages_wait_for_their_first(tmp_path: Path, instant_pool: pytest.MonkeyPatch) -> None:
    """The first stage of seed 0 fails."""
    sweep = read(tmp_path, HEAD + STAGES)
    by_hash = {run.hash: run for run in plan(sweep)}
    begun: list[str] = []

    def worker(module: str, folder: Path, log: Any) -> Worker:
        begun.append("{0.method}/{0.seed}".format(by_hash[folder.name]))
        return Worker(folder, fails=begun[-1] == "first/0")

    instant_pool.setattr(pool, "_worker", worker)
    shown: list[pool.Status] = []
    outcome = run_sweep(sweep, "mine.yaml", tmp_path / "out", 3, [], lambda text: None, shown.append)
    assert begun.index("first/1") < min(begun.index("gdmd/1"), begun.index("dmd/1"))
    lost = {name for name, why in outcome.failed.items() if why == FAILED_FIRST}
    assert lost == {"gdmd/0/updates", "dmd/0/passes"} and not {"gdmd/0", "dmd/0"} & set(begun)
    assert (shown[0].done, shown[0].seconds_left) == (0, None) and shown[0].running and shown[-1].done == len(begun)


SHARED = """rows:
  - {name: gdmd, kind: gdmd, start_from: again}
  - {name: first, kind: baseline, recipe: dmd, student_updates: 7}
  - {name: again, kind: baseline, recipe: dmd, student_updates: 7}
  - {name: late, kind: baseline, recipe: dmd, start_from: first}
"""


@pytest.mark.parametrize("lost", [False, True])
def test_a_first_stage_shared_by_two_rows_fails_both(
    tmp_path: Path, instant_pool: pytest.MonkeyPatch, lost: bool
) -> None:
    """The first stage fails, or (``lost``) its result is deleted while the others wait for it."""
    sweep = read(tmp_path, HEAD.replace("[0, 1]", "[0]").replace("[updates, passes]", "[updates]") + SHARED)
    first = next(run for run in plan(sweep) if run.method == "first")
    assert first.hash == next(run for run in plan(sweep) if run.method == "again").hash

    def add(self: Table, run: SweepRun) -> dict[str, float]:
        if run.hash == first.hash:
            run.result(tmp_path / "out").unlink(missing_ok=True)
        return {"shapeseval": 0.5}

    if lost:
        instant_pool.setattr(Table, "add", add)
    instant_pool.setattr(
        pool, "_worker", lambda module, folder, log: Worker(folder, fails=not lost and folder.name == first.hash)
    )
    outcome = run_sweep(sweep, "mine.yaml", tmp_path / "out", 1, ["gdmd", "late"], lambda text: None)
    reason = MISSING_FIRST if lost else FAILED_FIRST
    assert {name for name, why in outcome.failed.items() if why == reason} == {"gdmd/0/updates", "late/0/updates"}
    assert outcome.exit_code == 1


def test_duration() -> None:
    assert [duration(s) for s in (58.4, 89.0, 91.0, 3540.0, 11100.0)] == [
        "58 s",
        "89 s",
        "2 min",
        "59 min",
        "3 h 05 min",
    ]
