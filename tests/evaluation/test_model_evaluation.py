"""gdmd eval preference and compare: exact numbers, restarts, errors, self-contained pages."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import Gdmd, folder_state
from PIL import Image
from torch import Tensor

from gdmd.config.image_source import read_source
from gdmd.evaluation.compare import EvalOptions, compare, preference
from gdmd.evaluation.geneval import images_key
from gdmd.evaluation.model_page import differences
from gdmd.sources.runs import RunSource

SCORERS = ("test_model_evaluation:brightness", "test_model_evaluation:green")
SCORED = ("--scorer", SCORERS[0])
calls: list[int] = []


def brightness(images: Tensor, prompts: Any) -> Tensor:
    """A reward: the mean of the red channel."""
    calls.append(len(images))
    return images[:, 0].mean((1, 2))


def green(images: Tensor, prompts: Any) -> Tensor:
    """A reward that does not score the prompts with a question mark."""
    scores = images[:, 1].mean((1, 2))
    return torch.where(torch.tensor(["?" in text for text in prompts]), torch.nan, scores)


def colors(images: list[Image.Image]) -> Tensor:
    """Features: the mean color."""
    return torch.tensor([[float(c) / 255 for c in image.resize((1, 1)).getpixel((0, 0))] for image in images])  # type: ignore[union-attr]


def quiet(_: str) -> None:
    """Drop a message."""


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def painted(folder: Path, prompts: list[str], shades: list[list[tuple[int, int, int]]]) -> Path:
    """A folder of plain images in GenEval's layout."""
    for number, (text, own) in enumerate(zip(prompts, shades, strict=True)):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
        for k, color in enumerate(own):
            Image.new("RGB", (8, 6), color).save(samples / f"{k:04d}.png")
    return folder


def world(gdmd: Gdmd) -> tuple[Path, Path]:
    """Two models of three prompts with two images each; B is 51 levels brighter in red."""
    prompts = ["a cat", "<script>alert(1)</script>?", "a dog"]
    shades = [[(0, 0, 0), (51, 0, 0)], [(102, 51, 0), (102, 51, 0)], [(153, 102, 0), (204, 255, 0)]]
    brighter = [[(r + 51, g, b) for r, g, b in own] for own in shades]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    return painted(gdmd.folder / "a", prompts, shades), painted(gdmd.folder / "b", prompts, brighter)


def settings(**changes: Any) -> EvalOptions:
    return EvalOptions(**({"prompts": "prompts.txt", "images": 2, "scorers": SCORERS, "device": "cpu"} | changes))


def test_known_means_and_intervals(gdmd: Gdmd) -> None:
    a, _ = world(gdmd)
    row = preference(read_source(f"{a},trained={SCORERS[0]}"), settings(), Path("eval"), quiet)
    first, second = (row["scores"][name] for name in SCORERS)
    assert first["mean"] == pytest.approx((0 + 51 + 102 + 102 + 153 + 204) / 6 / 255)
    assert first["low"] == pytest.approx(25.5 / 255) and first["high"] == pytest.approx(178.5 / 255)
    assert (first["trained"], second["trained"]) == (True, False)
    assert second["mean"] == pytest.approx((0 + 0 + 102 + 255) / 4 / 255)
    assert (second["images"], second["prompts"], second["unscored"]) == (4, 2, 2)
    assert json.loads(Path("eval/preference.json").read_text()) == row
    unknown = preference(read_source(str(a)), settings(), Path("again"), quiet)
    assert unknown["scores"][SCORERS[0]]["trained"] is None and row["seconds_per_image"] is None


def test_repeated_prompts_are_one_prompt_of_an_interval(gdmd: Gdmd) -> None:
    """Twenty prompts of two texts, each of one brightness: only the two texts are drawn again."""
    prompts, shades = ["a cat", "a dog"] * 10, [[(0, 0, 0)], [(51, 0, 0)]] * 10
    folder = painted(gdmd.folder / "a", prompts, shades)
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    found = preference(read_source(str(folder)), settings(images=1), Path("eval"), quiet)["scores"][SCORERS[0]]
    assert (found["images"], found["prompts"]) == (20, 2) and found["mean"] == pytest.approx(0.1)
    assert (found["low"], found["high"]) == pytest.approx((0.0, 0.2))


def test_known_distances(gdmd: Gdmd) -> None:
    a, b = world(gdmd)
    features = "test_model_evaluation:colors"
    row = preference(read_source(str(b)), settings(features=features, reference=a), Path("eval"), quiet)
    assert row["frechet"] == pytest.approx((51 / 255) ** 2, rel=1e-5)  # the same covariance, shifted
    assert row["mmd"] > 0 and row["features"] == features and row["reference_images"] == 6
    same = preference(read_source(str(a)), settings(features=features, reference=a), Path("same"), quiet)
    assert same["frechet"] == pytest.approx(0, abs=1e-9) and same["mmd"] == pytest.approx(0, abs=1e-9)
    one = preference(read_source(str(a)), settings(features=features, images=1), Path("one"), quiet)
    assert one["diversity"] is None and one["frechet"] is None and row["spread"] > 0


def stop_after(calls: int, function: Any) -> Any:
    """``function``, interrupted by Ctrl-C after this many calls."""
    left = [calls]

    def stopping(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*given)

    return stopping


def test_killed_evaluation_resumes(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    gdmd.trained()
    options = EvalOptions(per_task=1, images=2, scorers=SCORERS[:1], device="cpu")
    whole = preference(read_source("run,batch=5"), options, Path("whole"), quiet)
    count = sum(calls)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gdmd.sources.runs.RunSource.generate", stop_after(1, RunSource.generate))
        preference(read_source("run,batch=5"), options, Path("half"), quiet)
    generated = sorted(Path("half/images").rglob("*.png"))
    assert len(generated) == 5
    dates = [file.stat().st_mtime_ns for file in generated]
    preference(read_source("run,batch=3"), options, Path("half"), quiet)
    assert [file.stat().st_mtime_ns for file in generated] == dates
    scores = Path("half/scores.jsonl")
    scores.write_text(scores.read_text()[:-7])  # the last line was being written
    calls.clear()
    again = preference(read_source("run"), options, Path("half"), quiet)
    assert sum(calls) == 1 and count == 12
    assert again["scores"][SCORERS[0]]["mean"] == pytest.approx(whole["scores"][SCORERS[0]]["mean"], abs=1 / 255)
    assert again["shapeseval"].keys() == whole["shapeseval"].keys() and again["seconds_per_image"] > 0


def test_shards_equal_one_process(gdmd: Gdmd) -> None:
    gdmd.trained()
    arguments = ("eval", "preference", "run", "--per-task", "1", "-n", "1", "-o")
    assert gdmd(*arguments, "whole").code == 0
    for k in ("0/2", "1/2"):
        done = gdmd(*arguments, "parts", "--shard", k, "--json")
        assert json.loads(done.out) == {"prompts": 3, "images": "parts/images"}, done.err
    whole, parts = (folder_state(Path(name) / "images") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len([name for name in whole if name.endswith(".png")]) == 6
    for name in (name for name in whole if name.endswith(".png")):
        images_ = [torch.tensor(list(Image.open(Path(f) / "images" / name).tobytes())) for f in ("whole", "parts")]
        assert (images_[0] - images_[1]).abs().max() <= 1
    assert "write K/N" in gdmd(*arguments, "x", "--shard", "2/2").err


def test_folder_of_another_source_seed_or_prompt(gdmd: Gdmd) -> None:
    gdmd.trained()
    options = EvalOptions(per_task=1, images=1, device="cpu")
    preference(read_source("run"), options, Path("eval"), quiet)
    with pytest.raises(ValueError, match="another source .*sampler"):
        preference(read_source("teacher-4"), options, Path("eval"), quiet)
    with pytest.raises(ValueError, match=r"another source \(seed"):
        preference(read_source("run"), EvalOptions(per_task=1, images=1, seed=1), Path("eval"), quiet)
    Path("p.txt").write_text("a red ring\ntwo squares\n")
    with pytest.raises(ValueError, match="00000 holds another prompt"):
        preference(read_source("run"), EvalOptions(prompts="p.txt", images=1, device="cpu"), Path("eval"), quiet)
    (Path("eval") / "settings.json").unlink()
    with pytest.raises(ValueError, match="images of an unknown source"):
        preference(read_source("run"), options, Path("eval"), quiet)


def mean_of(source: Path, out: str = "eval", **changes: Any) -> float:
    """The mean of the first scorer, options into a folder that may hold earlier scores."""
    row = preference(read_source(str(source)), settings(**{"scorers": SCORERS[:1], **changes}), Path(out), quiet)
    return float(next(iter(row["scores"].values()))["mean"] * 255)


def test_changed_prompts_and_images_are_scored_again(gdmd: Gdmd) -> None:
    a, _ = world(gdmd)
    assert mean_of(a) == pytest.approx(612 / 6)
    Path("prompts.txt").write_text("a dog\n")
    assert mean_of(a) == pytest.approx(357 / 2) and sum(calls) == 6, "the images of this prompt had their scores"
    Path("prompts.txt").write_text("a dog\na cat\n")
    assert mean_of(a) == pytest.approx(408 / 4) and mean_of(a, images=1) == pytest.approx(153 / 2) and sum(calls) == 6
    image = a / "00002" / "samples" / "0000.png"
    before = image.stat()
    Image.new("RGB", (8, 6), (3, 102, 0)).save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.stat().st_size == before.st_size
    assert mean_of(a) == pytest.approx(258 / 4) and sum(calls) == 7
    shutil.copytree(a, "moved")
    assert mean_of(Path("moved")) == pytest.approx(258 / 4) and sum(calls) == 7, "the same images in another place"


def test_changed_prompt_of_an_image_is_scored_again(gdmd: Gdmd) -> None:
    a, _ = world(gdmd)
    scored = {"scorers": SCORERS[1:], "prompts": "prompts.txt"}
    assert mean_of(a, **scored) == pytest.approx(357 / 4)
    file = a / "00001" / "metadata.jsonl"
    file.write_text(json.dumps({"prompt": "a cow"}) + "\n")
    Path("prompts.txt").write_text("a cat\na cow\na dog\n")
    assert mean_of(a, **scored) == pytest.approx(459 / 6), "without the question mark its images get a score"


@pytest.mark.parametrize(("reads", "again"), [(True, 6), (False, 0)])
def test_changed_metadata(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch, reads: bool, again: int) -> None:
    a, _ = world(gdmd)
    texts = Path("prompts.txt").read_text().splitlines()
    monkeypatch.setattr("gdmd.evaluation.preference.reads_metadata", lambda spec: reads)
    for number in (1, 2):
        calls.clear()
        Path("p.jsonl").write_text("".join(json.dumps({"prompt": text, "id": number}) + "\n" for text in texts))
        mean_of(a, prompts="p.jsonl")
    assert sum(calls) == again


def test_failed_scores_are_retried(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = world(gdmd)
    for fails, expected in ((False, []), (True, ["a: test_model_evaluation:green scored 0 of 2 images"])):
        monkeypatch.setattr("gdmd.evaluation.preference.may_fail", lambda spec, fails=fails: fails)
        mean_of(a, scorers=SCORERS[1:])
        logged: list[str] = []
        preference(read_source(str(a)), settings(scorers=SCORERS[1:]), Path("eval"), logged.append)
        assert logged == expected


def test_scorer_without_scores(gdmd: Gdmd) -> None:
    painted(gdmd.folder / "a", ["a cat?", "a dog?"], [[(0, 0, 0)], [(0, 0, 0)]])
    Path("prompts.txt").write_text("a cat?\na dog?\n")
    arguments = ("eval", "preference", "a", "-o", "eval", "--prompts", "prompts.txt", "-n", "1", "--scorer", SCORERS[1])
    done = gdmd(*arguments)
    assert f"{SCORERS[1]} scored 0 of 2 images" in done.err and "(2 not scored)" in done.out
    for again in (done, gdmd(*arguments)):
        assert f"warning: {SCORERS[1]} scored no image of a, so it has no mean" in again.err


def test_scorer_without_weights(gdmd: Gdmd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(gdmd)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    command = ("eval", "preference", "teacher-4-plain", "-o", "out", "--per-task", "1", "-n", "1")
    finished = gdmd(*command, "--scorer", "pickscore")
    assert finished.code == 2 and "cannot load yuvalkirstain" in finished.err and not Path("out/images").exists(), (
        finished.err
    )


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_missing_or_truncated_image(gdmd: Gdmd, damage: str) -> None:
    a, _ = world(gdmd)
    mean_of(a)
    image = a / "00002" / "samples" / "0001.png"
    image.unlink() if damage == "deleted" else image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(ValueError, match="image 2 is needed" if damage == "deleted" else "0001.png cannot be read"):
        mean_of(a)


def test_changed_scorer_code(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = world(gdmd)
    monkeypatch.syspath_prepend(str(gdmd.folder))
    package = gdmd.folder / "scoring"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "shades.py").write_text(
        "from scoring.scale import FACTOR\n\ndef red(images, prompts):\n    return images[:, 0].mean((1, 2)) * FACTOR\n"
    )

    def options(scale: str, first: str = "") -> float:
        (package / "scale.py").write_text(scale)
        (package / "shades.py").write_text(first + (package / "shades.py").read_text())
        for name in ("scoring", "scoring.shades", "scoring.scale"):
            sys.modules.pop(name, None)
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        return mean_of(a, scorers=("scoring.shades:red",))

    found = [
        options("FACTOR = 1\n"),
        options("FACTOR = 2\n"),
        options("FACTOR = 1\n"),
        options("FACTOR = 1\n", "# new\n"),
    ]
    assert found == pytest.approx([102, 204, 102, 102])
    lines = [json.loads(line) for line in Path("eval/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 18, "the third question was answered before, the fourth is another file"


def test_retrained_run_is_another_source(gdmd: Gdmd) -> None:
    gdmd.trained()
    gdmd.trained("loop.seed=1", run="other")
    options = EvalOptions(per_task=1, images=1, device="cpu")
    preference(read_source("run"), options, Path("eval"), quiet)
    preference(read_source("run"), options, Path("eval"), quiet)
    shutil.rmtree("run/checkpoints")
    shutil.copytree("other/checkpoints", "run/checkpoints")
    with pytest.raises(ValueError, match=r"another source \(weights differ"):
        preference(read_source("run"), options, Path("eval"), quiet)


def test_a_missing_checkpoint_is_found_before_the_first_image(gdmd: Gdmd) -> None:
    gdmd.trained()
    for source, message in (("run,checkpoint=7", "no checkpoint '7'"), ("run", "run has no checkpoint yet")):
        done = gdmd("eval", "compare", "teacher-4-plain", source, "-o", "x", "--per-task", "1")
        assert done.code == 2 and message in done.err and not Path("x").exists(), done.err
        shutil.rmtree("run/checkpoints", ignore_errors=True)


def test_compare_pairs_images(gdmd: Gdmd) -> None:
    a, b = world(gdmd)
    content = compare([read_source(f"one={a}"), read_source(f"<b>two={b}")], settings(), Path("eval"), quiet)
    found = content["rows"]["<b>two"]["against_first"]
    assert found[SCORERS[0]]["mean"] == pytest.approx(51 / 255, abs=1e-6) and found[SCORERS[0]]["wins"] == 1.0
    assert found[SCORERS[0]]["low"] == pytest.approx(found[SCORERS[0]]["high"], abs=1e-6)
    assert found[SCORERS[1]]["wins"] == 0.5 and content["against"] == "one"
    page = Path("eval/compare.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;two" in page and "<b>two" not in page
    assert page.count("<img ") == 6 and not re.search(r"(src|href)=\"(?!data:image/png)", page)
    assert not re.search(r"url\((?!['\"]?#)", page)
    assert f"On {SCORERS[0]}, compared with one: &lt;b&gt;two is not judged (fewer than 5 prompts)." in page
    assert "+0.200, 100 %" in page and "+0.200 [" not in page


def test_few_scored_prompts_are_not_judged(gdmd: Gdmd) -> None:
    """Ten prompts, of which a scorer scores two: the interval of two says nothing."""
    prompts = [f"prompt {k}{'?' * (k > 1)}" for k in range(10)]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    models = [painted(gdmd.folder / name, prompts, [[(g, g, 0)]] * 10) for name, g in (("a", 0), ("b", 51))]
    options = settings(images=1)
    rows = compare([read_source(str(path)) for path in models], options, Path("eval"), quiet)["rows"]
    both, few = (differences(rows, "b")[name] for name in SCORERS)
    assert rows["b"]["against_first"][SCORERS[1]]["prompts"] == 2
    assert both.low == both.mean == few.mean == pytest.approx(0.2) and math.isnan(few.low)


def test_compare_shapes_models(gdmd: Gdmd) -> None:
    gdmd.trained()
    done = gdmd("eval", "compare", "teacher-4-plain", "run", "-o", "eval", "--per-task", "1", "-n", "2", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert (
        rows["run"]["scores"]["shapes_clip"]["trained"] and not rows["run"]["scores"]["shapes_clip_heldout"]["trained"]
    )
    assert not rows["teacher-4-plain"]["scores"]["shapes_clip"]["trained"]
    for row in rows.values():
        assert 0 <= row["shapeseval"]["overall"] <= 1 and row["frechet"] > 0 and row["diversity"] > 0
    page = Path("eval/compare.html").read_text()
    assert (
        "On ShapesEval, compared with teacher-4-plain: run is" in page and "ShapesEval overall" in page and "†" in page
    )
    assert page.count('class="shot right"') + page.count('class="shot wrong"') == page.count("<img ") == 12
    printed = gdmd("eval", "compare", "teacher-4-plain", "run", "-o", "eval", "--per-task", "1", "-n", "2")
    assert "ShapesEval overall" in printed.out and "generating" not in printed.err  # nothing was generated again


def test_shapes_measures_need_shapes_images(gdmd: Gdmd) -> None:
    drawn = gdmd("eval", "preference", "teacher-4", "-o", "drawn", "--per-task", "1", "-n", "1")
    assert drawn.code == 0, drawn.err
    arguments = ("eval", "compare", "teacher-4", "drawn/images", "--per-task", "1", "-n", "1", "--json")
    done = gdmd(*arguments, "-o", "same")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["rows"].values()
    assert first["shapeseval"] == second["shapeseval"] and first["frechet"] == second["frechet"]
    last = sorted(Path("drawn/images").glob("*/samples/*.png"))[-1]
    Image.open(last).resize((48, 32)).save(last)
    refused = gdmd(*arguments, "-o", "other", "--scorer", SCORERS[0])
    assert refused.code == 2 and f"{last} is 48 x 32. ShapesEval, features shapes: for 32 x 32 images" in refused.err
    assert not Path("other").exists()  # found before the first image is drawn


def test_images_of_several_sizes(gdmd: Gdmd) -> None:
    a, _ = world(gdmd)
    sizes = {"00000/samples/0001.png": (6, 8), "00002/samples/0000.png": (16, 16)}
    for name, size in sizes.items():
        Image.open(a / name).resize(size).save(a / name)
    row = preference(read_source(str(a)), settings(), Path("eval"), quiet)
    assert row["scores"][SCORERS[0]]["mean"] == pytest.approx((0 + 51 + 102 + 102 + 153 + 204) / 6 / 255)
    assert sorted(calls) == [1, 1, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a"], "a has no images of the prompt 'a red circle'; add them, or give the prompts"),
        (["--features", "shapes", "--reference", "nowhere"], "needs a folder with two images or more, got 0"),
        (["--features", "shapes", "--reference", "a"], "0000.png is 8 x 6. ShapesEval, features shapes"),
        (["--scorer", "geneval2"], "geneval2 needs questions with every prompt, but 'a red circle' has no list"),
        (["--scorer", "geneval"], "reward geneval: prompt 'a red circle': not GenEval metadata ('tag' is missing)"),
    ],
)
def test_errors_before_the_first_image(gdmd: Gdmd, more: list[str], message: str) -> None:
    world(gdmd)
    Path("captions.txt").write_text("a red circle\n")
    arguments = ("eval", "compare", "teacher-4", "plain=teacher-4-plain", *more, "-o", "x", "--prompts", "captions.txt")
    done = gdmd(*arguments, "-n", "1", "--scorer", SCORERS[0])
    assert done.code == 2 and message in done.err and not Path("x").exists(), done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["preference", "a", "-o", "x", "--prompts", "prompts.txt", "--scorer", SCORERS[0], "--reference", "b"],
            "--reference has no effect without --features",
        ),
        (
            ["preference", "a", "-o", "x", "--prompts", "prompts.txt", "-n", "1", "--scorer", "shapes_clip"],
            "0000.png is 8 x 6. scorer shapes_clip: for 32 x 32 images of the Shapes world only; name others",
        ),
        (["preference", "a", "--prompts", "prompts.txt"], "--out is missing"),
        (["preference", "a", "-o", "x"], "--prompts is missing"),
        (["preference", "a", "-o", "x", "--shard", "0/2"], "--prompts is missing"),
        (["preference", "a", "-o", "x", "--prompts", "prompts.txt", "--shard", "0/2"], "and a already holds them"),
        (["preference", "a", "-n", "1", "-o", "prompts.txt", "--prompts", "prompts.txt", *SCORED], "with --out"),
        (
            ["preference", "a", "-o", "x", "--prompts", "prompts.txt", "--per-task", "2", *SCORED],
            "leave one of them out",
        ),
        (["preference", "teacher-4-plain", "-o", "x", "--limit", "2"], "ShapesEval is the mean of all six; give fewer"),
        (["preference", "a", "-o", "x", "--prompts", "prompts.txt"], "no scorer was given"),
        (["preference", "a", "-o", "x", "--prompts", "none.txt", "--scorer", "clip"], "none.txt: cannot be read"),
        (["preference", "a", "-o", "x", "--prompts", "prompts.txt", "--scorer", "magic"], "scorer 'magic'"),
        (["preference", "nowhere", "-o", "x"], "source nowhere: it does not exist"),
        (["compare", "a", "-o", "x"], "needs two sources"),
        (["compare", "a", "a", "-o", "x"], "two sources are called"),
        (
            ["preference", "a", "-o", "x", "--prompts", "prompts.txt", "-n", "3", "--scorer", SCORERS[0]],
            "but image 3 is needed; add images, or ask for at most 2 with -n",
        ),
        (
            ["preference", "a", "-o", "x", "--prompts", "prompts.txt", "-n", "1", "--scorer", "a:b"],
            "cannot be imported",
        ),
    ],
)
def test_bad_arguments(gdmd: Gdmd, arguments: list[str], message: str) -> None:
    world(gdmd)
    done = gdmd("eval", *arguments)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_compare_pipelines_with_geneval(gdmd: Gdmd, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import tiny_pipelines as tiny

    place = tiny.save("sd3", tmp_path / "sd3")
    row = {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}
    Path("prompts.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "three dogs"}) + "\n")
    sources = [read_source(f"{n}={place},dtype=fp32,steps={n},height=32,width=32,batch=1") for n in ("1", "2")]
    options = settings(prompts="prompts.jsonl", images=1)
    content = compare(sources, options, Path("eval"), quiet)
    assert json.loads(Path("eval/1/images/00000/metadata.jsonl").read_text()) == row
    found = content["rows"]["2"]
    assert found["seconds_per_image"] > 0 and found["against_first"][SCORERS[0]]["mean"] != 0
    scores = {"scores": {"overall": {"value": 0.5, "low": 0.25, "high": 0.75}}}
    images = Path("eval/2/images")
    (images / "geneval.json").write_text(json.dumps(scores | {"images": images_key(images)}))
    compare(sources, options, Path("eval"), quiet)
    page = Path("eval/compare.html").read_text()
    assert "GenEval (HF detector) overall" in page and "0.500 [0.250, 0.750]" in page
    (images / "geneval.json").write_text(json.dumps(scores | {"images": "of another time"}))
    logged: list[str] = []
    assert compare(sources, options, Path("eval"), logged.append)["rows"]["2"]["geneval"] is None
    assert any("holds scores of other images" in line for line in logged)
    other = read_source(f"1={place},dtype=fp32,steps=3,height=32,width=32")
    with pytest.raises(ValueError, match="another source .*steps"):
        preference(other, options, Path("eval/1"), quiet)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.jsonl", '{"scorer": "x"}\n', "scores.jsonl, line 1 is damaged"),
        ("scores.jsonl", "[]\n", "scores.jsonl, line 1: expected a JSON object"),
        (
            "scores.jsonl",
            '{"scorer": "x", "prompt": 0, "image": 0, "score": "high"}\n',
            "scores.jsonl, line 1 is damaged",
        ),
        ("settings.json", "[1, 2]", "settings.json: expected a JSON object, got list. Give an empty folder with --out"),
        ("settings.json", '{"identity": 3, "seed": 777}', "images of another source"),
    ],
)
def test_damaged_files(gdmd: Gdmd, name: str, content: str, message: str) -> None:
    a, _ = world(gdmd)
    Path("eval").mkdir()
    Path("eval", name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        preference(read_source(str(a)), settings(), Path("eval"), quiet)
