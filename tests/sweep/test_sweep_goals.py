"""The goals of pipelines, met and missed, on made-up results: six tasks of four captions, two images each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gdmd.shapes.grammar import catalog, fixed_rows
from gdmd.sweep.goals import LAB_STUDENT, LAB_TEACHER, Captions, goals

PER_TASK, IMAGES = 4, 2
COUNT = 6 * PER_TASK * IMAGES
CAPTIONS = Captions(PER_TASK, IMAGES, replicates=200)


def line(row: str, right: int, seed: int = 0, *, steps: int = 4, guided: bool = False) -> dict[str, Any]:
    """A line in which the first ``right`` images of every task are correct. row: METHOD_MODE."""
    method, mode = row.rsplit("_", 1)
    each = COUNT // 6
    correct = ("1" * right + "0" * (each - right)) * 6
    facts = {"family": "sd3", "method": method, "mode": mode, "steps": steps}
    return {
        **{"method": f"{row}_{steps}_{guided}", "seed": seed, "correct": correct},
        **{"nfe": steps * (1 + guided), "pipeline": facts},
    }


def every_goal(*lines: Mapping[str, Any]) -> dict[str, Any]:
    return {goal.text: goal for goal in goals(lines, CAPTIONS)}


def test_each_goal_compares_its_rows() -> None:
    """Of 8 images per task, the teacher has 6 right in 28 guided steps, 4 in four guided and 7 in four plain steps."""
    teachers = [
        line("teacher_teacher", *case[:1], steps=case[1], guided=case[2]) for case in ((6, 28, True), (4, 4, True))
    ]
    teachers.append(line("teacher_teacher", 7))
    students = [line("gdmd_lora", 5), line("dmd_lora", 4), line("gdmd_full", 6), line("dmd_full", 6)]
    found = every_goal(*teachers, *students, line("gdmd_exported", 5))
    assert {text: (round(goal.found.value, 4), goal.met) for text, goal in found.items()} == {
        "GDMD LoRA / teacher with 56 NFE": (round(5 / 6, 4), False),
        "GDMD LoRA - teacher with 8 NFE": (0.125, True),
        "GDMD LoRA - DMD LoRA": (0.125, True),
        "GDMD full - DMD full": (0.0, False),
        "GDMD full / teacher with 56 NFE": (1.0, True),
        "exported LoRA in diffusers - the same LoRA in gdmd": (0.0, True),
    }
    assert found["GDMD full / teacher with 56 NFE"].target == LAB_STUDENT / LAB_TEACHER


def test_a_longer_training_is_compared_with_its_teacher_and_baselines_of_as_many_updates_or_passes() -> None:
    def trained(row: str, right: int, updates: int) -> dict[str, Any]:
        passes = updates * (5 if row == "gdmd_lora" else 2)
        return line(row, right) | {"method": f"{row}_{updates}", "student_updates": updates, "passes": passes}

    students = [trained("gdmd_lora", 5, 250), trained("dmd_lora", 4, 250), trained("gdmd_lora", 7, 600)]
    students += [trained("dmd_lora", 5, 600), trained("algorithm_1_lora", 6, 600), trained("dmd_refl_lora", 4, 250)]
    students += [trained("dmd_refl_lora", 5, 1_490), trained("dmd_lora", 5, 1_400)]  # 0.7 and 7 % fewer passes
    found = every_goal(line("teacher_teacher", 6, steps=28, guided=True), *students)
    students += [trained("dmd_refl_lora", right, 600) | {"method": f"refl_{right}"} for right in (6, 8)]
    students.append(trained("gdmd_lora", 8, 600) | {"method": "gdmd_6"})
    found |= every_goal(*students)
    assert {text: (round(goal.found.value, 4), goal.met) for text, goal in found.items()} == {
        "GDMD LoRA / teacher with 56 NFE": (round(5 / 6, 4), False),
        "GDMD LoRA - DMD LoRA": (0.125, True),
        "GDMD LoRA, 600 updates / teacher with 56 NFE": (round(7 / 6, 4), True),
        "GDMD LoRA, 600 updates - DMD LoRA, 600 updates": (0.25, True),
        "GDMD LoRA, 600 updates - Algorithm 1 LoRA, 600 updates": (0.125, True),
        "GDMD LoRA, 600 updates - DMD + ReFL LoRA, as many passes (1,490 updates)": (0.25, True),
        "GDMD LoRA, 600 updates - DMD + ReFL LoRA, 600 updates (refl_6)": (0.125, True),
        "GDMD LoRA, 600 updates - DMD + ReFL LoRA, 600 updates (refl_8)": (-0.125, False),
        "GDMD LoRA, 600 updates (gdmd_6) - DMD LoRA, 600 updates": (0.375, True),
        "GDMD LoRA, 600 updates (gdmd_6) - Algorithm 1 LoRA, 600 updates": (0.25, True),
        "GDMD LoRA, 600 updates (gdmd_6) - DMD + ReFL LoRA, 600 updates (refl_6)": (0.25, True),
        "GDMD LoRA, 600 updates (gdmd_6) - DMD + ReFL LoRA, 600 updates (refl_8)": (0.0, False),
        "GDMD LoRA, 600 updates (gdmd_6) - DMD + ReFL LoRA, as many passes (1,490 updates)": (0.375, True),
    }


def test_only_common_seeds_are_compared() -> None:
    lines = [line("gdmd_lora", 8, 0), line("gdmd_lora", 4, 1), line("gdmd_lora", 6, 2)]
    lines += [line("dmd_lora", 2, 1), line("dmd_lora", 2, 2), line("dmd_lora", 8, 3)]
    (goal,) = every_goal(*lines).values()
    assert goal.found.seeds == pytest.approx([0.25, 0.5]) and goal.found.value == pytest.approx(0.375)
    assert every_goal(line("gdmd_lora", 8, 0), line("dmd_lora", 8, 1)) == {}


def test_an_exported_lora_must_agree_within_the_interval() -> None:
    own = line("gdmd_lora", 5)
    far = every_goal(own, line("gdmd_exported", 1)).popitem()[1]
    assert far.found.interval[1] < 0 and not far.met
    mixed = "10" * (COUNT // 2)  # 0.125 lower, but the captions disagree about it
    near = every_goal(own, line("gdmd_exported", 4) | {"correct": mixed}).popitem()[1]
    assert (
        near.found.value == pytest.approx(-0.125) and near.found.interval[0] < 0 < near.found.interval[1] and near.met
    )


def test_a_share_of_a_teacher_with_score_0_is_not_met() -> None:
    goal = every_goal(line("gdmd_lora", 5), line("teacher_teacher", 0, steps=28, guided=True))
    share = goal["GDMD LoRA / teacher with 56 NFE"]
    assert np.isnan(share.found.value) and not share.met


def test_weights_are_those_of_the_mean_of_task_means() -> None:
    """Repeated captions, which a task with few captions has, are drawn together."""
    captions = Captions(per_task=12, images=1, replicates=50)
    rows = fixed_rows("eval", 12)
    tasks = catalog().task[rows].numpy()
    assert np.allclose(captions.mean, 1 / 72)
    for task in range(6):
        assert np.allclose(captions.drawn[:, tasks == task].sum(1), 1 / 6)
    same = [np.flatnonzero(rows.numpy() == row) for row in rows.unique().tolist()]  # type: ignore[no-untyped-call]
    assert max(map(len, same)) > 1
    assert all(np.ptp(captions.drawn[:, own], 1).max() == 0 for own in same)


@pytest.mark.parametrize("count", [25, COUNT // 2, 2 * COUNT])
def test_lines_of_another_evaluation_are_refused(count: int) -> None:
    """Twice as many captions are refused, too: their images would count for other captions."""
    with pytest.raises(ValueError, match=f"seed 0, has {count} images, but .* 24 captions with 2 images each"):
        CAPTIONS.of(line("gdmd_lora", 5) | {"correct": "1" * count})
