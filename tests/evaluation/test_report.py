"""report.html is one file that needs nothing else, shows what was measured, and executes nothing it was given."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdmd.evaluation.run_report import Provenance, read_rows, report_run, save_rows, write_report
from gdmd.io import RunError
from gdmd.reporting.grids import draw_grid, png_bytes
from gdmd.reporting.plots import curves, r_histogram, radar
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import Run, create
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


def test_where_all_rows_are_equal_none_is_shaded_as_best(tmp_path: Path) -> None:
    rows = {"teacher": row(0.0), "student": row(0.0)}
    assert 'class="best"' not in write_report(tmp_path, "equal", rows).read_text()


def real_run(folder: Path) -> Run:
    model = {"kind": "diffusers", "path": "org/model", "height": 48, "width": 80, "lora_rank": 8}
    loop = {"steps": 20, "batch_size": 2, "seed": 3}
    config = {"name": "mine", "model": model, "method": {"kind": "dmd"}, "loop": loop, "prompts": {"file": "p.txt"}}
    run = create(folder, config, ["gdmd", "train", "mine"])
    for line in metrics():
        run.log(int(line["step"]), line)
    return run


def test_a_real_run_is_reported_without_shapes_rows_and_grids(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run")
    save_rows(run.path, {"teacher": row(0.0)})  # as an earlier version left it
    for name in ("comparison", "step_000010", "step_1000000", "step_999999"):
        (run.path / "grids" / f"{name}.png").write_bytes(png())
    page = Page(report_run(run.path).read_text())
    assert "ShapesEval" not in page.text and "Not scored yet" in page.text
    for fact in ("org/model", "4-step LoRA of rank 8 at 80 x 48", "20 iterations of 2 samples, 20 student updates"):
        assert fact in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "Student (EMA) after 10 iterations",
        "Student (EMA) after 1,000,000 iterations",
    ]


def test_scores_below_a_run_are_shown_with_their_step_and_what_came_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = real_run(tmp_path / "run")
    for step in (10, 20):
        checkpoint.save(run.checkpoints, step, {"student": {"w": torch.ones(1)}}, {})
    source = {"name": "run", "kind": "run", "where": str(run.path), "nfe": 4, "step": 10, "trained": []}
    score = {"mean": 0.25, "low": 0.2, "high": 0.3, "unscored": 0, "trained": False}
    scored = {"source": source, "prompt_file": NASTY, "prompts": 3, "images_per_prompt": 2, "seed": 7}
    scored |= {"scores": {"clip": score}, "against_first": {}, "seconds_per_image": None}
    other = scored | {"source": source | {"name": "other", "where": "org/other", "step": None}}
    other |= {"scores": {"clip": score | {"mean": 0.125}}}
    for folder, file, content in (
        ("preference", "preference.json", scored),
        ("all", "compare.json", {"rows": {"other": other, "run": scored}, "against": "other"}),
    ):
        (run.path / folder).mkdir()
        (run.path / folder / file).write_text(json.dumps(content))
    text = report_run(run.path).read_text()
    page = Page(text)
    assert page.text.count("step 10, and the run has trained to step 20 since") == 2 and "<script" not in text
    assert "0.2500 [0.2000, 0.3000]" in page.text and "Comparison (all)" in page.text
    assert '<td class="best">0.2500' in text and '<td class="best">0.1250' not in text
    damaged = run.checkpoints / "step_000020" / "student.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with caplog.at_level("WARNING", "gdmd"):
        page = Page(report_run(run.path).read_text())
    assert f"{damaged} is damaged" in page.text and "has trained to step 20 since" not in page.text
    assert f"{damaged} is damaged" in caplog.text and "step 10 is the newest that can be used" in caplog.text
    (run.path / "preference" / "preference.json").write_text('{"source": 3}')
    with pytest.raises(RunError, match=r"preference\.json cannot be read.*evaluate again"):
        report_run(run.path)


def test_a_grid_of_large_images_is_embedded_smaller_and_not_stretched(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run")
    run.grid(10).write_bytes(png_bytes(draw_grid(torch.rand(1, 2, 3, 400, 1000), ["a cat"], scale=1)))
    uri = next(a["src"] for tag, a in Page(report_run(run.path).read_text()).tags if tag == "img")
    kind, content = str(uri).split(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown, Image.open(run.grid(10)) as whole:
        assert kind.startswith("data:image/jpeg") and shown.width == 1600
        assert shown.height == round(whole.height * 1600 / whole.width)


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
        with pytest.raises(RunError, match="Delete it: its rows are measured again"):
            read_rows(tmp_path)


@pytest.mark.parametrize("content", [b"", png()[:100], b"<html>"], ids=["empty", "truncated", "not an image"])
def test_a_grid_that_was_cut_off_is_named(tmp_path: Path, content: bytes) -> None:
    run = real_run(tmp_path / "run")
    run.grid(10).write_bytes(content)
    with pytest.raises(RunError, match=r"step_000010\.png .*; delete it, and the report does without it"):
        report_run(run.path)


def test_gaps_in_the_metrics_are_left_out_of_the_figures() -> None:
    rows = metrics()
    rows[2] |= {"loss/student": math.nan, "histogram/r_3": math.nan}
    del rows[3]["loss/student"]
    assert curves(rows, {"loss/student": "student"}, "Losses").startswith("<svg")
    assert r_histogram(rows).startswith("<svg")
    assert curves(rows, {"no/such": "x"}, "None") == "" and r_histogram([]) == ""
    assert radar({"a": {"shapeseval": {"overall": None}}}, TASKS).startswith("<svg")


def test_figures_take_the_color_of_the_page_and_repeat_exactly() -> None:
    figure = curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")
    assert "currentColor" in figure and "#123456" not in figure and "<b>" not in figure
    assert figure == curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")
