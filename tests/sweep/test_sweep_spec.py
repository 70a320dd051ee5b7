"""Comparisons: what a specification may say, and which cells it means. Nothing here trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gdmd.config.load import ConfigError
from gdmd.config.methods.all import without_rewards
from gdmd.io import RunError
from gdmd.sweep import cells as compare_plan
from gdmd.sweep.cells import chosen, outdated, plan, read_table, unique
from gdmd.sweep.pool import Table, run_comparison
from gdmd.sweep.results import other_seeds
from gdmd.sweep.spec import COMPARISONS, Comparison, comparison_names, read_comparison

HEAD = "name: mine\nbase: shapes_smoke\nstudent_updates: 4\nseeds: [0, 1]\nbudgets: [updates, passes]\n"
ROWS = """rows:
  - {name: gdmd, kind: gdmd}
  - {name: dmd, kind: rival, recipe: dmd}
  - {name: shuffled, kind: control, overrides: {method.kind: gdmd_ablation, method.control: shuffled}, budgets: [updates]}
"""


def comparison(tmp_path: Path, text: str = HEAD + ROWS) -> Comparison:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read_comparison(str(path))


@pytest.mark.parametrize("name", comparison_names())
def test_a_shipped_comparison_resolves_and_is_trained_on_seen_rewards_only(name: str) -> None:
    shipped = read_comparison(name)
    assert shipped.spec.name == name and shipped.spec.about
    assert shipped.spec.row(shipped.spec.headline).kind == "gdmd" and "gdmd" in shipped.recipes
    assert {row.kind for row in shipped.spec.rows} >= {"gdmd", "control"}
    for row, recipe in shipped.recipes.items():
        if "partial_credit" not in row:
            assert {reward.kind for reward in recipe.rewards} == {"shapes_clip", "shapes_pref"}


@pytest.mark.parametrize("name", ["headline", "smoke"])
def test_the_full_comparisons_hold_the_teacher_the_paper_and_its_rivals(name: str) -> None:
    shipped = read_comparison(name)
    assert {"gdmd", "gdmd_paper", "dmd"} <= shipped.recipes.keys()
    assert {teacher.steps for teacher in shipped.spec.teachers} == {50, 4}
    assert {row.kind for row in shipped.spec.rows} == {"rival", "gdmd", "control"}


def test_the_headline_comparison_is_large_enough_to_count() -> None:
    spec = read_comparison("headline").spec
    assert len(spec.seeds) >= 5 and 6 * spec.evaluation.per_task * spec.evaluation.images >= 1200
    assert spec.budgets == ("updates", "passes") and spec.evaluation.split == "eval"


def test_the_mistakes_of_all_rows_are_listed_at_once(tmp_path: Path) -> None:
    rows = "rows:\n  - {name: gdmd, kind: gdmd, overrides: {method.gama: 1, method.eta: 2}}\n"
    rows += "  - {name: dmd, kind: rival, recipe: dmdd}\n"
    with pytest.raises(ConfigError) as raised:
        comparison(tmp_path, HEAD + rows)
    text = str(raised.value)
    assert len(raised.value.errors) == 3
    assert "row 'gdmd'" in text and "'gamma'" in text and "method.eta" in text
    assert "row 'dmd'" in text and "did you mean 'dmd'" in text


def test_the_mistakes_of_a_specification_are_listed_at_once(tmp_path: Path) -> None:
    text = HEAD.replace("[0, 1]", "[0, 0]") + "headline: ours\noverrides: {loop.steps: 9, eval.images: 1}\n" + ROWS
    text += "  - {name: dmd, kind: rival}\npictures: {rows: [nobody]}\n"
    with pytest.raises(ConfigError) as raised:
        comparison(tmp_path, text)
    for part in (
        "'dmd' is used 2 times",
        "seed 0 is listed twice",
        "headline 'ours'",
        "loop.steps",
        "eval.images",
        "nobody",
    ):
        assert part in str(raised.value)


def test_an_unknown_comparison_is_named_with_its_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        read_comparison("smok")
    with pytest.raises(ConfigError, match="no such file"):
        read_comparison("nowhere.yaml")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["smok"], 2), (["smoke", "--only", "nobody"], 2)])
def test_help_and_errors_import_no_torch(words: list[str], code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gdmd", "sweep", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == code and "gdmd.cli.sweep" in modules
    assert not {"torch", "matplotlib", "numpy"} & modules
    assert "Examples:" in done.stdout if code == 0 else "error: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_cells_are_rows_times_seeds_times_budgets(tmp_path: Path) -> None:
    cells = plan(comparison(tmp_path))
    places = [cell.place for cell in cells]
    assert len(set(places)) == len(places) == 2 * (3 + 3 + 2)  # teachers, updates, passes
    assert "shuffled/0/updates" in places and "shuffled/0/passes" not in places
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_a_row_may_have_more_seeds_and_the_page_says_so(tmp_path: Path) -> None:
    more = ROWS.replace("{name: gdmd,", "{name: gdmd, seeds: [0, 1, 5],")
    more += "teachers:\n  - {name: teacher_4, steps: 4, seeds: [0, 1, 5]}\n  - {name: teacher_50, steps: 50}\n"
    found = comparison(tmp_path, HEAD + more)
    cells = plan(found)
    seeds = {row: [c.seed for c in cells if c.method == row and c.budget == "updates"] for row in ("gdmd", "dmd")}
    assert seeds == {"gdmd": [0, 1, 5], "dmd": [0, 1]}
    assert {c.method for c in cells if c.seed == 5} == {"gdmd", "teacher_4"}
    before = {cell.key for cell in plan(comparison(tmp_path)) if cell.kind != "teacher"}
    assert before < {cell.key for cell in cells}  # cells that were there stay what they are
    assert other_seeds(found.spec) == ", **teacher_4** and **gdmd** over seeds 0, 1, 5"
    assert other_seeds(comparison(tmp_path).spec) == ""


def test_mistakes_in_the_seeds_of_rows_are_named(tmp_path: Path) -> None:
    rows = ROWS.replace("{name: gdmd,", "{name: gdmd, seeds: [0, 1, 5], start_from: dmd,")
    rows = rows.replace("{name: shuffled,", "{name: shuffled, seeds: [3, 3],")
    with pytest.raises(ConfigError) as raised:
        comparison(tmp_path, HEAD + rows)
    assert "seed 3 of row 'shuffled' is listed twice" in str(raised.value)
    assert "row 'gdmd' has start_from 'dmd', which has no seed 5" in str(raised.value)


def test_a_hash_is_that_of_what_is_computed(tmp_path: Path) -> None:
    before = {cell.place: cell.hash for cell in plan(comparison(tmp_path))}
    renamed = HEAD.replace("mine", "other") + ROWS.replace("name: dmd", "label: Another, name: dmd")
    assert {cell.place: cell.hash for cell in plan(comparison(tmp_path, renamed))} == before
    changed = {c.place: c.hash for c in plan(comparison(tmp_path, (HEAD + ROWS).replace("shuffled}", "constant}")))}
    assert {place for place in before if before[place] != changed[place]} == {
        "shuffled/0/updates",
        "shuffled/1/updates",
    }
    longer = {c.place: c.hash for c in plan(comparison(tmp_path, HEAD.replace("updates: 4", "updates: 5") + ROWS))}
    assert {place.split("/")[0] for place in before if before[place] == longer[place]} == {
        "teacher_100",
        "teacher_50",
        "teacher_4",
    }
    assert len(set(before.values())) == len(before) - 2  # the reference row under both budgets is one training


def test_a_field_at_its_default_is_no_part_of_the_hash_but_the_kind_of_method_is(tmp_path: Path) -> None:
    """A new option whose default is the old behavior must not throw finished cells away."""
    before = {cell.place: cell.hash for cell in plan(comparison(tmp_path))}
    written = ROWS.replace("name: gdmd, kind: gdmd", "name: gdmd, kind: gdmd, overrides: {method.beta: 1.0}")
    assert {cell.place: cell.hash for cell in plan(comparison(tmp_path, HEAD + written))} == before
    same = "rows:\n  - {name: gdmd, kind: gdmd, overrides: {method: {kind: gdmd}}}\n"
    same += "  - {name: dmd, kind: rival, overrides: {method: {kind: dmd}}}\n"
    cells = {cell.place: cell.hash for cell in plan(comparison(tmp_path, HEAD + same))}
    assert cells["gdmd/0/updates"] != cells["dmd/0/updates"]


def test_cells_made_with_another_default_are_found(tmp_path: Path) -> None:
    cell = next(cell for cell in plan(comparison(tmp_path)) if cell.method == "gdmd")
    folder = cell.folder(tmp_path)
    folder.mkdir(parents=True)
    stored = json.loads(json.dumps(cell.job))
    del stored["recipe"]["method"]["gamma"]  # an option that did not exist then
    (folder / "job.json").write_text(json.dumps(stored))
    assert outdated([cell], tmp_path) == []
    stored["recipe"]["loop"]["clip"] = 2.0
    (folder / "job.json").write_text(json.dumps(stored))
    assert "recipe.loop.clip: 2.0 -> 1.0" in outdated([cell], tmp_path)[0]
    with pytest.raises(RunError, match="other defaults.*recipe.loop.clip"):
        run_comparison(comparison(tmp_path), "mine.yaml", tmp_path, 1, ["gdmd"], print)


def test_values_that_read_like_the_words_of_a_message_are_values(tmp_path: Path) -> None:
    cell = plan(comparison(tmp_path))[0]
    folder = cell.folder(tmp_path)
    folder.mkdir(parents=True)
    for stored, found in (
        ({"split": "nothing"}, ["split: nothing"]),
        ({"split": "a -> b"}, ["split: a -> b -> "]),
        ({"recipe": {"name": "x"}}, []),
    ):
        (folder / "job.json").write_text(json.dumps(stored))
        said = outdated([cell], tmp_path)
        assert len(said) == len(found) and all(part in line for part, line in zip(found, said, strict=True))


def test_other_files_under_the_same_names_make_other_cells_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(b"one")
    text = HEAD + f"overrides: {{model.teacher: {teacher}}}\n" + ROWS
    hashes = []
    for content in (b"one", b"two", b"one"):
        teacher.write_bytes(content)
        os.utime(teacher, ns=(0, len(hashes)))
        hashes.append({cell.place: cell.hash for cell in plan(comparison(tmp_path, text))})
    assert hashes[0] == hashes[2] and all(hashes[0][place] != hashes[1][place] for place in hashes[0])
    shipped = plan(comparison(tmp_path))[0]
    shipped.folder(tmp_path).mkdir(parents=True)
    (shipped.folder(tmp_path) / "job.json").write_text(json.dumps(shipped.job))
    assert outdated([shipped], tmp_path) == []
    monkeypatch.setattr(compare_plan, "asset_path", lambda name: teacher)
    later = plan(comparison(tmp_path))[0]
    assert later.hash == shipped.hash and "contents.shapes_vae" in outdated([later], tmp_path)[0]


def test_the_line_of_a_cell_that_was_made_again_is_replaced(tmp_path: Path) -> None:
    cells = plan(comparison(tmp_path))[:2]
    for score in (0.25, 0.5):
        table = Table(tmp_path, "mine.yaml")
        for cell in cells:
            cell.folder(tmp_path).mkdir(parents=True, exist_ok=True)
            result = {"shapeseval": score if cell is cells[0] else 0.125}
            (cell.folder(tmp_path) / "result.json").write_text(json.dumps(result))
            table.add(cell)
    assert [row["shapeseval"] for row in read_table(tmp_path / "table.jsonl")] == [0.5, 0.125]


def test_the_reference_row_has_one_training_for_both_budgets(tmp_path: Path) -> None:
    cells = {cell.place: cell for cell in plan(comparison(tmp_path))}
    assert cells["gdmd/0/passes"].hash == cells["gdmd/0/updates"].hash
    assert cells["dmd/0/passes"].hash != cells["dmd/0/updates"].hash
    assert cells["dmd/0/passes"].job["passes_of"]["method"]["kind"] == "gdmd"
    assert len(unique(cells.values())) == len(cells) - 2


def test_rows_of_a_seed_share_their_evaluation_noise(tmp_path: Path) -> None:
    seeds = {(c.seed, c.job["recipe"]["eval"]["seed"]) for c in plan(comparison(tmp_path))}
    assert seeds == {(0, 777), (1, 778)}


def test_only_takes_patterns_and_refuses_useless_ones(tmp_path: Path) -> None:
    cells = plan(comparison(tmp_path))
    assert {c.place for c in chosen(cells, ["dmd/1"])} == {"dmd/1/updates", "dmd/1/passes"}
    assert {c.method for c in chosen(cells, ["*dmd", "shuffled/0"])} == {"gdmd", "dmd", "shuffled"}
    assert chosen(cells, []) == cells
    with pytest.raises(ValueError, match="--only dmdr: matches no cell.*gdmd"):
        chosen(cells, ["gdmd", "dmdr"])


def test_a_torn_last_line_is_left_out_and_damage_is_an_error(tmp_path: Path) -> None:
    line = '{"method": "dmd", "seed": 0, "budget": "updates", "hash": "x", "shapeseval": 0.5}\n'
    path = tmp_path / "table.jsonl"
    assert read_table(path) == []
    path.write_text(line + line[:20])
    assert len(read_table(path)) == 1
    path.write_text(line[:20] + "\n" + line)
    with pytest.raises(ValueError, match="line 1: "):
        read_table(path)
    path.write_text('{"method": "dmd"}\n' + line)
    with pytest.raises(ValueError, match="line 1 is not a line of a comparison"):
        read_table(path)


@pytest.mark.parametrize("row", [row.name for row in read_comparison("smoke").spec.rows])
def test_a_method_without_its_rewards_is_the_same_method_with_nothing_to_score(row: str) -> None:
    cfg = read_comparison("smoke").recipes[row].method
    plain = without_rewards(cfg)
    assert (plain is None) == (not cfg.rewarded)
    if plain is not None:
        changed = {key for key, value in plain.model_dump().items() if value != cfg.model_dump()[key]}
        assert not plain.rewarded and cfg.kind.startswith(plain.kind)  # a control is one of its method
        assert changed & {"gamma", "rl_weight", "tilt"} and changed <= {"gamma", "rl_weight", "tilt", "kind"}


def test_a_row_of_a_real_model_is_refused_because_shapeseval_cannot_judge_it(tmp_path: Path) -> None:
    text = (COMPARISONS / "smoke.yaml").read_text()
    spec = yaml.safe_load(text)
    spec["rows"][0]["recipe"] = "sdxl_gdmd"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(ConfigError, match=f"row '{spec['rows'][0]['name']}': a comparison measures ShapesEval"):
        read_comparison(str(tmp_path / "mine.yaml"))


def test_damaged_files_of_a_cell_are_named(tmp_path: Path) -> None:
    (cell, *_) = plan(read_comparison("smoke"))
    folder = cell.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"teach')
    with pytest.raises(
        RunError, match=f"cannot read {folder}/job.json: .* Delete {folder}, and the cell is made again"
    ):
        outdated([cell], tmp_path)
    (folder / "result.json").write_text("")
    with pytest.raises(RunError, match=r"result\.json: .* Delete it, and the cell is measured again"):
        Table(tmp_path, "smoke").add(cell)
