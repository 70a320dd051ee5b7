"""The blind plan (balance, sides, repeats, checks) and the image folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from gdmd.config.load import ConfigError
from gdmd.config.study import StudyConfig
from gdmd.sources.folders import read_images
from gdmd.study.design import draw_plan
from gdmd.study.folders import common_rows, named_folders
from gdmd.study.records import Plan, Prompt

MODELS = ("ours", "dmd2", "sdxl")
PROMPTS = [Prompt(text=f"prompt {k}", task=("counting", "color", "position")[k % 3]) for k in range(60)]
CFG = StudyConfig(raters=9, pairs_per_rater=20, votes_per_pair=3, repeats=3, checks=2)


def pairs_of(plan: Plan, rater: int) -> list[tuple[str, str, str]]:
    return [(t.pair, t.left_model, t.right_model) for t in plan.raters[rater].trials if t.kind == "pair"]


def test_seed_fixes_the_plan_but_not_the_ids() -> None:
    one, two, other = (draw_plan(CFG.model_copy(update={"seed": s}), MODELS, PROMPTS).plan for s in (1, 1, 2))
    assert [pairs_of(one, k) for k in range(9)] == [pairs_of(two, k) for k in range(9)]
    assert [pairs_of(one, k) for k in range(9)] != [pairs_of(other, k) for k in range(9)]
    shown = [{i for r in plan.raters for t in r.trials for i in (t.id, t.left, t.right)} for plan in (one, two)]
    assert not shown[0] & shown[1]


def test_balance_of_model_pairs_and_sides() -> None:
    plan = draw_plan(CFG, MODELS, PROMPTS).plan
    for rater in range(9):
        model_pairs = Counter(frozenset(models) for _, *models in pairs_of(plan, rater))
        assert len(model_pairs) == 3 and max(model_pairs.values()) - min(model_pairs.values()) <= 1
        sides = Counter((left, right) for _, left, right in pairs_of(plan, rater))
        for left, right in sides:
            assert abs(sides[left, right] - sides[right, left]) <= 1
    total = Counter(frozenset(models) for rater in range(9) for _, *models in pairs_of(plan, rater))
    assert max(total.values()) - min(total.values()) <= 1


def test_votes_per_image_pair() -> None:
    plan = draw_plan(CFG, MODELS, PROMPTS).plan
    votes = Counter(pair for rater in range(9) for pair, *_ in pairs_of(plan, rater))
    assert set(votes.values()) == {3}
    assert all(len({pair for pair, *_ in pairs_of(plan, rater)}) == 20 for rater in range(9))


def test_tasks_are_spread_evenly() -> None:
    plan = draw_plan(CFG, MODELS, PROMPTS).plan
    tasks = Counter(plan.prompts[t.prompt].task for r in plan.raters for t in r.trials if t.kind == "pair")
    assert max(tasks.values()) - min(tasks.values()) <= 12


def test_repeats_come_later_with_sides_swapped() -> None:
    for rater in draw_plan(CFG, MODELS, PROMPTS).plan.raters:
        place = {t.pair: (k, t) for k, t in enumerate(rater.trials) if t.kind == "pair"}
        repeats = [(k, t) for k, t in enumerate(rater.trials) if t.kind == "repeat"]
        assert len({t.pair for _, t in repeats}) == 3
        for k, again in repeats:
            before, first = place[again.pair]
            assert k - before > 20 // 4
            assert (again.left, again.right) == (first.right, first.left)


def test_attention_checks() -> None:
    drawn = draw_plan(CFG, MODELS, PROMPTS)
    for rater in drawn.plan.raters:
        checks = [t for t in rater.trials if t.kind == "check"]
        assert len(checks) == 2 and rater.trials[0].kind == "pair"
        for trial in checks:
            intact, ruined = (trial.left, trial.right) if trial.expected == "left" else (trial.right, trial.left)
            assert intact in drawn.images and ruined in drawn.ruined


def test_against_compares_every_model_with_one_only() -> None:
    plan = draw_plan(CFG.model_copy(update={"against": "dmd2"}), MODELS, PROMPTS).plan
    model_pairs = {frozenset(models) for rater in range(9) for _, *models in pairs_of(plan, rater)}
    assert model_pairs == {frozenset(("ours", "dmd2")), frozenset(("dmd2", "sdxl"))}
    with pytest.raises(ValueError, match="against names 'gan'"):
        draw_plan(CFG.model_copy(update={"against": "gan"}), MODELS, PROMPTS)


def test_impossible_study_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="lower --pairs"):
        draw_plan(StudyConfig(pairs_per_rater=61, raters=3), MODELS[:2], PROMPTS)
    for wrong in ({"repeats": 70}, {"votes_per_pair": 11}, {"questions": ("overall", "overall")}, {"questions": ()}):
        with pytest.raises(ConfigError):
            StudyConfig(**wrong)


def flat(folder: Path, lines: list[dict[str, object]], files: list[str]) -> Path:
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in files:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_flat_folders(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "task": "one"}, {"prompt": "b", "file": "cat.png"}]
    rows = read_images(flat(tmp_path / "flat", lines, ["00000_0.png", "00000_1.png", "000001.png", "cat.png"]))
    assert [image.name for image in rows["a", 0].images] == ["00000_0.png", "00000_1.png"]
    assert [image.name for image in rows["b", 0].images] == ["cat.png"]
    assert rows["a", 0].task == "one"


def test_file_outside_the_folder(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="line 1: there is no file"):
        read_images(flat(tmp_path / "flat", [{"prompt": "a", "file": "../other.png"}], []))


def test_common_prompts(tmp_path: Path) -> None:
    one = flat(tmp_path / "one", [{"prompt": "a"}, {"prompt": "b"}], ["00000.png", "00001.png"])
    two = flat(tmp_path / "two", [{"prompt": "b"}], ["00000.png"])
    with pytest.raises(ValueError, match="one has 1 prompts that another model lacks, among them 'a'"):
        common_rows({"one": one, "two": two}, 1, common=False)
    (row,) = common_rows({"one": one, "two": two}, 1, common=True)
    assert row["one"].images[0].name == "00001.png" and row["two"].images[0].name == "00000.png"
    with pytest.raises(ValueError, match="1 images of 'b', but 2 are needed"):
        common_rows({"one": one, "two": two}, 2, common=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a=x"], "at least two models"), (["a=x", "a=y"], "two models are called 'a'"), (["=x", "b=y"], "no name")],
)
def test_bad_model_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_folders(arguments)
