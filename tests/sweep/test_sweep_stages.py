"""Rows of a comparison that begin from another row: cells, hashes, mistakes, and the order of the jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gdmd.config.load import ConfigError
from gdmd.sweep import pool as compare
from gdmd.sweep.cells import SECOND_STAGE, Cell, chosen, plan, with_first_stages
from gdmd.sweep.pool import run_comparison
from gdmd.sweep.spec import Comparison, read_comparison
from gdmd.sweep.worker import settings

SPEC = """name: mine
base: shapes_smoke
student_updates: 4
seeds: [0, 1]
budgets: [updates, passes]
teachers: []
rows:
  - {name: gdmd, kind: gdmd, start_from: first}
  - {name: first, kind: rival, recipe: dmd, student_updates: 7, budgets: [updates]}
  - {name: dmd, kind: rival, recipe: dmd, start_from: first, budgets: [passes]}
"""


def comparison(tmp_path: Path, text: str = SPEC) -> Comparison:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read_comparison(str(path))


def cells_of(tmp_path: Path, text: str = SPEC) -> dict[str, Cell]:
    return {cell.place: cell for cell in plan(comparison(tmp_path, text))}


def test_a_second_stage_names_the_first_of_its_seed(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    for seed in (0, 1):
        first = cells[f"first/{seed}/updates"]
        for place in (f"gdmd/{seed}/updates", f"gdmd/{seed}/passes", f"dmd/{seed}/passes"):
            assert cells[place].first == first and cells[place].job["first_stage"] == first.hash
            assert cells[place].job["recipe"]["loop"]["seed"] == seed + SECOND_STAGE
        assert first.first is None and first.job["recipe"]["loop"]["seed"] == seed
        assert first.job["student_updates"] == 7 and cells[f"gdmd/{seed}/updates"].job["student_updates"] == 4
        assert cells[f"dmd/{seed}/passes"].job["student_updates"] == 4  # those of the reference row
        assert {cell.job["recipe"]["eval"]["seed"] for cell in cells.values() if cell.seed == seed} == {777 + seed}


def test_another_first_stage_makes_other_cells_of_all_that_begin_from_it(tmp_path: Path) -> None:
    before = {place: cell.hash for place, cell in cells_of(tmp_path).items()}
    longer = {place: cell.hash for place, cell in cells_of(tmp_path, SPEC.replace("updates: 7", "updates: 8")).items()}
    assert all(before[place] != longer[place] for place in before)
    alone = cells_of(tmp_path, SPEC.replace("kind: gdmd, start_from: first", "kind: gdmd"))
    assert alone["gdmd/0/updates"].hash != before["gdmd/0/updates"] and "first_stage" not in alone["gdmd/0/updates"].job


def test_a_run_begins_from_the_folder_of_its_first_stage(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    place = cells["first/1/updates"].folder(tmp_path) / "run"
    assert settings(cells["dmd/1/passes"].job, 3, tmp_path / "cells").loop.start_from == str(place)
    assert settings(cells["first/1/updates"].job, 3, tmp_path / "cells").loop.start_from == ""


def test_only_a_second_stage_brings_its_first_before_it(tmp_path: Path) -> None:
    cells = plan(comparison(tmp_path))
    wanted = with_first_stages(chosen(cells, ["dmd/1"]))
    assert [cell.place for cell in wanted] == ["first/1/updates", "dmd/1/passes"]
    assert sorted(cell.place for cell in with_first_stages(cells)) == sorted(cell.place for cell in cells)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "start_from: first, budgets",
            "start_from: frist, budgets",
            "'frist', which is not among the rows gdmd, first",
        ),
        ("student_updates: 7", "start_from: dmd, student_updates: 7", "two stages, not more"),
        ("student_updates: 7, budgets: [updates]", "budgets: [passes]", "not trained under the budget updates"),
        ("budgets: [passes]", "overrides: {loop.start_from: runs/x}", "'loop.start_from', which the sweep sets"),
    ],
)
def test_a_wrong_first_stage_is_named(tmp_path: Path, before: str, after: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        comparison(tmp_path, SPEC.replace(before, after))


class Worker:
    """A job that ends at once: a result, or the exit code of a failure."""

    returncode: int

    def __init__(self, folder: Path, *, fails: bool) -> None:
        self.returncode = int(fails)
        if not fails:
            result = {"shapeseval": 0.5, "images": 1}
            (folder / "result.json").write_text(json.dumps(result))

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize("fails", [False, True])
def test_second_stages_wait_for_their_first_and_fail_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    mine = comparison(tmp_path)
    by_hash = {cell.hash: cell for cell in plan(mine)}
    begun: list[Cell] = []

    def worker(module: str, folder: Path, log: Any) -> Worker:
        begun.append(by_hash[folder.name])
        return Worker(folder, fails=fails and begun[-1].method == "first" and begun[-1].seed == 0)

    monkeypatch.setattr(compare, "_worker", worker)
    monkeypatch.setattr(compare, "_pictured", lambda *_: True)
    monkeypatch.setattr(compare, "POLL", 0.0)
    outcome = run_comparison(mine, "mine.yaml", tmp_path / "made", 3, [], _silent)
    order = [f"{cell.method}/{cell.seed}" for cell in begun]
    assert order.index("first/1") < min(order.index("gdmd/1"), order.index("dmd/1"))
    assert ("gdmd/0" in order) == (not fails)
    own = {"gdmd/0/updates", "dmd/0/passes"} if fails else set()
    assert {place for place, why in outcome.failed.items() if why == "its first stage failed"} == own


SHARED = """name: shared
base: shapes_smoke
student_updates: 4
seeds: [0]
budgets: [updates]
rows:
  - {name: gdmd, kind: gdmd, start_from: again}
  - {name: first, kind: rival, recipe: dmd, student_updates: 7}
  - {name: again, kind: rival, recipe: dmd, student_updates: 7}
  - {name: late, kind: rival, recipe: dmd, start_from: first}
"""


def test_a_failing_first_stage_that_two_rows_share_fails_both_second_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = comparison(tmp_path, SHARED)
    cells = {cell.method: cell for cell in plan(mine)}
    assert cells["first"].hash == cells["again"].hash
    monkeypatch.setattr(
        compare, "_worker", lambda module, folder, log: Worker(folder, fails=folder.name == cells["first"].hash)
    )
    monkeypatch.setattr(compare, "_pictured", lambda *_: True)
    monkeypatch.setattr(compare, "POLL", 0.0)
    outcome = run_comparison(mine, "mine.yaml", tmp_path / "made", 3, [], _silent)
    waited = {place for place, why in outcome.failed.items() if why == "its first stage failed"}
    assert waited == {"gdmd/0/updates", "late/0/updates"} and outcome.exit_code == 1


def test_a_second_stage_whose_first_left_no_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = comparison(tmp_path, SHARED)
    first = next(cell for cell in plan(mine) if cell.method == "first")

    def worker(module: str, folder: Path, log: Any) -> Worker:
        done = Worker(folder, fails=False)
        if folder.name == first.hash:
            monkeypatch.setattr(compare.Table, "add", lambda self, cell: _gone(folder))
        return done

    monkeypatch.setattr(compare, "_worker", worker)
    monkeypatch.setattr(compare, "_pictured", lambda *_: True)
    monkeypatch.setattr(compare, "POLL", 0.0)
    outcome = run_comparison(mine, "mine.yaml", tmp_path / "made", 1, ["gdmd", "late"], _silent)
    assert set(outcome.failed.values()) == {"its first stage has no result"}


def _gone(folder: Path) -> dict[str, float]:
    """Somebody deletes the result while the others wait for it."""
    (folder / "result.json").unlink(missing_ok=True)
    return {"shapeseval": 0.5}


def _silent(message: str) -> None:
    del message


def test_second_stages_in_one_stage_are_the_cells_of_stages() -> None:
    """So that one training serves both tables: DMD and what follows it have equal hashes, row by row and seed by seed."""
    stages = {(c.method, c.seed): c.hash for c in plan(read_comparison("stages")) if c.budget == "updates"}
    one = {(c.method, c.seed): c.hash for c in plan(read_comparison("one_stage"))}
    same = {"dmd": "dmd_first", "then_dmd2": "dmd2", "then_dmdr": "dmdr", "then_gdmd": "gdmd", "then_dmd": "dmd"}
    same |= {f"then_{name}": f"dmd_{name}" for name in ("refl", "grpo", "nft")}
    assert {name for name, _ in one if name.startswith("then_")} == set(same) - {"dmd"}
    for (name, seed), found in one.items():
        if name in same:
            assert found == stages[same[name], seed], (name, seed)
