"""``gdmd eval geneval``: prompts, images in the official layout, detections that survive a kill, scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdmd.cli.app import main
from gdmd.evaluation.geneval import (
    generate,
    generate_from,
    prompt_seed,
    score_folder,
    score_recorded,
    source_maker,
)
from gdmd.evaluation.geneval_scores import read_metadata
from gdmd.rewards.geneval.detector import Detections
from gdmd.rewards.geneval.rules import DetectedObject, Requirement, Task, as_row
from gdmd.sources.base import SourceInfo

TASKS = (
    Task("single_object", "a photo of a dog", (Requirement("dog", 1),)),
    Task("colors", "a photo of a red dog", (Requirement("dog", 1, "red"),)),
    Task("counting", "a photo of two dogs", (Requirement("dog", 2),), (Requirement("dog", 3),)),
)


def make(prompt: str, count: int, seed: int) -> list[Image.Image]:
    """Images whose first pixel tells the prompt's words and whose second the seed."""
    images = []
    for k in range(count):
        levels = np.zeros((4, 4, 3), np.uint8)
        levels[0, 0] = (len(prompt), k, seed % 251)
        images.append(Image.fromarray(levels))
    return images


class OneDog:
    """Finds one dog in even images and two in odd ones; counts how often it was asked."""

    def __init__(self, stop_after: int = 99) -> None:
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, image: Image.Image) -> Detections:
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        number = image.getpixel((0, 0))[1]  # type: ignore[index]
        dogs = [DetectedObject((0.0, 0.0, 2.0, 2.0), 0.95, 0), DetectedObject((2.0, 2.0, 4.0, 4.0), 0.93, 1)][
            : 1 + number % 2
        ]
        return Detections({"dog": dogs}, torch.ones(2, 4, 4, dtype=torch.bool))


class AlwaysRed:
    def colors(self, image: Any, name: str, objects: Any, masks: Any) -> list[str]:
        return ["red"] * len(objects)


def test_images_lie_in_the_official_layout_and_a_second_start_makes_only_what_is_missing(tmp_path: Path) -> None:
    assert generate(make, TASKS, tmp_path, 4, seed=0) == 12
    assert read_metadata(tmp_path / "00001" / "metadata.jsonl") == (TASKS[1],)
    first = (tmp_path / "00002" / "samples" / "0003.png").read_bytes()
    assert generate(make, TASKS, tmp_path, 4, seed=0) == 0
    (tmp_path / "00002" / "samples" / "0003.png").unlink()
    assert generate(make, TASKS, tmp_path, 4, seed=0) == 4
    assert (tmp_path / "00002" / "samples" / "0003.png").read_bytes() == first
    with pytest.raises(ValueError, match="00000 holds another prompt"):
        generate(make, TASKS[1:], tmp_path, 4, seed=0)


def test_a_scoring_that_is_stopped_goes_on_where_it_was_and_gives_the_scores_of_one_go(tmp_path: Path) -> None:
    generate(make, TASKS, tmp_path, 4, seed=0)
    with pytest.raises(KeyboardInterrupt):
        score_folder(tmp_path, OneDog(stop_after=5), AlwaysRed())  # type: ignore[arg-type]
    record = tmp_path / "detections.jsonl"
    record.write_text(record.read_text()[:-20])  # the last line was being written
    rest = OneDog()
    scores = score_folder(tmp_path, rest, AlwaysRed())  # type: ignore[arg-type]
    assert rest.calls == 12 - 4
    assert [scores[tag].value for tag in ("single_object", "colors", "counting")] == [1.0, 1.0, 0.5]
    assert scores["overall"].value == pytest.approx(2.5 / 3) and scores["overall"].images == 12
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[8]["reason"] == "expected dog>=2, found 1" and rows[8]["partial_credit"] == 0.5
    assert json.loads((tmp_path / "geneval.json").read_text())["label"] == "GenEval (HF detector)"
    metadata = tmp_path / "all.jsonl"
    metadata.write_text("".join((tmp_path / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(3)))
    assert score_recorded(record, metadata) == scores


def test_detections_belong_to_image_prompt_and_detector(tmp_path: Path) -> None:
    generate(make, TASKS, tmp_path, 2, seed=0)

    def asked(by: str) -> int:
        detector = OneDog()
        score_folder(tmp_path, detector, AlwaysRed(), by=by)  # type: ignore[arg-type]
        return detector.calls

    assert [asked("one"), asked("one"), asked("two")] == [6, 0, 6]
    image = tmp_path / "00001" / "samples" / "0001.png"
    image.write_bytes((tmp_path / "00002" / "samples" / "0000.png").read_bytes())
    metadata = tmp_path / "00000" / "metadata.jsonl"
    metadata.write_text(json.dumps(as_row(TASKS[0]) | {"include": [{"class": "dog", "count": 2}]}) + "\n")
    assert asked("two") == 1 + 2
    lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and len({line["key"] for line in lines}) == 6
    shutil.rmtree(tmp_path / "00002")
    assert score_folder(tmp_path, OneDog(), AlwaysRed(), by="two")["overall"].images == 4  # type: ignore[arg-type]


class Plain:
    """A source of one color."""

    def __init__(self, name: str) -> None:
        self.info = SourceInfo(name, "pipeline", name, identity={"kind": "pipeline", "weights": name})

    def check(self, texts: Any) -> None:
        """Anything is a prompt."""

    def generate(self, places: Any, seed: int) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4), "red") for _ in places]


def test_generated_images_of_another_source_or_seed_are_not_mixed(tmp_path: Path) -> None:
    one, two = Plain("one"), Plain("two")
    assert generate_from(one, TASKS[:1], tmp_path, 1, 0) == 1  # type: ignore[arg-type]
    assert generate_from(one, TASKS, tmp_path, 2, 0) == 6  # type: ignore[arg-type]
    for source, seed, what in ((two, 0, "weights"), (one, 1, "seed")):
        with pytest.raises(ValueError, match=rf"another source \({what}"):
            generate_from(source, TASKS, tmp_path, 2, seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images of 2 prompts beyond the 1 of this metadata"):
        generate_from(one, TASKS[:1], tmp_path, 2, 0)  # type: ignore[arg-type]
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="unknown source"):
        generate_from(one, TASKS, tmp_path, 2, 0)  # type: ignore[arg-type]


def test_an_image_depends_on_its_seed_and_not_on_the_batch() -> None:
    class Source:
        def __init__(self, batch: int) -> None:
            self.info = SourceInfo("x", "pipeline", "x", batch=batch)
            self.calls: list[int] = []

        def check(self, texts: Any) -> None:
            """Anything is a prompt."""

        def generate(self, places: Any, seed: int) -> list[Any]:
            self.calls.append(len(places))
            return [(place.text, place.key, seed) for place in places]

    one, four = Source(1), Source(4)
    alone, together = (source_maker(source)("x", 5, 3) for source in (one, four))  # type: ignore[arg-type]
    assert alone == together and len(set(alone)) == 5 and (one.calls, four.calls) == ([1] * 5, [4, 1])
    seeds = {prompt_seed(seed, number) for seed in range(30) for number in range(553)}
    assert len(seeds) == 30 * 553 and max(seeds) < 2**48


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    generate(make, TASKS[:1], tmp_path, 1, seed=0)
    (tmp_path / "00000" / "samples" / "0000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0000.png cannot be read"):
        score_folder(tmp_path, OneDog(), AlwaysRed())  # type: ignore[arg-type]


# ---------------------------------------------------------------- the program


@pytest.fixture
def gdmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_prompts_are_written_in_the_official_format_and_leave_out_the_given_ones(gdmd: Any) -> None:
    assert gdmd("eval", "geneval", "prompts", "-o", "a.jsonl", "--per-task", "5")[0] == 0
    assert gdmd("eval", "geneval", "prompts", "-o", "b.jsonl", "--per-task", "5", "--without", "a.jsonl")[0] == 0
    first, second = (read_metadata(Path(name)) for name in ("a.jsonl", "b.jsonl"))
    assert len(first) == len(second) == 30
    assert not {task.prompt for task in first} & {task.prompt for task in second}


def test_recorded_detections_are_scored_from_the_command_line(gdmd: Any, tmp_path: Path) -> None:
    generate(make, TASKS, tmp_path / "images", 2, seed=0)
    score_folder(tmp_path / "images", OneDog(), AlwaysRed())  # type: ignore[arg-type]
    lines = [(tmp_path / "images" / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(3)]
    Path("m.jsonl").write_text("".join(lines))
    code, printed, _ = gdmd("eval", "geneval", "score", "images/detections.jsonl", "--metadata", "m.jsonl", "--json")
    assert code == 0 and json.loads(printed)["counting"]["value"] == 0.5
    code, printed, _ = gdmd("eval", "geneval", "score", "images/detections.jsonl", "--metadata", "m.jsonl")
    assert printed.splitlines()[0] == "GenEval (HF detector)" and "overall" in printed.splitlines()[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["eval", "--json", "nowhere"], "nowhere is not a run folder"),
        (["eval", "run"], "run is not a run folder"),
        (["eval", "geneval", "score", "nowhere"], "nowhere does not exist"),
        (["eval", "geneval", "score", "m.jsonl"], "give its prompts with --metadata"),
        (
            ["eval", "geneval", "generate", "./x", "-o", "y", "--metadata", "m.jsonl"],
            "x is not a run folder, nor",
        ),
        (["eval", "geneval", "generate", "x", "-o", "y", "--metadata", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_a_mistake_is_one_clear_message_and_a_run_is_still_the_default(
    gdmd: Any, words: list[str], message: str
) -> None:
    row = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    Path("m.jsonl").write_text(json.dumps(row) + "\n")
    code, _, printed = gdmd(*words)
    assert code == 2 and message in printed and "Traceback" not in printed
