"""report.html is one file that needs nothing else, shows what was measured, and executes nothing it was given."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from gdmd.evaluation.grids import draw_grid, png_bytes
from gdmd.evaluation.plots import curves, r_histogram, radar
from gdmd.evaluation.report import Provenance, read_rows, report_run, save_rows, write_report
from gdmd.io import RunError
from gdmd.runs.rundir import create
from gdmd.shapes.grammar import TASKS

NASTY = '<script>alert("x")</script>&"\''


def row(overall: float, speed: float = 100.0) -> dict:
    return {
        "shapeseval": {"overall": overall, **{task: 0.1 * k for k, task in enumerate(TASKS, 1)}},
        "rewards": {"shapes_clip_heldout": 0.31, "shapes_clip": 0.52, "shapes_pref": None},
        "fidelity": 0.9,
        "coverage": None,
        "diversity": 0.4,
        "frechet": 0.05,
        "nfe": 4,
        "images_per_s": speed,
        "images_per_s_decoded": speed / 2,
        "interval": [overall - 0.03, overall + 0.03],
        "images": 1200,
    }


def metrics(steps: int = 6) -> list[dict[str, float]]:
    keys = [
        "loss/student",
        "loss/fake",
        "reward/sample",
        "reward/target",
        "reward/gain",
        "weight/mean",
        "weight/r_mean",
    ]
    keys += ["weight/share_below_half", "weight/share_clipped", "latent/mean", "latent/std", "gap/real", "gap/grad"]
    keys += ["reward/shapes_clip/sample", "reward/shapes_clip/target", "speed/images_per_s"]
    keys += [f"fake_loss/t{k}" for k in range(3)] + [f"histogram/r_{k}" for k in range(10)]
    return [{"step": 10 * s, **{key: 1 / (s + k % 3) for k, key in enumerate(keys)}} for s in range(1, steps + 1)]


def png() -> bytes:
    return png_bytes(draw_grid(torch.rand(1, 2, 3, 8, 8), ["a ring"]))


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def full_report(folder: Path, name: str = "student") -> str:
    rows = {"teacher": row(0.6, 5.0), name: row(0.7)}
    facts = Provenance(f"gdmd demo {name}", "abc123", 7, {"torch": "2.13"}, "x86", "today", f"name: {name}\n")
    path = write_report(
        folder, name, rows, grids={name: png()}, metrics={name: metrics()}, trained=["shapes_clip"], provenance=facts
    )
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = Page(full_report(tmp_path))
    assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert not re.search(r"url\((?!#)|@import", (tmp_path / "report.html").read_text())


def test_everything_given_is_escaped(tmp_path: Path) -> None:
    text = full_report(tmp_path, NASTY)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count('alert("x")') >= 5  # title, table, captions, config, command
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert next(a["alt"] for tag, a in page.tags if tag == "img") == NASTY


def test_the_table_tells_trained_from_unseen_measures(tmp_path: Path) -> None:
    text = full_report(tmp_path)
    heads = re.findall(r"<th>(.*?)</th>", text)
    marks = {re.sub(r"<.*?>.*?</.*?>", "", head): re.findall(r'mark (\w+)"', head) for head in heads}
    assert marks["shapes_clip"] == ["trained"]
    assert marks["shapes_clip_heldout"] == marks["overall"] == marks["coverage"] == ["unseen"]
    assert marks["NFE"] == []


def test_the_table_shows_the_numbers_and_the_best_of_each_column(tmp_path: Path) -> None:
    text = full_report(tmp_path)
    assert "0.700 [0.670, 0.730]" in text and "<td>–</td>" in text
    assert '<td class="best">0.700 [0.670, 0.730]</td>' in text
    assert '<td class="best">0.600' not in text


def test_the_page_holds_figures_monitor_and_provenance(tmp_path: Path) -> None:
    page = Page(full_report(tmp_path))
    assert sum(tag == "svg" for tag, _ in page.tags) >= 12
    assert page.text.count("Healthy:") == 5
    for word in ("abc123", "gdmd demo student", "torch 2.13", "name: student"):
        assert word in page.text


def test_a_report_without_rows_or_metrics_says_so(tmp_path: Path) -> None:
    text = write_report(tmp_path / "x.html", "empty", {}, metrics={"run": []}).read_text()
    assert "Nothing has been evaluated yet" in text and "No training metrics" in text


def test_a_run_folder_is_reported_from_its_files(tmp_path: Path) -> None:
    config = {"name": "mine", "about": "why", "loop": {"seed": 41}, "rewards": [{"kind": "shapes_clip"}]}
    run = create(tmp_path / "run", config, ["gdmd", "train", "mine"])
    for line in metrics():
        run.log(int(line["step"]), line)
    run.grid(10).write_bytes(png())
    (run.path / "grids" / "comparison.png").write_bytes(png())
    save_rows(run.path, {"teacher": row(0.6), "mine": row(0.5)})
    text = report_run(run.path).read_text()
    page = Page(text)
    assert "gdmd train mine" in page.text and "seed: 41" in page.text and "mark trained" in text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "The same noise through each sampler (comparison)",
        "Student (EMA) after 10 iterations",
    ]


def test_damaged_evaluations_are_one_clear_error(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == {}
    for text in ("{", "[]", '{"a": 1}', json.dumps({"a": {"shapeseval": 3}})):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(RunError, match="gdmd eval"):
            read_rows(tmp_path)


def test_gaps_in_the_metrics_are_left_out_of_the_figures() -> None:
    rows = metrics()
    rows[2] |= {"loss/student": math.nan, "histogram/r_3": math.nan}
    del rows[3]["loss/student"]
    assert curves(rows, {"loss/student": "student"}, "Losses").startswith("<svg")
    assert r_histogram(rows).startswith("<svg")
    assert curves(rows, {"no/such": "x"}, "None") == "" and r_histogram([]) == ""
    assert radar({"a": {"shapeseval": {"overall": None}}}).startswith("<svg")


def test_figures_take_the_color_of_the_page_and_repeat_exactly() -> None:
    figure = curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")
    assert "currentColor" in figure and "#123456" not in figure and "<b>" not in figure
    assert figure == curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")
