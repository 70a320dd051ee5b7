"""GenEval: rules against a slow reference written from the paper, folder layout, intervals, prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gdmd.evaluation.geneval_prompts import draw_tasks
from gdmd.evaluation.geneval_scores import (
    ImageResult,
    detections_row,
    image_files,
    judge_detections,
    read_metadata,
    summarize,
)
from gdmd.rewards.geneval.rules import (
    COLORS,
    RELATIONS,
    TASKS,
    DetectedObject,
    Requirement,
    Task,
    as_row,
    judge,
    partial_credit,
    read_task,
    relations,
)

NAMES = ("dog", "cat", "bench", "car")


def slow_relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """The position rule in numpy, written from the paper."""
    first, second = np.array(a, dtype=np.float64).reshape(2, 2), np.array(b, dtype=np.float64).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    both = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    revised = np.maximum(np.abs(offset) - 0.1 * both, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    dx, dy = revised / np.sqrt((offset**2).sum())
    rules = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in rules.items() if holds}


def slow_verdict(row: Mapping, objects: Mapping[str, list], colors: Mapping) -> bool:
    """The official rules on (box, confidence, key) triples and the raw metadata, one nested loop after the other."""
    threshold = 0.9 if row["tag"] == "counting" else 0.3
    strong = {}
    for name in objects:
        left = [one for one in objects[name] if one[1] > threshold]
        ordered = []
        while left and len(ordered) < 16:
            best = max(left, key=lambda one: one[1])
            ordered.append(best)
            left.remove(best)
        strong[name] = ordered
    right, chosen = True, []
    for need in row["include"]:
        mine = strong.get(need["class"], [])[: need["count"]]
        good = len(mine) == need["count"]
        if good and "color" in need:
            good = all(colors[need["class"], one[2]] == need["color"] for one in mine)
        if good and "position" in need:
            relation, target = need["position"]
            good = chosen[target] is not None
            for one in mine if good else []:
                for other in chosen[target]:
                    if relation not in slow_relations(one[0], other[0]):
                        good = False
        chosen.append(mine if good else None)
        right = right and good
    for need in row.get("exclude", []):
        if len(strong.get(need["class"], [])) >= need["count"]:
            right = False
    return right


def random_task(rng: random.Random) -> Task:
    """Official kinds mostly, and stranger metadata that the format allows."""
    if rng.random() < 0.7:
        tag = rng.choice(TASKS)
        first, second = rng.sample(NAMES, 2)
        count = rng.randint(2, 4)
        kinds = {
            "single_object": ((Requirement(first, 1),), ()),
            "two_object": ((Requirement(first, 1), Requirement(second, 1)), ()),
            "counting": ((Requirement(first, count),), (Requirement(first, count + 1),)),
            "colors": ((Requirement(first, 1, rng.choice(COLORS[:2])),), ()),
            "position": ((Requirement(first, 1), Requirement(second, 1, None, rng.choice(RELATIONS), 0)), ()),
            "color_attr": ((Requirement(first, 1, COLORS[0]), Requirement(second, 1, COLORS[1])), ()),
        }
        include, exclude = kinds[tag]
        return Task(tag, "a photo", include, exclude)
    include = tuple(
        Requirement(name, rng.randint(1, 2), rng.choice([None, *COLORS[:2]]), relation, rng.randrange(number or 1))
        for number, name in enumerate(rng.sample(NAMES, 3))
        for relation in [rng.choice([None, *RELATIONS]) if number else None]
    )
    excluded = tuple(Requirement(name, rng.randint(1, 4)) for name in rng.sample(NAMES, rng.randint(0, 2)))
    excluded = tuple(e for e in excluded if all(e.name != w.name or e.count > w.count for w in include))
    return Task(rng.choice(TASKS), "a photo", include, excluded)


def random_objects(rng: random.Random) -> tuple[dict[str, list[DetectedObject]], dict[tuple[str, int], str]]:
    found: dict[str, list[DetectedObject]] = {}
    colors = {}
    for name in NAMES:
        for key in range(rng.choice([0, 1, 1, 2, 3, 4, 20])):
            x, y = rng.choice([0, 10, 40, 100]) + rng.random(), rng.choice([0, 10, 40, 100]) + rng.random()
            box = (x, y, x + rng.choice([5, 30, 80]), y + rng.choice([5, 30, 80]))
            found.setdefault(name, []).append(
                DetectedObject(box, rng.choice([0.25, 0.5, 0.85, 0.93]) + rng.random() / 20, key)
            )
            colors[name, key] = rng.choice(COLORS[:2])
    return found, colors


def asker(colors: Mapping[tuple[str, int], str]):
    return lambda name, objects: [colors[name, one.key] for one in objects]


def test_random_detections_against_a_slow_reference() -> None:
    rng, right, perfect = random.Random(0), 0, 0
    for _ in range(2000):
        task, (found, colors) = random_task(rng), random_objects(rng)
        plain = {name: [(one.box, one.confidence, one.key) for one in ones] for name, ones in found.items()}
        want = slow_verdict(as_row(task), plain, colors)
        verdict = judge(task, found, asker(colors))
        credit = partial_credit(task, found, asker(colors))
        assert verdict.correct == want and bool(verdict.reasons) != want, (task, found)
        assert 0 <= credit <= 1 and (credit == 1) == want, (task, found, credit)
        right, perfect = right + want, perfect + 1
    assert 0.1 < right / perfect < 0.6  # both answers are common, or the comparison would say little


def test_random_boxes_against_a_slow_reference() -> None:
    rng, seen = random.Random(1), set()
    for _ in range(5000):
        boxes = [[rng.choice([0, 1, 7, 30]) + rng.choice([0, rng.random()]) for _ in range(4)] for _ in range(2)]
        a, b = (tuple(box) for box in boxes)
        assert relations(a, b) == slow_relations(a, b)  # type: ignore[arg-type]
        seen.add(relations(a, b))  # type: ignore[arg-type]
    assert {frozenset(), *(frozenset([name]) for name in RELATIONS)} < seen


def dogs(*confidences: float) -> dict[str, list[DetectedObject]]:
    return {"dog": [DetectedObject((10 * k, 0, 10 * k + 8, 8), c, k) for k, c in enumerate(confidences)]}


def no_colors(*_: object) -> list[str]:
    raise AssertionError("no color was asked for")


def test_counting_is_exact_and_needs_high_confidence() -> None:
    two = Task("counting", "two dogs", (Requirement("dog", 2),), (Requirement("dog", 3),))
    assert judge(two, dogs(0.95, 0.91), no_colors).correct
    assert judge(two, dogs(0.95, 0.91, 0.9), no_colors).correct  # .9 is not above .9
    assert judge(two, dogs(0.95, 0.91, 0.92), no_colors).reasons == ("expected dog<3, found 3",)
    assert judge(two, dogs(0.95, 0.5), no_colors).reasons == ("expected dog>=2, found 1",)
    assert judge(Task("two_object", "", (Requirement("dog", 2),)), dogs(0.31, 0.5, 0.3), no_colors).correct
    assert [partial_credit(two, dogs(*[0.95] * n), no_colors) for n in range(6)] == [0, 0.5, 1, 0.5, 0, 0]


def test_at_most_16_objects_per_class() -> None:
    crowd = dogs(*[0.95] * 20)
    none_of_16, none_of_17 = (
        Task("two_object", "", (Requirement("dog", 1),), (Requirement("dog", n),)) for n in (16, 17)
    )
    assert judge(none_of_16, crowd, no_colors).reasons == ("expected dog<16, found 16",)
    assert judge(none_of_17, crowd, no_colors).correct
    assert not judge(Task("two_object", "", (Requirement("dog", 17),)), crowd, no_colors).correct


def test_colors_of_the_most_confident_objects() -> None:
    task = Task("colors", "a red dog", (Requirement("dog", 1, "red"),))
    colors = {("dog", 0): "red", ("dog", 1): "blue"}
    assert judge(task, dogs(0.9, 0.5), asker(colors)).correct
    assert judge(task, dogs(0.5, 0.9), asker(colors)).reasons == ("expected red dog>=1, found 0 red; and 1 blue",)
    assert partial_credit(task, dogs(0.5, 0.9), asker(colors)) == 0.5
    assert judge(task, {}, no_colors).reasons == ("expected dog>=1, found 0",)


def test_wrong_positions_are_named() -> None:
    task = Task("position", "", (Requirement("dog", 1), Requirement("cat", 1, None, "left of", 0)))
    found = {"dog": [DetectedObject((0, 0, 10, 10), 0.9)], "cat": [DetectedObject((50, 0, 60, 10), 0.9)]}
    assert judge(task, found, no_colors).reasons == ("expected cat left of target, found right of target",)
    assert partial_credit(task, found, no_colors) == pytest.approx(2 / 3)
    assert judge(task, {"cat": found["cat"]}, no_colors).reasons[1] == "no target for cat to be left of"


# ---------------------------------------------------------------- files


def write_folder(root: Path, tasks: Sequence[Task], images: int) -> None:
    for number, task in enumerate(tasks):
        (root / f"{number:05d}" / "samples").mkdir(parents=True)
        (root / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(as_row(task)) + "\n")
        for image in range(images):
            (root / f"{number:05d}" / "samples" / f"{image:04d}.png").write_bytes(b"")


def test_metadata_is_read_or_rejected(tmp_path: Path) -> None:
    tasks = draw_tasks(3, seed=0)
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(as_row(task)) + "\n" for task in tasks))
    assert read_metadata(path) == tasks
    good = as_row(tasks[0])
    cases = {
        "tag 'sizes' is not one of": good | {"tag": "sizes"},
        "'include' is missing": {"tag": "colors", "prompt": "x"},
        "count should be 1 or more, got 0": good | {"include": [{"class": "dog", "count": 0}]},
        "color 'mauve' is not one of": good | {"include": [{"class": "dog", "count": 1, "color": "mauve"}]},
        "refers to requirement 0, and only 0": good
        | {"include": [{"class": "d", "count": 1, "position": ["above", 0]}]},
        "asks for nothing": good | {"include": []},
        "not GenEval metadata": [],
    }
    for message, row in cases.items():
        with pytest.raises(ValueError, match=message):
            read_task(row, "file, line 1")
    for text, message in (
        ("{}\n", "line 1: not GenEval metadata"),
        (path.read_text() + '{"tag": "col', "line 19"),
        ("\n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_metadata(path)


def test_folders_in_genevals_layout_are_read(tmp_path: Path) -> None:
    tasks = draw_tasks(2, seed=1)[:3]
    write_folder(tmp_path, tasks, 2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "00000" / "samples" / "grid.png").write_bytes(b"")
    rows = list(image_files(tmp_path))
    assert [(row[0], row[2]) for row in rows] == [(p, i) for p in range(3) for i in range(2)]
    assert [row[1] for row in rows[::2]] == list(tasks)
    jpeg = tmp_path / "00001" / "samples" / "0002.jpg"
    jpeg.write_bytes(b"")
    with pytest.raises(ValueError, match=r"0002\.jpg: GenEval's layout has PNG files"):
        list(image_files(tmp_path))
    for file in jpeg.parent.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="holds no images"):
        list(image_files(tmp_path))
    with pytest.raises(ValueError, match="no prompt folders"):
        list(image_files(tmp_path / "notes"))


def test_recorded_detections_give_the_same_verdicts(tmp_path: Path) -> None:
    rng, lines, tasks, want = random.Random(3), [], {}, []
    for number in range(60):
        tasks[number], (found, colors) = random_task(rng), random_objects(rng)
        want.append(judge(tasks[number], found, asker(colors)).correct)
        lines.append(json.dumps(detections_row(number, 0, tasks[number], found, colors)))
    path = tmp_path / "detections.jsonl"
    path.write_text("\n".join(lines))
    assert [row.correct for row in judge_detections(path, tasks)] == want
    colorless = detections_row(0, 0, Task("colors", "", (Requirement("dog", 1, "red"),)), dogs(0.9), {})
    path.write_text(json.dumps(colorless))
    with pytest.raises(ValueError, match="color of a dog is needed but was not recorded"):
        judge_detections(path, {0: Task("colors", "", (Requirement("dog", 1, "red"),))})
    with pytest.raises(ValueError, match="prompt 0 is not among"):
        judge_detections(path, {})


# ---------------------------------------------------------------- scores


def rows_of(correct: Mapping[str, Sequence[Sequence[int]]]) -> list[ImageResult]:
    """tag -> prompts -> images, 1 = right."""
    rows, prompt = [], 0
    for tag, prompts in correct.items():
        for images in prompts:
            task = Task(tag, f"prompt {prompt}", (Requirement("dog", 1),))
            rows += [ImageResult(prompt, k, task, bool(right), (), float(right)) for k, right in enumerate(images)]
            prompt += 1
    return rows


def test_overall_is_the_mean_of_the_tasks() -> None:
    scores = summarize(rows_of({"colors": [[1, 1, 0, 0]], "counting": [[1, 1], [1, 1], [0, 1]]}))
    assert scores["colors"].value == 0.5 and scores["counting"].value == pytest.approx(5 / 6)
    assert scores["overall"].value == pytest.approx((0.5 + 5 / 6) / 2)
    assert (scores["counting"].images, scores["counting"].prompts, scores["overall"].prompts) == (6, 3, 4)
    assert set(scores) == {"overall", "colors", "counting"}


def test_interval_counts_prompts_not_images() -> None:
    rng = np.random.default_rng(0)
    prompts = [[int(right)] * 4 for right in rng.random(400) < 0.5]  # four equal images are one observation
    score = summarize(rows_of({"colors": prompts}))["colors"]
    width = (score.high - score.low) / 2
    assert width == pytest.approx(1.96 * np.sqrt(0.25 / 400), rel=0.1)
    mixed = [[1, 0, 1, 0]] * 400  # all the variance lies within prompts
    score = summarize(rows_of({"colors": mixed}))["colors"]
    assert score.low == score.value == score.high == 0.5
    assert summarize(rows_of({"colors": prompts})) == summarize(rows_of({"colors": prompts}))


def test_duplicate_and_missing_images() -> None:
    with pytest.raises(ValueError, match="no judged images"):
        summarize([])
    rows = rows_of({"colors": [[1]]})
    with pytest.raises(ValueError, match="image 0 of prompt 0 was judged twice"):
        summarize(rows * 2)


# ---------------------------------------------------------------- prompts


def test_drawn_prompts_are_valid_and_different() -> None:
    tasks = draw_tasks(100, seed=5)
    assert len({task.prompt for task in tasks}) == len(tasks) == 80 + 5 * 100
    assert tasks == draw_tasks(100, seed=5) != draw_tasks(100, seed=6)
    for task in tasks:
        assert read_task(as_row(task), "x") == task
        assert all(need.color is None or need.name != "person" for need in task.include)
        assert len({need.name for need in task.include}) == len(task.include)
        if task.tag == "counting":
            assert task.exclude[0].count == task.include[0].count + 1
    fresh = draw_tasks(50, seed=7, without=tasks)
    assert not {task.prompt for task in tasks} & {task.prompt for task in fresh}
    with pytest.raises(ValueError, match="not 300 different prompts of task counting"):
        draw_tasks(300, seed=0)


def test_excluded_prompts_are_excluded_in_other_words_too() -> None:
    """Otherwise "a cat and a dog" could be trained on and "a dog and a cat" tested."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def other_words(task: Task) -> Task:
        a, b = task.include if task.tag == "position" else reversed(task.include)
        if b.relation is None:
            return replace(task, prompt="", include=(a, b))
        swapped = replace(a, relation=opposite[b.relation], target=0)
        return replace(task, prompt="", include=(replace(b, relation=None), swapped))

    drawn = [task for task in draw_tasks(20, seed=5) if len(task.include) == 2]
    again = [task for task in draw_tasks(20, 5, without=list(map(other_words, drawn))) if len(task.include) == 2]
    assert len(drawn) == len(again) == 60
    assert not {task.prompt for task in drawn} & {task.prompt for task in again}
