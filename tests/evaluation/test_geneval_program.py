"""``gdmd eval geneval``: prompts, images, resumable detections, scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gdmd.cli.app import main
from gdmd.config.image_source import SourceConfig
from gdmd.evaluation.geneval import generate, prompt_seed, score_folder, score_recorded
from gdmd.evaluation.geneval_scores import read_metadata
from gdmd.evaluation.measures import geneval_scores
from gdmd.rewards.geneval.detector import Detections
from gdmd.rewards.geneval.rules import DetectedObject, Requirement, Task, as_row
from gdmd.sources.base import SourceInfo
from gdmd.sources.folders import FolderSource

TASKS = (
    Task("single_object", "a photo of a dog", (Requirement("dog", 1),)),
    Task("colors", "a photo of a red dog", (Requirement("dog", 1, "red"),)),
    Task("counting", "a photo of two dogs", (Requirement("dog", 2),), (Requirement("dog", 3),)),
)


class Painter:
    """A source whose first pixel holds the prompt's length, the number of the image and the seed."""

    def __init__(self, name: str = "one", batch: int = 4) -> None:
        self.info = SourceInfo(name, "pipeline", name, batch=batch, identity={"kind": "pipeline", "weights": name})
        self.calls: list[int] = []

    def check(self, texts: Any) -> None:
        """Anything is a prompt."""

    def generate(self, slots: Any, seed: int) -> list[Image.Image]:
        self.calls.append(len(slots))
        return [Image.new("RGB", (4, 4), (len(slot.text), slot.image, seed % 251)) for slot in slots]


def painted(folder: Path, tasks: Any = TASKS, images: int = 4, source: Any = None, seed: int = 0) -> int:
    return generate(source or Painter(), tasks, folder, images, seed)


class OneDog:
    """Finds one dog in even images and two in odd ones; counts how often it was detected."""

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


def test_generate_resumes_in_the_official_layout(tmp_path: Path) -> None:
    assert painted(tmp_path) == 12
    assert read_metadata(tmp_path / "00001" / "metadata.jsonl") == (TASKS[1],)
    first = (tmp_path / "00002" / "samples" / "0003.png").read_bytes()
    assert painted(tmp_path) == 0
    (tmp_path / "00002" / "samples" / "0003.png").unlink()
    assert painted(tmp_path) == 4
    assert (tmp_path / "00002" / "samples" / "0003.png").read_bytes() == first
    with pytest.raises(ValueError, match="00000 holds another prompt"):
        painted(tmp_path, TASKS[::-1])


def test_score_resumes_after_a_kill(tmp_path: Path) -> None:
    painted(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        score_folder(tmp_path, OneDog(stop_after=5), AlwaysRed())
    record = tmp_path / "detections.jsonl"
    record.write_text(record.read_text()[:-20])  # the last line was being written
    rest = OneDog()
    scores = score_folder(tmp_path, rest, AlwaysRed())
    assert rest.calls == 12 - 4
    assert [scores[tag].value for tag in ("single_object", "colors", "counting")] == [1.0, 1.0, 0.5]
    assert scores["overall"].value == pytest.approx(2.5 / 3) and scores["overall"].images == 12
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[8]["reason"] == "expected dog>=2, found 1" and rows[8]["partial_credit"] == 0.5
    stored = json.loads((tmp_path / "geneval.json").read_text())
    assert stored["label"] == "GenEval (HF detector)" and stored["scores"]["overall"]["low"] is None
    metadata = tmp_path / "all.jsonl"
    metadata.write_text("".join((tmp_path / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(3)))
    assert repr(score_recorded(record, metadata)) == repr(scores)  # one prompt per task: the intervals are NaN
    metadata.write_text("".join((tmp_path / f"{n:05d}" / "metadata.jsonl").read_text() for n in (2, 1, 0)))
    with pytest.raises(ValueError, match="line 1: recorded for 'a photo of a dog', but prompt 0 of the metadata is"):
        score_recorded(record, metadata)


def test_detections_depend_on_image_prompt_and_detector(tmp_path: Path) -> None:
    painted(tmp_path, images=2)

    def detected(by: str) -> int:
        detector = OneDog()
        score_folder(tmp_path, detector, AlwaysRed(), by=by)
        return detector.calls

    assert [detected("one"), detected("one"), detected("two")] == [6, 0, 6]
    image = tmp_path / "00001" / "samples" / "0001.png"
    image.write_bytes((tmp_path / "00002" / "samples" / "0000.png").read_bytes())
    metadata = tmp_path / "00000" / "metadata.jsonl"
    metadata.write_text(json.dumps(as_row(TASKS[0]) | {"include": [{"class": "dog", "count": 2}]}) + "\n")
    assert detected("two") == 1 + 2
    lines = [json.loads(line) for line in (tmp_path / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and len({line["key"] for line in lines}) == 6
    shutil.rmtree(tmp_path / "00002")
    assert score_folder(tmp_path, OneDog(), AlwaysRed(), by="two")["overall"].images == 4


def test_scores_by_two_detectors_are_not_compared(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "none", "two")]
    for folder, by in zip(folders, ("one", "", "two"), strict=True):
        painted(folder, images=2)
        if by:
            score_folder(folder, OneDog(), AlwaysRed(), by=by)
    logged: list[str] = []
    first, none, second = geneval_scores(folders, logged.append)
    assert first is not None and none is second is None
    assert len(logged) == 1 and "another detector, classifier or version of gdmd than" in logged[0]
    score_folder(folders[2], OneDog(), AlwaysRed(), by="one")
    assert geneval_scores(folders, logged.append) == [first, None, first] and len(logged) == 1


def test_scores_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    """The folder of a subset would have another mean; the order of the prompts does not matter."""
    folders = [tmp_path / name for name in ("all", "turned", "some")]
    for folder, tasks in zip(folders, (TASKS, TASKS[::-1], TASKS[:2]), strict=True):
        painted(folder, tasks)
        score_folder(folder, OneDog(), AlwaysRed(), by="one")
    logged: list[str] = []
    whole, turned, some = geneval_scores(folders, logged.append)
    assert whole is not None and turned is not None and some is None
    assert len(logged) == 1 and "some/geneval.json holds scores of other prompts than" in logged[0]


def test_images_of_another_source_or_seed_are_not_mixed(tmp_path: Path) -> None:
    assert painted(tmp_path, TASKS[:1], 1) == 1 and painted(tmp_path, images=2) == 6
    for source, seed, what in ((Painter("two"), 0, "weights"), (Painter(), 1, "seed")):
        with pytest.raises(ValueError, match=rf"another source \({what}"):
            painted(tmp_path, images=2, source=source, seed=seed)
    with pytest.raises(ValueError, match="images of 2 prompts beyond the 1 of this metadata"):
        painted(tmp_path, TASKS[:1], 2)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="unknown source"):
        painted(tmp_path, images=2)


def test_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    one, four = Painter(batch=1), Painter(batch=4)
    for source, folder in ((one, tmp_path / "a"), (four, tmp_path / "b")):
        painted(folder, TASKS[:1], 5, source, seed=3)
    assert (one.calls, four.calls) == ([1] * 5, [4, 1])
    for k in range(5):
        file = f"00000/samples/{k:04d}.png"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    seeds = {prompt_seed(seed, number) for seed in range(30) for number in range(553)}
    assert len(seeds) == 30 * 553 and max(seeds) < 2**48


def test_images_of_a_folder_are_copied_to_their_own_prompts(tmp_path: Path) -> None:
    """Also where two prompts have the same text; and images of another folder are not taken for copied ones."""
    twice = (TASKS[0], TASKS[0])
    for name, levels in (("one", (10, 20)), ("two", (30, 40))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text(2 * f'{{"prompt": "{TASKS[0].prompt}"}}\n')
        for k, level in enumerate(levels):
            Image.new("L", (4, 4), level).save(tmp_path / name / f"0000{k}.png")
    one, two = (FolderSource(SourceConfig(name=name, where=str(tmp_path / name))) for name in ("one", "two"))
    assert painted(tmp_path / "out", twice, 1, one) == 2 and painted(tmp_path / "out", twice, 1, one) == 0
    files = [tmp_path / "out" / f"0000{k}" / "samples" / "0000.png" for k in range(2)]
    assert [Image.open(file).getpixel((0, 0)) for file in files] == [(10,) * 3, (20,) * 3]
    with pytest.raises(ValueError, match=r"another source \(content differs"):
        painted(tmp_path / "out", twice, 1, two)


def test_unreadable_image(tmp_path: Path) -> None:
    painted(tmp_path, TASKS[:1], 1)
    (tmp_path / "00000" / "samples" / "0000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0000.png cannot be read"):
        score_folder(tmp_path, OneDog(), AlwaysRed())


@pytest.fixture
def gdmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_prompts_command(gdmd: Any) -> None:
    assert gdmd("eval", "geneval", "prompts", "-o", "a.jsonl", "--per-task", "5")[0] == 0
    assert gdmd("eval", "geneval", "prompts", "-o", "b.jsonl", "--per-task", "5", "--without", "a.jsonl")[0] == 0
    first, second = (read_metadata(Path(name)) for name in ("a.jsonl", "b.jsonl"))
    assert len(first) == len(second) == 30
    assert not {task.prompt for task in first} & {task.prompt for task in second}


def test_score_command(gdmd: Any, tmp_path: Path) -> None:
    painted(tmp_path / "images", images=2)
    score_folder(tmp_path / "images", OneDog(), AlwaysRed())
    lines = [(tmp_path / "images" / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(3)]
    Path("m.jsonl").write_text("".join(lines))
    code, printed, _ = gdmd("eval", "geneval", "score", "images/detections.jsonl", "--metadata", "m.jsonl", "--json")
    assert code == 0 and json.loads(printed)["counting"]["value"] == 0.5
    code, printed, _ = gdmd("eval", "geneval", "score", "images/detections.jsonl", "--metadata", "m.jsonl")
    assert printed.splitlines()[0] == "GenEval (HF detector)" and "overall" in printed.splitlines()[1]
    assert printed.splitlines()[1].endswith("6 images of 3 prompts")
    record = Path("images/detections.jsonl")
    record.write_text("".join(record.read_text().splitlines(True)[:4]))  # as an interrupted detection leaves it
    code, printed, notes = gdmd("eval", "geneval", "score", str(record), "--metadata", "m.jsonl")
    assert printed.splitlines()[1].endswith("4 images of 2 prompts")
    assert "detections for 2 of the 3 prompts of m.jsonl" in notes


@pytest.mark.parametrize(("images", "missing"), [(2, 1), (4, 3)])
def test_a_folder_whose_generation_was_interrupted_is_named(
    gdmd: Any, tmp_path: Path, images: int, missing: int
) -> None:
    """Also where the images that are left would be equally many for every prompt on average."""
    painted(tmp_path / "images", images=images)
    for k in range(missing):
        (tmp_path / "images" / "00002" / "samples" / f"{k:04d}.png").unlink()
    score_folder(tmp_path / "images", OneDog(), AlwaysRed())
    lines = [(tmp_path / "images" / f"{n:05d}" / "metadata.jsonl").read_text() for n in range(3)]
    Path("m.jsonl").write_text("".join(lines))
    code, printed, notes = gdmd("eval", "geneval", "score", "images/detections.jsonl", "--metadata", "m.jsonl")
    assert code == 0 and printed.splitlines()[1].endswith(f"{3 * images - missing} images of 3 prompts")
    assert "some prompts have fewer images than others" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["eval", "--json", "nowhere"], "nowhere is not a run folder"),
        (["eval", "run"], "run is not a run folder"),
        (["eval", "geneval", "score", "nowhere"], "nowhere does not exist"),
        (
            ["eval", "geneval", "prompts", "-o", "m.jsonl/a.jsonl", "--per-task", "1"],
            "choose another folder with --out",
        ),
        (["eval", "geneval", "score", "m.jsonl"], "give its prompts with --metadata"),
        (
            ["eval", "geneval", "score", "m.jsonl", "--metadata", "m.jsonl", "--clip", "x", "--device", "cpu"],
            "--clip, --device: without effect, because m.jsonl holds what was detected",
        ),
        (
            ["eval", "geneval", "score", "m.jsonl", "--metadata", "m.jsonl", "--detector", "x"],
            "--detector: without effect",
        ),
        (
            ["eval", "geneval", "score", ".", "--metadata", "m.jsonl"],
            "--metadata: without effect, because . holds the metadata of its prompts",
        ),
        (
            ["eval", "geneval", "generate", "./x", "-o", "y", "--metadata", "m.jsonl"],
            "source ./x: it does not exist. Give a run folder, an exported folder",
        ),
        (["eval", "geneval", "generate", "x", "-o", "y", "--metadata", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_errors_of_eval(gdmd: Any, arguments: list[str], message: str) -> None:
    row = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    Path("m.jsonl").write_text(json.dumps(row) + "\n")
    code, _, printed = gdmd(*arguments)
    assert code == 2 and message in printed and "Traceback" not in printed
