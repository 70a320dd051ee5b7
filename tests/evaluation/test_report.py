"""report.html: one self-contained file, no claim inside the noise, and nothing it was given is executed."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import zlib
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdmd.config.describe import METHODS, SHORT_NAMES
from gdmd.evaluation.health import health_panels, training_curves
from gdmd.evaluation.run_report import Provenance, read_rows, report_run, save_rows, write_report
from gdmd.evaluation.verdict import (
    PER_IMAGE,
    captions_of,
    paired,
    per_image,
    scores_of,
    shapes_verdict,
    task_mean,
)
from gdmd.io import RunError
from gdmd.reporting.grids import draw_grid, png_bytes
from gdmd.reporting.plots import COLORS, colors_of, curves, method_in, r_histogram
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import Run, create
from gdmd.shapes.evaluate import bootstrap_interval
from gdmd.shapes.grammar import TASKS, catalog, fixed_rows
from gdmd.shapes.same_noise import Column, SameNoise, read_same_noise

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


def right(shares: list[float], seed: int = 7, captions: int = 20, images: int = 2) -> dict:
    """What ``PER_IMAGE`` holds where the first images of each task are right, as many as the task's share says."""
    correct = [k < share * captions * images for share in shares for k in range(captions * images)]
    tasks, texts = [task for task in TASKS for _ in range(captions)], [f"caption {k}" for k in range(6 * captions)]
    return per_image(correct, tasks, texts, images, "eval", seed)


def same_noise(name: str = "student", caption: str = "a ring") -> SameNoise:
    image = base64.b64encode(png()).decode()
    return SameNoise([caption], [Column("teacher", 8, [[image]], [[True]]), Column(name, 4, [[image]], [[False]])])


def full_report(folder: Path, name: str = "student") -> str:
    rows = {"teacher": row(0.6, 5.0), name: row(0.7)}
    facts = Provenance(f"gdmd demo {name}", "abc123", 7, {"torch": "2.13"}, "x86", "today", f"name: {name}\n")
    path = write_report(
        folder,
        name,
        rows,
        same_noise=same_noise(name, name),
        grids={name: png()},
        metrics={name: metrics()},
        trained=["shapes_clip"],
        provenance=facts,
    )
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything on it."""
    return full_report(tmp_path_factory.mktemp("report"))


def test_the_page_needs_nothing_from_outside(whole: str) -> None:
    page = Page(whole)
    assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert not re.search(r"url\((?!#)|@import", whole)


def test_everything_given_is_escaped(tmp_path: Path) -> None:
    text = full_report(tmp_path, NASTY)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count('alert("x")') >= 8  # title, verdict, plots, table, captions, config, command
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert next(a["alt"] for tag, a in page.tags if tag == "img") == f"{NASTY}, teacher: right"


def groups(text: str) -> dict[str, list[str]]:
    """The measures of the table under each heading."""
    found: dict[str, list[str]] = {}
    for title, measure in re.findall(r'<tr class="group"><th[^>]*>(.*?)</th>|<th scope="row">(.*?)</th>', text):
        if title:
            found[title] = []
        elif found:
            found[list(found)[-1]].append(measure)
    return found


def test_trained_and_unseen_measures_are_separate(whole: str) -> None:
    found = groups(whole)
    unseen, trained, cost = found.values()
    assert list(found)[:2] == ["Unseen in training", "Trained on: a gain proves little"] and trained == ["shapes_clip"]
    assert {"ShapesEval", "shapes_clip_heldout", "attribute coverage"} <= set(unseen)
    assert cost[0] == "network calls per image (NFE)"


def test_table_shows_intervals_and_the_best_value(whole: str) -> None:
    assert 'class="best">0.700 [0.670, 0.730]</td>' in whole and ">-</td>" in whole
    assert 'class="best">0.600' not in whole


def test_equal_rows_have_no_best_value(tmp_path: Path) -> None:
    rows = {"teacher": row(0.0), "student": row(0.0)}
    assert 'class="best"' not in write_report(tmp_path, "equal", rows).read_text()


@pytest.mark.parametrize(
    ("own", "words", "interval"),
    [
        ([0.9] * 6, "is better than its teacher", True),
        ([0.1] * 6, "is worse than its teacher", True),
        ([0.5] * 6, "is not distinguishable from its teacher", True),
        ([0.55, 0.45] * 3, "is not distinguishable from its teacher", True),
        (None, "cannot be told apart yet from its teacher", False),
    ],
)
def test_verdict_claims_nothing_inside_the_noise(own: list[float] | None, words: str, interval: bool) -> None:
    rows = {"teacher, 50 steps": row(0.5) | {PER_IMAGE: right([0.5] * 6)}, "GDMD, 4 steps": row(0.6)}
    if own is not None:
        rows["GDMD, 4 steps"][PER_IMAGE] = right(own)
    verdict = shapes_verdict(rows)
    assert f"GDMD with 4 network calls per image {words} with 4 calls" in verdict.sentence
    assert [number.label.split()[0] for number in verdict.numbers] == ["ShapesEval", "ShapesEval", "difference,"]
    assert ("[" in verdict.numbers[-1].value) == interval


def test_verdict_compares_students_and_names_missing_rows() -> None:
    rows = {
        name: row(0.5) | {PER_IMAGE: right([0.5] * 6)}
        for name in ("teacher, 50 steps", "DMD, 4 steps", "GDMD, 4 steps")
    }
    assert "It is not distinguishable from DMD with 4 calls: +0.000" in shapes_verdict(rows).sentence
    del rows["teacher, 50 steps"], rows["DMD, 4 steps"]
    assert "has not been measured yet" in shapes_verdict(rows).sentence


def test_difference_is_paired_by_caption() -> None:
    a, b = ({PER_IMAGE: right(shares)} for shares in ([0.7] * 6, [0.5] * 6))
    found = paired(a, b)
    assert found and found.mean == pytest.approx(0.2) and found.low > 0.1 and found.sign == 1
    same = paired(a, a)
    assert same and (same.mean, same.low, same.high, same.sign) == (0, 0, 0, 0)
    assert paired(a, {PER_IMAGE: right([0.5] * 6, seed=8)}) is None and paired(a, {}) is None
    assert paired(a, {PER_IMAGE: right([0.5] * 6, captions=10)}) is None
    few = paired({PER_IMAGE: right([1.0] * 6, captions=2)}, {PER_IMAGE: right([0.0] * 6, captions=2)})
    assert few and few.mean == 1 and math.isnan(few.low) and few.sign == 0  # too few captions for a claim


def test_interval_draws_repeated_captions_together() -> None:
    """As ShapesEval's own interval does: of 50 captions per task, single_object has six. Also in rows without captions."""
    rows = fixed_rows("eval", 50)
    texts, images = catalog().texts(rows), 2
    correct = [zlib.crc32(text.encode()) % 2 == 0 for text in texts for _ in range(images)]
    tasks = catalog().task[rows]
    marks = per_image(correct, [TASKS[k] for k in tasks.tolist()], texts, images, "eval", 7)
    older = {key: value for key, value in marks.items() if key != "captions"}
    wanted = bootstrap_interval(
        torch.tensor(correct), tasks.repeat_interleave(images), [text for text in texts for _ in range(images)]
    )
    for own in ({PER_IMAGE: marks}, {PER_IMAGE: older}):
        found = task_mean(scores_of(own), captions_of(own))
        assert (found.low, found.high) == pytest.approx(wanted, abs=0.01)
        assert wanted[1] - wanted[0] > 0.1
    assert paired({PER_IMAGE: marks}, {PER_IMAGE: older}) is not None
    swapped = {**marks, "captions": {**marks["captions"], "colors": marks["captions"]["colors"][::-1]}}
    assert paired({PER_IMAGE: marks}, {PER_IMAGE: swapped}) is None


def steady(**values: float) -> list[dict[str, float]]:
    """Twenty rows; a value is the factor by which its statistic grows over the last fifth."""
    healthy = {"latent/mean": 0.05, "latent/std": 1.0, "gap/real": 0.5, "gap/grad": 0.5, "reward/gain": -0.1}
    healthy |= {f"fake_loss/t{k}": 1.0 for k in range(3)} | {f"histogram/r_{k}": 0.1 for k in range(10)}
    rows = []
    for step in range(20):
        noise = {"reward/gain": 0.01 * (-1) ** step}
        grown = {key: value * (values.get(key, 1.0) if step >= 16 else 1.0) for key, value in healthy.items()}
        rows.append({"step": step} | {key: value + noise.get(key, 0.0) for key, value in grown.items()})
    return rows


@pytest.mark.parametrize(
    ("change", "panel", "status"),
    [
        ({}, 0, "ok"),
        ({"latent/std": 0.6}, 0, "look"),
        ({"latent/std": 0.3}, 0, "bad"),
        ({"latent/mean": 30.0}, 0, "bad"),
        ({"gap/real": 1.3}, 1, "look"),
        ({"gap/real": 2.0}, 1, "bad"),
        ({"fake_loss/t1": 1.3}, 2, "look"),
        ({"fake_loss/t2": 2.0}, 2, "bad"),
        ({"reward/gain": 1.3}, 3, "look"),
        ({"reward/gain": 2.0}, 3, "bad"),
        ({f"histogram/r_{k}": 0.0 for k in range(1, 9)}, 4, "bad"),
        ({f"histogram/r_{k}": 0.0 for k in range(10) if k not in (4, 5)}, 4, "bad"),
    ],
)
def test_health_status_follows_its_rule(change: dict[str, float], panel: int, status: str) -> None:
    panels = health_panels(steady(**change))
    assert panels[panel].status == status
    assert all(one.status == "ok" for k, one in enumerate(panels) if k != panel)
    assert all(one.rule.startswith("ok: ") and "bad: " in one.rule for one in panels)


@pytest.mark.parametrize(("moved", "status"), [(1.3, "ok"), (0.5, "look"), (0.01, "bad")])
def test_health_of_a_student_that_may_not_move(moved: float, status: str) -> None:
    rows = [one | {"student/moved": moved * (k >= 16)} for k, one in enumerate(steady())]
    panel = health_panels(rows)[0]
    assert (panel.title, panel.status) == ("Student moves", status) and "bad: " in panel.rule
    assert health_panels(rows[:1] + steady()[1:])[0].status == "unknown"  # logged once


@pytest.mark.parametrize(
    ("realized", "spread", "statuses"),
    [
        (0.002, 0.2, ["ok", "ok"]),
        (-0.001, 0.05, ["ok", "look"]),  # within two standard errors of 0
        (-0.006, 0.2, ["look", "ok"]),
        (-0.02, 0.0, ["bad", "bad"]),
    ],
)
def test_health_of_the_gains_and_of_the_spread_in_a_group(realized: float, spread: float, statuses: list[str]) -> None:
    """The realized gain has a standard error of 0.0023; the construction gain is not judged."""
    found = {"gain/construction": -0.3, "reward/group_share": spread}
    rows = [row | found | {"gain/realized": realized + 0.01 * (-1) ** k} for k, row in enumerate(steady())]
    panels = {panel.title.split()[0]: panel for panel in health_panels(rows)}
    assert [panels["Construction"].status, panels["Reward"].status] == statuses
    assert "The targets promise -0.3 Z" in panels["Construction"].finding


def test_short_runs_are_not_judged() -> None:
    assert {panel.status for panel in health_panels(metrics())} == {"unknown"}


def test_every_method_has_one_color() -> None:
    assert len(set(COLORS.values())) == len(COLORS)
    assert SHORT_NAMES.keys() == METHODS.keys()
    assert {kind: method_in(f"{SHORT_NAMES[kind]}, 4 steps") for kind in COLORS if kind != "teacher"} == {
        kind: kind for kind in COLORS if kind != "teacher"
    }
    assert method_in("runs/x") is None and method_in("GDMD_TILTED, 4 steps") == "gdmd_tilted"
    found = colors_of(["teacher, 50 steps", "mine", "teacher, 4 steps", "gdmd", "gdmd again", "other"])
    assert found[0] == found[2] == COLORS["teacher"] and found[3] == COLORS["gdmd"]
    assert len(set(found)) == 5


def real_run(folder: Path, **loop_changes: float) -> Run:
    model = {"kind": "diffusers", "path": "org/model", "height": 48, "width": 80, "lora_rank": 8}
    loop = {"steps": 20, "batch_size": 2, "seed": 3} | loop_changes
    config = {"name": "mine", "model": model, "method": {"kind": "dmd"}, "loop": loop, "prompts": {"file": "p.txt"}}
    run = create(folder, config, ["gdmd", "train", "mine", "prompts.file=my prompts.txt"])
    for line in metrics():
        run.log(int(line["step"]), line)
    return run


def test_real_run_has_no_shapes_rows(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run")
    save_rows(run.path, {"teacher": row(0.0)})  # as an earlier version left it
    for name in ("comparison", "step_000010", "step_1000000", "step_999999"):
        (run.path / "grids" / f"{name}.png").write_bytes(png())
    page = Page(report_run(run.path).read_text())
    assert "ShapesEval" not in page.text and "Not scored yet" in page.text and "Health of the training" in page.text
    for fact in ("org/model", "4-step LoRA of rank 8 at 80 x 48", "20 iterations of 2 samples, 20 student updates"):
        assert fact in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "Student (EMA) after 10 iterations, and the teacher",
        "Student (EMA) after 1,000,000 iterations, and the teacher",
    ]


def test_command_and_captions_are_those_of_the_run(tmp_path: Path) -> None:
    """The command can be pasted into a shell, and the images of a run without EMA are not said to be of EMA weights."""
    run = real_run(tmp_path / "run", ema=0.0)
    (run.path / "grids" / "step_000010.png").write_bytes(png())
    page = Page(report_run(run.path).read_text())
    assert "gdmd train mine 'prompts.file=my prompts.txt'" in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Student after 10 iterations, and the teacher"]


def test_stored_scores_are_shown_with_their_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = real_run(tmp_path / "run")
    for step in (10, 20):
        checkpoint.save(run.checkpoints, step, {"student": {"w": torch.ones(1)}}, {})
    source = {"name": "run", "kind": "run", "where": str(run.path), "nfe": 4, "step": 10, "trained": []}
    score = {"mean": 0.25, "low": 0.2, "high": 0.3, "unscored": 0, "trained": False}
    scored = {"source": source, "prompt_file": NASTY, "prompts": 30, "images_per_prompt": 2, "seed": 7}
    against = {"clip": {"mean": 0.125, "low": 0.1, "high": 0.15, "wins": 0.9, "images": 6}}
    scored |= {"scores": {"clip": score}, "against_first": against, "seconds_per_image": None}
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
    assert "0.250 [0.200, 0.300]" in page.text and "Comparison (all)" in page.text
    assert "On clip, compared with other: run is higher." in page.text  # not the preference scores
    assert 'class="best">0.250' in text and 'class="best">0.125' not in text
    for place, count in (("../elsewhere/run", 0), (f"{tmp_path.name}/run", 2)):  # another run; from another directory
        for file in run.path.glob("*/*.json"):
            file.write_text(file.read_text().replace(json.dumps(str(source["where"])), json.dumps(place)))
        source["where"] = place
        page = Page(report_run(run.path).read_text())
        assert page.text.count("and the run has trained to step 20 since") == count
    damaged = run.checkpoints / "step_000020" / "student.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with caplog.at_level("WARNING", "gdmd"):
        page = Page(report_run(run.path).read_text())
    assert f"{damaged} is damaged" in page.text and "has trained to step 20 since" not in page.text
    assert f"{damaged} is damaged" in caplog.text and "step 10 is the newest that can be used" in caplog.text
    (run.path / "preference" / "preference.json").write_text('{"source": 3}')
    with pytest.raises(RunError, match=r"preference\.json cannot be read.*evaluate again"):
        report_run(run.path)


def test_large_grid_is_embedded_smaller(tmp_path: Path) -> None:
    run = real_run(tmp_path / "run")
    run.grid(10).write_bytes(png_bytes(draw_grid(torch.rand(1, 2, 3, 400, 1000), ["a cat"], scale=1)))
    uri = next(a["src"] for tag, a in Page(report_run(run.path).read_text()).tags if tag == "img")
    kind, content = str(uri).split(",")
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown, Image.open(run.grid(10)) as whole:
        assert kind.startswith("data:image/jpeg") and shown.width == 1600
        assert shown.height == round(whole.height * 1600 / whole.width)


def test_page_holds_curves_health_and_provenance(whole: str) -> None:
    page = Page(whole)
    assert sum(tag == "svg" for tag, _ in page.tags) >= 10
    assert page.text.count("Rule.") == 5 and "5 not judged" in page.text
    for word in ("abc123", "gdmd demo student", "torch 2.13", "name: student"):
        assert word in page.text


def test_report_without_rows_or_metrics(tmp_path: Path) -> None:
    text = write_report(tmp_path / "x.html", "empty", {}, metrics={"run": []}).read_text()
    assert "Nothing has been evaluated yet" in text and "No training metrics" in text


def test_report_of_a_run_folder(tmp_path: Path) -> None:
    config = {"name": "mine", "about": "why", "loop": {"seed": 41}, "rewards": [{"kind": "shapes_clip"}]}
    run = create(tmp_path / "run", config, ["gdmd", "train", "mine"])
    for line in metrics():
        run.log(int(line["step"]), line)
    run.grid(10).write_bytes(png())
    (run.path / "grids" / "comparison.json").write_text(json.dumps(asdict(same_noise("mine"))))
    save_rows(run.path, {"teacher": row(0.6), "mine": row(0.5)})
    text = report_run(run.path).read_text()
    page = Page(text)
    assert "gdmd train mine" in page.text and "seed: 41" in page.text and 'class="trained"' in text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "a ring, teacher: right",
        "a ring, mine: wrong",
        "Student (EMA) after 10 iterations, and the teacher",
    ]
    assert text.count('class="shot right tiny"') == text.count('class="shot wrong tiny"') == 1


def test_damaged_evaluation_is_one_error(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == {}
    for text in ("{", "[]", '{"a": 1}', json.dumps({"a": {"shapeseval": 3}})):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(RunError, match="Delete it: its rows are measured again"):
            read_rows(tmp_path)


def test_damaged_comparison_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    assert read_same_noise(path) is None
    good = asdict(same_noise())
    wrong = good | {"columns": [good["columns"][0] | {"images": [["<script>"]]}]}
    for content in ("{", "[]", json.dumps(good | {"captions": ["a", "b"]}), json.dumps(wrong)):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(RunError, match="Delete it to generate the images again"):
            read_same_noise(path)


@pytest.mark.parametrize("content", [b"", png()[:100], b"<html>"], ids=["empty", "truncated", "not an image"])
def test_truncated_grid_is_named(tmp_path: Path, content: bytes) -> None:
    run = real_run(tmp_path / "run")
    run.grid(10).write_bytes(content)
    with pytest.raises(RunError, match=r"step_000010\.png .*; delete it, and the report leaves it out"):
        report_run(run.path)


def test_figures_skip_gaps_in_the_metrics() -> None:
    rows = metrics()
    rows[2] |= {"loss/student": math.nan, "histogram/r_3": math.nan}
    del rows[3]["loss/student"]
    assert curves(rows, {"loss/student": "student"}, "Losses").startswith("<svg")
    assert r_histogram(rows).startswith("<svg")
    assert curves(rows, {"no/such": "x"}, "None") == "" and r_histogram([]) == ""


def test_figures_use_the_page_color_and_are_deterministic() -> None:
    figure = curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")
    assert "currentColor" in figure and "#123456" not in figure and "<b>" not in figure
    assert figure == curves(metrics(), {"loss/student": "student $x$ <b>"}, "Losses $y$")


def test_the_curve_of_all_rewards_is_drawn_for_several() -> None:
    def rewards(rows: list[dict[str, float]]) -> list[str]:
        return [title for title, _ in training_curves(rows) if title.startswith("Reward")]

    assert rewards(metrics()) == ["Reward shapes_clip"]
    both = [row | {"reward/mine/sample": 1.0} for row in metrics()]
    assert rewards(both) == ["Reward, all models", "Reward shapes_clip", "Reward mine"]
