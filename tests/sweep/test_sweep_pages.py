"""Tables and pages of a sweep: the published numbers from the stored tables, and pages whatever is missing."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from gdmd.io import RunError
from gdmd.shapes.grammar import TASKS
from gdmd.sweep import results
from gdmd.sweep.pool import Outcome
from gdmd.sweep.results import beginning, stored_results, summary, write_pages
from gdmd.sweep.runs import IMAGES, SweepRun, images_key, line_of, plan, shown_runs
from gdmd.sweep.spec import Sweep, read_sweep
from gdmd.sweep.tables import OVERALL, Results, Row, against_headline, quality, significance, table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SCORES = {"gdmd": 0.62, "dmd": 0.55, "teacher_100": 0.58, "shuffled": 0.54}


# ---------------------------------------------------------------- published tables


def published(name: str, folder: Path) -> Results:
    return stored_results(read_sweep(name), folder, past=True).results


@pytest.mark.parametrize(
    ("name", "folder", "row", "published_line"),
    [
        ("headline", RESULTS, "dmd", "5 0.515 +- 0.023 [0.487, 0.543] +0.038 [+0.020, +0.057] 5.83 0.004 0.042"),
        (
            "headline",
            RESULTS,
            "dmd_grpo",
            "5 0.521 +- 0.016 [0.501, 0.541] +0.032 [+0.026, +0.039] 13.68 < 0.001 0.004",
        ),
        ("headline", RESULTS, "gdmd_t", "5 0.514 +- 0.007 [0.505, 0.523] +0.040 [+0.023, +0.057] 6.46 0.003 0.036"),
        ("stages", RESULTS / "stages", "gdmd", "5 0.624 +- 0.009 [0.613, 0.635]    "),
        ("one_stage", RESULTS / "one_stage", "gdmd_gradient", "7 0.644 +- 0.020 [0.625, 0.663]    "),
        (
            "one_stage",
            RESULTS / "one_stage",
            "teacher_100",
            "7 0.588 +- 0.009 [0.580, 0.597] +0.056 [+0.033, +0.079] 5.98 < 0.001 0.011",
        ),
    ],
)
def test_published_numbers_from_the_stored_tables(name: str, folder: Path, row: str, published_line: str) -> None:
    """As computed before scipy was used; ``gdmd_t`` is a row whose options were removed."""
    stored = published(name, folder)
    (found,) = [line for line in significance(stored, OVERALL).rows if line[0].text == stored.title(row)]
    assert " ".join(cell.text for cell in found[1:]) == published_line


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds."""
    monkeypatch.setattr(results, "draw_all", lambda *_: None)


@pytest.mark.usefixtures("no_figures")
def test_old_tables_are_shown_with_their_removed_rows(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "shapes.jsonl", tmp_path)
    headline = read_sweep("headline")
    page = write_pages(headline, "headline", tmp_path, only_pages=True)
    assert page is not None
    text = page.read_text()
    assert "GDMD, guidances" in text and "an earlier version" in text and "Unfinished" not in text
    assert summary(headline, Outcome(tmp_path), only_pages=True)["past"] > 0


# ---------------------------------------------------------------- tables of made-up results


def made_up(trained: dict[str, list[str]] | None = None, **values: list[float]) -> Results:
    rows = [Row(name, name.upper(), "gdmd" if name == "gdmd" else "baseline") for name in values]
    lines = [
        {"method": name, "seed": seed, "shapeseval": value, "hash": f"{name}{seed}", "budget": "updates", "rewards": {}}
        | {"trained": (trained or {}).get(name, [])}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    return Results(rows, lines, "gdmd")


def test_tests_are_paired_over_seeds_and_corrected_over_rows() -> None:
    own = made_up(gdmd=[0.60, 0.62, 0.64], dmd=[0.55, 0.58, 0.59], dmdr=[0.60, 0.61, 0.65], lonely=[0.1])
    found = {each.row.name: each for each in against_headline(own, OVERALL)}
    assert found.keys() == {"dmd", "dmdr"}
    assert found["dmd"].test.difference == pytest.approx((0.05 + 0.04 + 0.05) / 3)
    assert found["dmd"].adjusted == pytest.approx(2 * found["dmd"].test.p)
    assert found["dmdr"].adjusted == pytest.approx(max(found["dmdr"].test.p, found["dmd"].adjusted))


def test_the_best_student_of_a_column_is_bold() -> None:
    own = made_up(gdmd=[0.6, 0.7], dmd=[0.5, 0.6])
    text = str(table(own, own.rows, quality(own)))
    assert "**0.650 +- 0.071**" in text and "0.550 +- 0.071" in text and text.count("**") == 2
    tied = made_up(gdmd=[0.6], dmd=[0.6])
    assert "**" not in str(table(tied, tied.rows, quality(tied)))


def test_a_row_trained_on_an_unseen_measure_is_never_the_best() -> None:
    rewards = {"gdmd": ["clip"], "dmd": ["clip"], "cheat": ["checker"]}
    own = made_up(rewards, gdmd=[0.6, 0.7], dmd=[0.5, 0.6], cheat=[0.9, 0.9])
    assert [own.foreign(name) for name in ("gdmd", "dmd", "cheat")] == [[], [], ["checker"]]
    text = str(table(own, own.rows, quality(own)))
    assert "**0.650 +- 0.071**" in text and "**0.900" not in text


# ---------------------------------------------------------------- pages


def measured(run: SweepRun) -> dict[str, Any]:
    """What a finished run measures, with a spread over seeds."""
    overall = SCORES.get(run.method, 0.5) + 0.01 * (run.seed % 3) + 0.002 * len(run.method) * (-1) ** run.seed
    student = run.kind != "teacher"
    histogram = {f"histogram/r_{k}": 0.1 for k in range(10)}
    weights = {"weight/r_mean": 0.5, "weight/share_below_half": 0.4, **histogram} if run.kind == "gdmd" else {}
    return {
        "shapeseval": overall,
        "tasks": dict.fromkeys(TASKS, overall),
        "rewards": {"shapes_clip": 0.6, "shapes_clip_heldout": overall - 0.1, "shapes_pref": 0.9},
        "trained": ["shapes_clip", "shapes_pref"],
        **{"fidelity": 0.9, "coverage": overall + 0.2, "diversity": None, "frechet": 0.2, "nfe": 4, "images": 1200},
        **{"images_per_s": 200.0, "images_per_s_decoded": 100.0, "interval": [overall - 0.02, overall + 0.02]},
        **{"student_updates": 8 * student, "steps": 2, "passes": 1000 * student, "seconds": 5.0},
        **{"peak_memory_mib": 400.0, "cell_seconds": 36.0, "device": "CPU", "commit": "abc", "torch": "2"},
        **({"statistics": weights, "points": points(run)} if student else {}),
    }


def points(run: SweepRun) -> list[dict[str, Any]]:
    if run.seed or run.budget == "passes":
        return []
    rewards = {"shapes_clip": 0.5, "shapes_pref": 0.8, "shapes_clip_heldout": 0.4, "shapes_partial_credit": 0.5}
    gradients = {"cosine": 0.3, "ratio": 1.0, "weight": 1.2} if run.kind == "gdmd" else {}
    return [
        {"updates": n, "step": n, "shapeseval": 0.4, "rewards": rewards, "change": 0.1, **gradients} for n in (0, 8)
    ]


@pytest.fixture
def smoke() -> Sweep:
    return read_sweep("smoke")


def write_table(sweep: Sweep, folder: Path, keep: int | None = None) -> None:
    lines = [line_of(run, measured(run), f"gdmd sweep {sweep.config.name}") for run in plan(sweep)][:keep]
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(sweep: Sweep, folder: Path) -> str:
    page = write_pages(sweep, sweep.config.name, folder, only_pages=True)
    assert page is not None
    return page.read_text()


def test_a_page_has_every_table_and_figure(smoke: Sweep, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    panel = {"title": "GDMD", "points": [[0.1, 0.2, "#d62728", "o", True], [0.0, 0.1, "#1f4fd6", "s", False]]}
    panel |= {"spread": 0.3, "diversity": 0.2, "outliers": 0.5}
    (tmp_path / IMAGES).write_text(json.dumps({"key": images_key(smoke, tmp_path), "panels": [panel, panel]}))
    text = page_of(smoke, tmp_path)
    for head in ("Table 1", "Table 2", "Table 3", "Table 4", "Controls", "same compute", "Cost"):
        assert head in text
    assert "Unfinished" not in text and "nan" not in text and "None" not in text and "earlier version" not in text
    assert "shapes_clip † |" in text and "shapes_clip_heldout † |" not in text
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert {"overall.png", "fig3_features.png", "fig4_divergence.png", "fig4_curves.png"} <= drawn
    for name in drawn:
        assert f"(figures/{name})" in text
        content = (tmp_path / "figures" / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 500 and height > 250 and len(content) < 300_000


@pytest.mark.usefixtures("no_figures")
def test_stale_images_are_not_shown(smoke: Sweep, tmp_path: Path) -> None:
    """images.json names the results, titles and settings that the images were drawn from."""
    write_table(smoke, tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig6_grid.png").write_bytes(b"old")
    first = images_key(smoke, tmp_path)
    for key, shown in ((first, True), ("another", False), (None, False)):
        (tmp_path / IMAGES).write_text(json.dumps({"panels": []} | ({"key": key} if key else {})))
        assert ("fig6_grid.png" in page_of(smoke, tmp_path)) == shown
    for run in plan(smoke):
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        run.result(tmp_path).write_text("{}")
    finished = images_key(smoke, tmp_path)
    shown_runs(smoke, tmp_path)[0].result(tmp_path).write_text('{"seconds": 2}')  # trained again
    assert len({first, finished, images_key(smoke, tmp_path)}) == 3


def test_images_show_baselines_before_other_rows_of_gdmd(tmp_path: Path) -> None:
    headline = read_sweep("headline")
    for run in plan(headline):
        if run.seed == 0:
            run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
            run.result(tmp_path).touch()
    shown = [run.method for run in shown_runs(headline, tmp_path)]
    assert shown == ["teacher_100", "gdmd", "dmd", "dmd_nft", "dmd_refl", "dmd_grpo", "dmdr", "dmd2"]


@pytest.mark.usefixtures("no_figures")
def test_an_unfinished_table_says_so(smoke: Sweep, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no line"):
        write_pages(smoke, "smoke", tmp_path, only_pages=True)
    assert write_pages(smoke, "smoke", tmp_path, only_pages=False) is None
    write_table(smoke, tmp_path, keep=4)
    assert f"Unfinished: {len(plan(smoke)) - 4} runs" in page_of(smoke, tmp_path)


def test_lines_of_other_settings(smoke: Sweep, tmp_path: Path) -> None:
    """Left out while the present settings have lines (or are being trained); shown by --pages-only otherwise."""
    other = {**measured(plan(smoke)[0]), "kind": "gdmd", "seed": 0, "budget": "updates", "hash": "other"}
    lines = [other | {"method": name} for name in ("gdmd", "removed")]
    write_table(smoke, tmp_path)
    with (tmp_path / "table.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    stored = stored_results(smoke, tmp_path, past=True)
    assert (stored.missing, stored.past) == (0, 0)
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stored_results(smoke, tmp_path).results.lines == []
    stored = stored_results(smoke, tmp_path, past=True)
    assert [line["method"] for line in stored.results.lines] == ["gdmd"] and stored.past == 1


def test_summary_compares_rows_with_the_headline(smoke: Sweep, tmp_path: Path) -> None:
    write_table(smoke, tmp_path)
    rows = summary(smoke, Outcome(tmp_path))["rows"]
    assert rows["gdmd"]["behind_headline"] is None and rows["gdmd"]["seeds"] == 2
    assert rows["dmd"]["behind_headline"] == pytest.approx(0.07, abs=0.01)
    assert 0 <= rows["dmd"]["p_holm"] <= 1


def test_a_page_tells_where_students_start(smoke: Sweep) -> None:
    assert "from the same teacher, without a cold start" in beginning(smoke.config)
    text = beginning(read_sweep("stages").config)
    assert "Students take 300 updates. DMD, first stage starts from the teacher" in text
    assert "for 300 updates: GDMD, DMD, DMD + ReFL" in text and "DMD, first stage takes 4,000 updates." in text
