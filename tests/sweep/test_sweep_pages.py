"""Tables and pages of a sweep, from the stored tables in docs/results: the published numbers, and what is missing."""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdmd.io import RunError
from gdmd.reporting.plots import COLORS
from gdmd.shapes.same_noise import Column, SameNoise
from gdmd.sweep import results as sweep_results
from gdmd.sweep.figures import _look, curve_figure, row_colors
from gdmd.sweep.page import About, _introduction, verdict
from gdmd.sweep.pool import Outcome
from gdmd.sweep.results import beginning, stored_results, summary, write_pages
from gdmd.sweep.runs import IMAGES, images_key, plan, read_table, shown_runs
from gdmd.sweep.spec import Sweep, read_sweep
from gdmd.sweep.tables import OVERALL, Results, Row, against_headline, quality, significance, table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
HEADLINE = read_table(RESULTS / "shapes.jsonl")


@pytest.fixture
def headline() -> Sweep:
    return read_sweep("headline")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds."""
    monkeypatch.setattr(sweep_results, "draw_all", lambda *_: None)


def write_table(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(sweep: Sweep, folder: Path) -> str:
    page = write_pages(sweep, sweep.config.name, folder, only_pages=True)
    assert page is not None
    return page.read_text()


@pytest.mark.parametrize(
    ("name", "folder", "row", "published"),
    [
        ("headline", "", "dmd", "5 0.515 +- 0.023 [0.487, 0.543] +0.038 [+0.020, +0.057] 5.83 0.004 0.042"),
        ("headline", "", "dmd_grpo", "5 0.521 +- 0.016 [0.501, 0.541] +0.032 [+0.026, +0.039] 13.68 < 0.001 0.004"),
        ("headline", "", "gdmd_t", "5 0.514 +- 0.007 [0.505, 0.523] +0.040 [+0.023, +0.057] 6.46 0.003 0.036"),
        ("stages", "stages", "gdmd", "5 0.624 +- 0.009 [0.613, 0.635]"),
        ("one_stage", "one_stage", "gdmd_second", "5 0.640 +- 0.011 [0.627, 0.654]"),
        (
            "one_stage",
            "one_stage",
            "teacher_100",
            "7 0.588 +- 0.009 [0.580, 0.597] +0.051 [+0.026, +0.076] 5.64 0.005 0.025",
        ),
    ],
)
def test_published_numbers(name: str, folder: str, row: str, published: str) -> None:
    """As computed before scipy was used; ``gdmd_t`` is a row whose options were removed."""
    results = stored_results(read_sweep(name), RESULTS / folder, past=True).results
    (found,) = [line for line in significance(results, OVERALL).rows if line[0].text == results.title(row)]
    assert " ".join(cell.text for cell in found[1:]).strip() == published


def test_a_page_has_every_table_and_figure(headline: Sweep, tmp_path: Path) -> None:
    """Of a table whose lines were measured with earlier settings, with rows whose options were removed."""
    write_table(tmp_path, HEADLINE)
    panel = {"title": "GDMD", "points": [[0.1, 0.2, "#d62728", "o", True], [0.0, 0.1, "#1f4fd6", "s", False]]}
    panel |= {"spread": 0.3, "diversity": 0.2, "outliers": 0.5}
    (tmp_path / IMAGES).write_text(json.dumps({"key": images_key(headline, tmp_path), "panels": [panel, panel]}))
    text = page_of(headline, tmp_path)
    for part in ("Table 1", "Table 2", "Table 3", "Table 4", "Controls", "same compute", "Cost", "GDMD, guidances"):
        assert part in text
    assert "an earlier version" in text and "**GDMD, partial credit** was trained on shapes_partial_credit" in text
    assert "Unfinished" not in text and "nan" not in text and "None" not in text
    assert "shapes_clip † |" in text and "shapes_clip_heldout † |" not in text
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"overall.png", "fig1_measures.png", "fig3_features.png", "fig4_divergence.png", "fig4_curves.png"}
    for name in drawn:
        assert f"(figures/{name})" in text
        content = (tmp_path / "figures" / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width > 500 and height > 250 and len(content) < 400_000
    found = summary(headline, Outcome(tmp_path), only_pages=True)
    assert found["past"] > 0 and found["missing"] == 0 and found["rows"]["gdmd"]["behind_headline"] is None
    assert found["rows"]["dmd"]["behind_headline"] == pytest.approx(0.038, abs=5e-4)
    assert found["rows"]["dmd"]["p_holm"] == pytest.approx(0.042, abs=5e-4)


@pytest.mark.usefixtures("no_figures")
def test_both_pages_begin_with_the_verdict_and_escape_titles(headline: Sweep, tmp_path: Path) -> None:
    row = headline.config.rows[0].model_copy(update={"label": "<script>alert(1)</script>"})
    config = headline.config.model_copy(update={"rows": (row, *headline.config.rows[1:])})
    write_table(tmp_path, HEADLINE)
    (tmp_path / "figures").mkdir()
    image = base64.b64encode(b"png").decode()
    images = SameNoise(["a ring"], [Column(name, 4, [[image]], [[name == "GDMD"]]) for name in ("DMD", "GDMD")])
    (tmp_path / "figures" / "fig6_grid.png").write_bytes(b"png")
    (tmp_path / "figures" / "fig6_grid.json").write_text(json.dumps(asdict(images)))
    text = page_of(Sweep(config, headline.recipes), tmp_path)
    html = (tmp_path / "shapes.html").read_text()
    assert text.splitlines()[2].startswith("**On ShapesEval over 5 seeds, ")
    assert html.index("On ShapesEval over 5 seeds, ") < html.index("<h2>")
    assert "<script" not in html and "&lt;script" in html and not re.search(r'(src|href)="(?!data:image/png)', html)
    assert html.count('class="shot right tiny"') == html.count('class="shot wrong tiny"') == 1
    assert 'alt="a ring, GDMD: right"' in html and "Table 1: quality" in html


@pytest.mark.usefixtures("no_figures")
def test_an_unfinished_table_says_so(headline: Sweep, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no line"):
        write_pages(headline, "headline", tmp_path, only_pages=True)
    assert write_pages(headline, "headline", tmp_path, only_pages=False) is None
    write_table(tmp_path, [line for line in HEADLINE if line["method"] == "dmd"])
    assert f"Unfinished: {len(plan(headline)) - 10} runs" in page_of(headline, tmp_path)


def test_lines_of_other_settings(headline: Sweep, tmp_path: Path) -> None:
    """Left out while the row has lines of the present settings, or is being trained; else --pages-only shows them."""
    run = next(run for run in plan(headline) if run.name == "gdmd/0/updates")
    old = [line for line in HEADLINE if line["method"] == "gdmd" and line["budget"] == "updates"]
    write_table(tmp_path, [line | {"hash": "other"} for line in old] + [old[0] | {"method": "unknown"}])
    assert stored_results(headline, tmp_path).results.lines == []
    stored = stored_results(headline, tmp_path, past=True)
    assert (len(stored.results.lines), stored.past) == (5, 5)
    write_table(tmp_path, [*old, old[0] | {"hash": run.hash}])
    stored = stored_results(headline, tmp_path, past=True)
    assert [line["hash"] for line in stored.results.lines] == [run.hash] and stored.past == 0


@pytest.mark.usefixtures("no_figures")
def test_stale_images_are_not_shown(headline: Sweep, tmp_path: Path) -> None:
    """images.json names the results, titles and settings that the images were drawn from."""
    write_table(tmp_path, HEADLINE)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "fig6_grid.png").write_bytes(b"old")
    first = images_key(headline, tmp_path)
    for key, shown in ((first, True), ("another", False), (None, False)):
        (tmp_path / IMAGES).write_text(json.dumps({"panels": []} | ({"key": key} if key else {})))
        assert ("fig6_grid.png" in page_of(headline, tmp_path)) == shown
    for run in plan(headline):
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        run.result(tmp_path).write_text("{}")
    runs = shown_runs(headline, tmp_path)
    assert [run.method for run in runs] == [
        *(
            "teacher_100",
            "gdmd",
            "dmd",
            "dmd_refl",
            "dmdr",
            "dmd2",
            "dmd_5_to_1",
            "gdmd_shared",
        )  # baselines before other GDMD
    ]
    finished = images_key(headline, tmp_path)
    runs[0].result(tmp_path).write_text('{"seconds": 2}')  # measured again
    assert len({first, finished, images_key(headline, tmp_path)}) == 3


def test_a_page_tells_where_students_start(headline: Sweep) -> None:
    assert "from the same teacher, without a cold start" in beginning(headline.config)
    text = beginning(read_sweep("stages").config)
    start = 'Students take 300 updates. Rows that start from "DMD, first stage" of the same seed: GDMD, '
    assert text.startswith(start) and "(300 updates). " in text
    assert " do not include the first stage" in text and "first stage, which" not in beginning(headline.config)
    assert text.endswith('Rows with another number of updates: "DMD, first stage" (4,000).')


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


def test_curves_of_a_reward_that_is_not_measured() -> None:
    """A sweep measures the scorers of the Shapes world, whatever the students are trained on."""
    results = made_up({"gdmd": ["my_reward"]}, gdmd=[0.6])
    point = {"updates": 0, "shapeseval": 0.5, "rewards": {"shapes_clip": 0.4}}
    diagnosed = Results(results.rows, [{**results.lines[0], "points": [point, point]}], "gdmd")
    figure = curve_figure(diagnosed)
    assert figure is not None and all(np.isnan(figure.axes[0].lines[0].get_ydata()))


def test_tests_are_paired_over_seeds_and_corrected_over_rows() -> None:
    results = made_up(gdmd=[0.60, 0.62, 0.64], dmd=[0.55, 0.58, 0.59], dmdr=[0.60, 0.61, 0.65], lonely=[0.1])
    found = {each.row.name: each for each in against_headline(results, OVERALL)}
    assert found.keys() == {"dmd", "dmdr"}
    assert found["dmd"].test.difference == pytest.approx((0.05 + 0.04 + 0.05) / 3)
    assert found["dmd"].adjusted == pytest.approx(2 * found["dmd"].test.p)
    assert found["dmdr"].adjusted == pytest.approx(max(found["dmdr"].test.p, found["dmd"].adjusted))


def test_the_best_student_of_a_column_is_bold() -> None:
    """Not in a tie, and never a row that was trained on a measure that is unseen for the others."""
    rewards = {"gdmd": ["clip"], "dmd": ["clip"], "cheat": ["checker"]}
    results = made_up(rewards, gdmd=[0.6, 0.7], dmd=[0.5, 0.6], cheat=[0.9, 0.9])
    assert [results.foreign(name) for name in ("gdmd", "dmd", "cheat")] == [[], [], ["checker"]]
    text = str(table(results, results.rows, quality(results)))
    assert "**0.650 +- 0.071**" in text and "0.550 +- 0.071" in text and text.count("**") == 2
    tied = made_up(gdmd=[0.6], dmd=[0.6])
    assert "**" not in str(table(tied, tied.rows, quality(tied)))


def test_verdict_claims_only_what_is_left_after_holms_correction() -> None:
    own = made_up(gdmd=[0.6, 0.62, 0.64], dmd=[0.5, 0.521, 0.539], dmdr=[0.6, 0.61, 0.65], refl=[0.7, 0.721, 0.739])
    found = verdict(own)
    assert found.sentence == (
        "On ShapesEval over 3 seeds, GDMD is better than DMD; it is worse than REFL; it is not distinguishable from DMDR."
    )
    assert [number.value for number in found.numbers][0] == "0.620 +- 0.020"
    assert "cannot be compared yet" in verdict(made_up(gdmd=[0.6], dmd=[0.5])).sentence
    more = made_up(gdmd=[0.60, 0.62, 0.64, 0.66], dmd=[0.50, 0.52, 0.54], dmdr=[0.60, 0.61])
    assert verdict(more).sentence.startswith("On ShapesEval over 2 to 3 common seeds, GDMD ")


def test_rows_have_the_colors_of_their_methods() -> None:
    own = made_up(gdmd_paper=[0.5], gdmd=[0.6], dmd=[0.5], **{f"row{k}": [0.5] for k in range(20)})
    colors = row_colors(own)
    assert (colors["gdmd"], colors["dmd"]) == (COLORS["gdmd"], COLORS["dmd"])
    looks = [_look(own, row) for row in own.rows]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(looks)


def test_a_page_calls_no_measure_unseen_that_the_headline_row_was_trained_on() -> None:
    """Partial credit is a part of the checker. Rewards of a recipe whose method uses none are not marked."""
    about = About("t", "", "c", "b", (0, 1), "", "eval", 4)
    said = "everything else is unseen in training**: "
    assert "the mean over 1 seed (0) of" in " ".join(_introduction(made_up(gdmd=[0.6]), replace(about, seeds=(0,))))
    checked = " ".join(_introduction(made_up({"gdmd": ["shapes_partial_credit"]}, gdmd=[0.6, 0.6]), about))
    assert f"{said}the held-out scorer, fidelity, coverage." in checked
    rows = made_up({"gdmd": ["clip"], "both": ["clip", "hps"], "other": ["hps"]}, gdmd=[0.6], both=[0.6], other=[0.6])
    said_of = " ".join(_introduction(rows, about))
    assert "**BOTH** was trained on hps too; **OTHER** was trained on hps instead: " in said_of
    plain = made_up({"dmd": ["shapes_clip"]}, gdmd=[0.6, 0.7], dmd=[0.5, 0.6])
    assert f"{said}the checker behind ShapesEval, the held-out scorer, " in " ".join(_introduction(plain, about))
    assert plain.trained == ["shapes_clip"] and made_up(gdmd=[0.6], dmd=[0.5]).trained == []
