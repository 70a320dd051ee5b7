"""Pages of a comparison from a table that was made up: every table and figure, whatever is missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from gdmd.io import RunError
from gdmd.shapes.grammar import TASKS
from gdmd.sweep.cells import Cell, line_of, pictures_key, plan, shown_cells
from gdmd.sweep.figures import _look, _shown
from gdmd.sweep.pool import Outcome
from gdmd.sweep.results import beginning, results_of, summary, write_pages
from gdmd.sweep.spec import Comparison, read_comparison
from gdmd.sweep.tables import OVERALL, Results, Row, against_headline, markdown, quality, table

SCORES = {"gdmd": 0.62, "dmd": 0.55, "teacher_100": 0.58, "shuffled": 0.54}
FIELDS = {"method", "kind", "seed", "budget", "shapeseval", "tasks", "rewards", "trained", "fidelity", "coverage"}
FIELDS |= {"diversity", "frechet", "nfe", "images_per_s", "student_updates", "passes", "seconds", "peak_memory_mib"}
FIELDS |= {"commit", "hash", "command"}


def measured(cell: Cell) -> dict[str, Any]:
    """What a finished cell measures, with a spread over seeds."""
    overall = SCORES.get(cell.method, 0.5) + 0.01 * (cell.seed % 3) + 0.002 * len(cell.method) * (-1) ** cell.seed
    student = cell.kind != "teacher"
    histogram = {f"histogram/r_{k}": 0.1 for k in range(10)}
    weights = {"weight/r_mean": 0.5, "weight/share_below_half": 0.4, **histogram} if cell.kind == "gdmd" else {}
    return {
        "shapeseval": overall,
        "tasks": dict.fromkeys(TASKS, overall),
        "rewards": {"shapes_clip": 0.6, "shapes_clip_heldout": overall - 0.1, "shapes_pref": 0.9},
        "trained": ["shapes_clip", "shapes_pref"],
        **{"fidelity": 0.9, "coverage": overall + 0.2, "diversity": None, "frechet": 0.2, "nfe": 4, "images": 1200},
        **{"images_per_s": 200.0, "images_per_s_decoded": 100.0, "interval": [overall - 0.02, overall + 0.02]},
        **{"student_updates": 8 * student, "steps": 2, "passes": 1000 * student, "seconds": 5.0},
        **{"peak_memory_mib": 400.0, "cell_seconds": 36.0, "device": "CPU", "commit": "abc", "torch": "2"},
        **({"statistics": weights, "points": points(cell)} if student else {}),
    }


def points(cell: Cell) -> list[dict[str, Any]]:
    if cell.seed or cell.budget == "passes":
        return []
    rewards = {"shapes_clip": 0.5, "shapes_pref": 0.8, "shapes_clip_heldout": 0.4, "shapes_partial_credit": 0.5}
    steered = {"cosine": 0.3, "ratio": 1.0, "weight": 1.2} if cell.kind == "gdmd" else {}
    return [{"updates": n, "step": n, "shapeseval": 0.4, "rewards": rewards, "change": 0.1, **steered} for n in (0, 8)]


@pytest.fixture
def smoke() -> Comparison:
    return read_comparison("smoke")


def write_table(comparison: Comparison, folder: Path, keep: int | None = None) -> None:
    lines = [line_of(cell, measured(cell), "gdmd sweep smoke") for cell in plan(comparison)][:keep]
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_names_the_rows_with_other_seeds_and_pairs_over_common_ones(tmp_path: Path) -> None:
    one_stage = read_comparison("one_stage")
    write_table(one_stage, tmp_path)
    page = write_pages(one_stage, "one_stage", tmp_path, required=True)
    assert page is not None
    text = page.read_text()
    assert "weights), **teacher, 100 NFE** and **GDMD, reward gradient** over seeds 1, 2, 3, 4, 5, 6, 7; ±" in text
    assert "paired t tests over the seeds that both rows have" in text
    results, _ = results_of(one_stage, tmp_path)
    counts = {each.row.name: each.test.count for each in against_headline(results, OVERALL)}
    assert (counts["teacher_100"], counts["teacher_4"], counts["dmd"]) == (7, 5, 5)


def test_a_page_holds_every_table_and_figure(smoke: Comparison, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    panel = {"title": "GDMD", "points": [[0.1, 0.2, "#d62728", "o", True], [0.0, 0.1, "#1f4fd6", "s", False]]}
    panel |= {"spread": 0.3, "diversity": 0.2, "outliers": 0.5}
    pictures = {"key": pictures_key(smoke, tmp_path), "panels": [panel, panel]}
    (tmp_path / "pictures.json").write_text(json.dumps(pictures))
    page = write_pages(smoke, "smoke", tmp_path, required=True)
    assert page is not None
    text = page.read_text()
    for head in (
        "Table 1: quality",
        "Table 2: ShapesEval by task",
        "Table 3",
        "Table 4",
        "Controls",
        "same compute",
        "Cost",
    ):
        assert head in text
    assert "Unfinished" not in text and "nan" not in text and "None" not in text
    assert "shapes_clip † |" in text and "shapes_clip_heldout † |" not in text and "instead" not in text
    matched = text.split("## The same compute")[1].split("\n## ")[0]
    assert "|  | shapes_clip_heldout | fidelity | coverage |" in matched  # tested at equal compute too
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"overall.png", "fig1_radar.png", "fig3_features.png", "fig4_divergence.png", "fig4_curves.png"} == drawn
    for name in drawn:
        assert f"(figures/{name})" in text
        content = (tmp_path / "figures" / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 500 and height > 250 and len(content) < 300_000


def test_images_of_other_cells_or_settings_are_not_shown(smoke: Comparison, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    panel = {
        "title": "GDMD",
        "points": [[0.1, 0.2, "#d62728", "o", True]],
        "spread": 0.3,
        "diversity": 0,
        "outliers": 0,
    }
    figures = tmp_path / "figures"
    figures.mkdir()
    for name in ("fig6_grid.png", "fig3_features.png"):
        (figures / name).write_bytes(b"of another time")
    for key, shown in ((pictures_key(smoke, tmp_path), True), ("another", False), (None, False)):
        (tmp_path / "pictures.json").write_text(json.dumps({"panels": [panel]} | ({"key": key} if key else {})))
        page = write_pages(smoke, "smoke", tmp_path, required=True)
        assert page is not None and ("fig6_grid.png" in page.read_text()) == shown
        assert ("fig3_features.png" in page.read_text()) == shown


def test_what_the_images_of_the_figures_depend_on(smoke: Comparison, tmp_path: Path) -> None:
    cell = next(cell for cell in plan(smoke) if cell in shown_cells_when_finished(smoke, tmp_path))
    first = pictures_key(smoke, tmp_path)
    assert pictures_key(smoke, tmp_path) == first
    result = cell.folder(tmp_path) / "result.json"
    result.write_text('{"seconds": 2}')  # trained again
    assert pictures_key(smoke, tmp_path) != first
    result.write_text("{}")
    changed = smoke.spec.pictures.model_copy(update={"captions": smoke.spec.pictures.captions + 1})
    other = Comparison(smoke.spec.model_copy(update={"pictures": changed}), smoke.recipes)
    assert pictures_key(smoke, tmp_path) == first != pictures_key(other, tmp_path)


def shown_cells_when_finished(comparison: Comparison, folder: Path) -> list[Cell]:
    """The cells whose images are shown, all with a result."""
    for cell in plan(comparison):
        cell.folder(folder).mkdir(parents=True, exist_ok=True)
        (cell.folder(folder) / "result.json").write_text("{}")
    return shown_cells(comparison, folder)


def test_a_line_has_the_public_fields(smoke: Comparison) -> None:
    cell = next(cell for cell in plan(smoke) if cell.method == "gdmd")
    line = line_of(cell, measured(cell), "gdmd sweep smoke --only gdmd/0/updates")
    assert line.keys() >= FIELDS
    assert (line["method"], line["kind"], line["seed"], line["budget"]) == ("gdmd", "gdmd", 0, "updates")
    assert 0 <= line["shapeseval"] <= 1 and set(line["tasks"]) == set(TASKS)


def test_an_unfinished_table_gives_a_page_that_says_so(smoke: Comparison, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no line"):
        write_pages(smoke, "smoke", tmp_path, required=True)
    assert write_pages(smoke, "smoke", tmp_path, required=False) is None
    write_table(smoke, tmp_path, keep=4)
    page = write_pages(smoke, "smoke", tmp_path, required=False)
    assert page is not None and f"Unfinished: {len(plan(smoke)) - 4} cells" in page.read_text()


def test_lines_of_other_settings_in_the_same_folder_are_left_out(smoke: Comparison, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    with (tmp_path / "table.jsonl").open("a") as file:
        file.write(
            json.dumps({**measured(plan(smoke)[0]), "method": "gdmd", "kind": "gdmd", "seed": 0} | _OTHER) + "\n"
        )
    results, missing = results_of(smoke, tmp_path)
    assert missing == 0 and all(line["hash"] != "other" for line in results.lines)


_OTHER = {"budget": "updates", "hash": "other"}


def test_the_summary_says_how_far_each_row_is_behind(smoke: Comparison, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    rows = summary(smoke, Outcome(tmp_path))["rows"]
    assert rows["gdmd"]["behind_headline"] is None and rows["gdmd"]["seeds"] == 2
    assert rows["dmd"]["behind_headline"] == pytest.approx(0.07, abs=0.01)
    assert 0 <= rows["dmd"]["p_holm"] <= 1


def made_up(trained: dict[str, list[str]] | None = None, **values: list[float]) -> Results:
    rows = [Row(name, name.upper(), "gdmd" if name == "gdmd" else "rival") for name in values]
    kinds = {"budget": "updates", "rewards": {}}
    own_rewards = trained or {}
    lines = [
        {"method": name, "seed": seed, "shapeseval": value, "hash": f"{name}{seed}", **kinds}
        | {"trained": own_rewards.get(name, [])}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    return Results(rows, lines, "gdmd")


def test_tests_are_paired_over_seeds_and_corrected_over_rows() -> None:
    results = made_up(gdmd=[0.60, 0.62, 0.64], dmd=[0.55, 0.58, 0.59], dmdr=[0.60, 0.61, 0.65], lonely=[0.1])
    found = {each.row.name: each for each in against_headline(results, OVERALL)}
    assert found.keys() == {"dmd", "dmdr"}
    assert found["dmd"].test.difference == pytest.approx((0.05 + 0.04 + 0.05) / 3)
    assert found["dmd"].adjusted == pytest.approx(2 * found["dmd"].test.p)
    assert found["dmdr"].adjusted == pytest.approx(max(found["dmdr"].test.p, found["dmd"].adjusted))


def test_the_best_student_of_a_column_is_bold_and_ties_are_not() -> None:
    text = table(
        made_up(gdmd=[0.6, 0.7], dmd=[0.5, 0.6]), made_up(gdmd=[0.6], dmd=[0.5]).rows, quality(made_up(gdmd=[0.6]))
    )
    assert "**0.650 ± 0.071**" in text and "0.550 ± 0.071" in text and text.count("**") == 2
    tied = made_up(gdmd=[0.6], dmd=[0.6])
    assert "**" not in table(tied, tied.rows, quality(tied))
    assert markdown(["a"], []) == ""


def test_a_row_trained_on_what_is_unseen_for_the_others_is_never_the_best() -> None:
    rewards = {"gdmd": ["clip"], "dmd": ["clip"], "cheat": ["checker"]}
    results = made_up(rewards, gdmd=[0.6, 0.7], dmd=[0.5, 0.6], cheat=[0.9, 0.9])
    assert [results.foreign(name) for name in ("gdmd", "dmd", "cheat")] == [[], [], ["checker"]]
    text = table(results, results.rows, quality(results))
    assert "**0.650 ± 0.071**" in text and "**0.900" not in text


def test_a_page_says_which_row_was_trained_on_the_checkers_own_credit(smoke: Comparison, tmp_path: Path) -> None:
    lines = [line_of(cell, measured(cell), "gdmd sweep smoke") for cell in plan(smoke)]
    lines = [line | {"trained": ["shapes_partial_credit"]} if line["method"] == "gdmd_t" else line for line in lines]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_pages(smoke, "smoke", tmp_path, required=True)
    assert page is not None
    text = page.read_text()
    assert "**GDMD, t only** was trained on shapes_partial_credit instead (a part of the checker" in text


def test_no_two_rows_of_a_large_comparison_look_alike() -> None:
    names = {f"row{k}": [0.5, 0.6] for k in range(30)}
    results = made_up(gdmd=[0.6, 0.7], **names)
    looks = [_look(results, row) for row in results.rows]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 31
    assert looks[0]["linewidth"] > looks[1]["linewidth"] and looks[1]["color"] == looks[14]["color"]


def test_the_radar_shows_every_rival_before_further_rows_of_gdmd() -> None:
    rows = [Row(name, name, "gdmd") for name in ("gdmd", "other", "another", "third")]
    rows += [Row(name, name, "rival") for name in ("dmd", "dmd2", "dmdr", "refl", "grpo", "nft")]
    lines = [{"method": row.name, "budget": "updates", "seed": 0, "shapeseval": 0.5} for row in rows]
    shown = [row.name for row in _shown(Results(rows, lines, "gdmd"))]
    assert shown == ["gdmd", "other", "dmd", "dmd2", "dmdr", "refl", "grpo", "nft"]


def test_the_pictures_show_every_rival_before_further_rows_of_gdmd(tmp_path: Path) -> None:
    headline = read_comparison("headline")
    for cell in plan(headline):
        if cell.seed == 0:
            cell.folder(tmp_path).mkdir(parents=True, exist_ok=True)
            (cell.folder(tmp_path) / "result.json").touch()
    shown = [cell.method for cell in shown_cells(headline, tmp_path)]
    assert shown == ["teacher_100", "gdmd", "dmd", "dmd_nft", "dmd_refl", "dmd_grpo", "dmdr", "dmd2"]


def test_a_page_tells_where_its_students_begin(smoke: Comparison, tmp_path: Path) -> None:
    assert "from the same teacher, without a cold start" in beginning(smoke.spec)
    stages = read_comparison("stages")
    write_table(stages, tmp_path)
    page = write_pages(stages, "stages", tmp_path, required=True)
    assert page is not None
    said = " ".join(page.read_text().split())
    assert "Students take 300 updates. DMD, first stage starts from the teacher" in said
    assert "begin, for 300 updates: GDMD, DMD, DMD + ReFL" in said and "DMD, first stage takes 4,000 updates." in said
    assert "without a cold start" not in said
    assert "\ngdmd sweep stages\n" in page.read_text()  # and not the folder of whoever made the page
