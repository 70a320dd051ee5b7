"""gdmd eval table: eight scores of any sources, from the same noise, on CPU with tiny random rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_world import Gdmd
from PIL import Image
from test_model_evaluation import painted

pytest.importorskip("diffusers")

import tiny_pipelines
from tiny_rewards import PRETRAINED, REWARDS

from gdmd.evaluation.field_table import COLUMNS, TableOptions, chosen_columns
from gdmd.recipes import build_rewards

SCENES = ["a red dog", "two cats", "a bench"]
ASKED = [
    {"prompt": "two dogs", "vqa_list": [["How many dogs are in the image?", "two"], ["Are there dogs?", "Yes"]]},
    {"prompt": "a red bus", "vqa_list": [["Is the bus red?", "Yes"]]},
]
SIGNS = ['a sign "OPEN"', 'a sign "OPEN HERE"']
PROMPTS = ("--prompts", "scenes.txt", "--geneval2", "asked.jsonl", "--ocr", "signs.txt")


@pytest.fixture
def world(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> Gdmd:
    """Prompt files, a folder of images of all of them, a pipeline, and tiny networks behind all eight kinds."""
    tiny = PRETRAINED | {"ocr": REWARDS["ocr"]}
    kinds = {column.kind for column in COLUMNS}
    monkeypatch.setattr(build_rewards, "CLASSES", {kind: lambda kind=kind, **_: tiny[kind]() for kind in kinds})
    monkeypatch.setattr("gdmd.evaluation.scorers.require_weights", lambda specs: None)
    monkeypatch.setattr("gdmd.evaluation.preference.scorer_identity", lambda spec: spec.kind)
    Path("scenes.txt").write_text("\n".join(SCENES) + "\n")
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    Path("signs.txt").write_text("\n".join(SIGNS) + "\n")
    texts = [*SCENES, *(row["prompt"] for row in ASKED), *SIGNS]
    painted(Path("images"), texts, [[(40 * k, 255 - 30 * k, 80)] for k in range(len(texts))])
    tiny_pipelines.save("sd3", Path("sd3"))
    return gdmd


def of_folder(numbers: range) -> list[Image.Image]:
    return [Image.open(f"images/{number:05d}/samples/0000.png") for number in numbers]


def test_table_of_all_columns(world: Gdmd) -> None:
    """The means are those of the rewards themselves; marks say what each model was trained on."""
    sources = ("ours=images,trained=clip+pickscore", "teacher=sd3,steps=2,guidance=1,height=32,width=32,dtype=fp32")
    done = world("eval", "table", *sources, "-o", "out", *PROMPTS, "--device", "cpu")
    assert done.code == 0, done.err
    content = json.loads(Path("out/table.json").read_text())
    assert [head["kind"] for head in content["columns"]] == [column.kind for column in COLUMNS]
    assert [head["prompts"] for head in content["columns"]] == [3] * 6 + [2, 2]
    ours, teacher = (content["rows"][name]["scores"] for name in ("ours", "teacher"))
    asked = [row["vqa_list"] for row in ASKED]
    clip: Any = PRETRAINED["clip"]()
    geneval2: Any = PRETRAINED["geneval2"]()
    hpsv3: Any = PRETRAINED["hpsv3"]()
    for kind, scores in (
        ("clip", clip(of_folder(range(3)), SCENES)),
        ("hpsv3", hpsv3(of_folder(range(3)), SCENES)),
        ("geneval2", geneval2(of_folder(range(3, 5)), [row["prompt"] for row in ASKED], vqa_list=asked)),
    ):
        assert ours[kind]["mean"] == pytest.approx(sum(scores) / len(scores), rel=1e-4), kind
        assert teacher[kind]["mean"] != ours[kind]["mean"] and teacher[kind]["low"] <= teacher[kind]["mean"]
    assert ours["ocr"]["mean"] == pytest.approx((1 + 0.5) / 2)  # both images are read as OPEN
    assert {kind for kind, cell in ours.items() if cell["trained"]} == {"clip", "pickscore"}
    assert all(cell["trained"] is None for cell in teacher.values())
    text = Path("out/table.md").read_text()
    assert done.out == text
    head, _, first, second = text.splitlines()[:4]
    assert head == "| model | NFE | ImageReward | CLIP | Aesthetic | PickScore | HPSv2.1 | HPSv3 | GenEval2 | OCR |"
    assert ["†" in cell for cell in first.split("|")[3:11]] == [False, True, False, True, False, False, False, False]
    assert "?" not in first and second.count("?") == 8 and second.startswith("| teacher | - |")
    assert "GenEval2: asked.jsonl (2 prompts); OCR: signs.txt (2 prompts); 1 image per prompt" in text
    page = Path("out/geneval2/compare.html").read_text()
    assert "two dogs" in page and Path("out/prompts/teacher/images/00002/samples/0000.png").is_file()


def test_some_columns_as_json_continue(world: Gdmd) -> None:
    command = ("eval", "table", "images", "-o", "out", *PROMPTS[:2], "--device", "cpu", "--json")
    done = world(*command, "--columns", "hpsv3,clip", "--scorer", "clip,dtype=bf16")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [head["title"] for head in found["columns"]] == ["CLIP", "HPSv3"]
    assert "hpsv3 scored 3 images" in done.err
    again = world(*command, "--columns", "hpsv3,clip", "--scorer", "clip,dtype=bf16")
    assert json.loads(again.out) == found and "hpsv3 scored" not in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompts were given; give --prompts, --geneval2 or --ocr"),
        ((*PROMPTS[:2], "--columns", "clipp"), "'clipp' is not a column of the table; did you mean 'clip'?"),
        ((*PROMPTS[:2], "--columns", "ocr"), "column ocr has no prompts; give its file with --ocr"),
        ((*PROMPTS[:2], "--columns", ""), "'' is not a column of the table"),
        (
            (*PROMPTS[:2], "--scorer", "clip,dtype=bf16", "--scorer", "clip,dtype=fp32"),
            "column clip already has clip,dtype=bf16; give its settings once",
        ),
        ((*PROMPTS[:2], "--scorer", "ocr"), "the table has no column 'ocr'; it has imagereward, clip"),
        (
            ("--geneval2", "scenes.txt"),
            "geneval2 needs questions with every prompt, but 'a red dog' has no list 'vqa_list'",
        ),
        (("--ocr", "scenes.txt"), "reward ocr needs prompts that quote a text"),
    ],
)
def test_wrong_arguments(world: Gdmd, arguments: tuple[str, ...], message: str) -> None:
    """Reported before any image is generated."""
    done = world("eval", "table", "sd3", "-o", "out", *arguments, "--device", "cpu")
    assert done.code == 2 and message in done.err and not Path("out").exists()


def test_columns_follow_the_prompt_files() -> None:
    chosen = chosen_columns(TableOptions({"geneval2": "asked.jsonl", "ocr": "signs.txt"}))
    assert [column.title for column in chosen] == ["GenEval2", "OCR"]
