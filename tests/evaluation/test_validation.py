"""Validation during training: its images, its scores, a resumed run, held-out scorers, and what the report makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_world import Gdmd
from torch import Tensor

from gdmd.config.describe import against_hacking
from gdmd.config.load import ConfigError
from gdmd.config.metric_keys import metric_keys
from gdmd.config.validation import DIVERSITY
from gdmd.diffusion.rng import SampleRng
from gdmd.evaluation.health import health_panels
from gdmd.evaluation.validation import Validation, grid_captions, validation_prompts
from gdmd.recipes.build import Components
from gdmd.recipes.build_rewards import build_rewards, reward_stats, without_stats
from gdmd.recipes.open_run import open_student, student_row, teacher_row
from gdmd.recipes.read import read_recipe
from gdmd.recipes.run_folders import config_of
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.ocr import OCR
from gdmd.runs import checkpoint
from gdmd.runs.best_checkpoint import named_best
from gdmd.runs.reward_signal import RewardSignal
from gdmd.runs.run_folder import read_metrics
from gdmd.runs.validation_scores import FEW, reward_hacking, trend
from gdmd.types import PromptBatch

PROMPTS = "validation.prompts=['a red circle', 'two rings']"
EVERY = ("validation.every=2", PROMPTS, "validation.images=2")
TRAINED = ("shapes_clip", "shapes_pref")
LABELS = (*TRAINED, "shapes_clip_heldout")


def scores(folder: str, step: int, prefix: str = "validation/") -> dict[str, float]:
    (row,) = [row for row in read_metrics(Path(folder)) if row["step"] == step]
    return {key: value for key, value in row.items() if key.startswith(prefix)}


def rows_without_speed(folder: str) -> list[dict[str, float | None]]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "speed/images_per_s"} for row in rows]


def expected(components: Components, teacher: bool) -> dict[str, float]:
    """Each image drawn and scored alone, from its own noise; the diversity of the two images of a prompt."""
    cfg = config_of(Path("run"))
    sampler = teacher_row(cfg, components, "teacher") if teacher else student_row(cfg, components)
    texts = ["a red circle", "a red circle", "two rings", "two rings"]
    found, features = [], []
    for k, text in enumerate(texts):
        with torch.no_grad():
            latents = sampler.latents([text], SampleRng(cfg.eval.seed, 0, torch.tensor([k])))
            image = components.codec.decode(latents).clamp(0, 1)
            batch = PromptBatch(torch.arange(1), (text,), torch.arange(1), {}, {})
            specs = [{"kind": label} for label in LABELS]
            rewards = build_rewards([type(cfg.rewards[0])(**spec) for spec in specs])
            found.append([float(reward.score(image, batch)) for reward in rewards])
            features.append(rewards[2].image_features((image * 255).round() / 255)[0].double())
    angles = [1 - torch.dot(features[k], features[k + 1]).item() for k in (0, 2)]  # of the two images of a prompt
    means = {label: sum(own) / len(own) for label, own in zip(LABELS, zip(*found, strict=True), strict=True)}
    return means | {DIVERSITY: sum(angles) / 2}


def test_scores_are_those_of_the_ema_student_and_of_the_teacher(gdmd: Gdmd) -> None:
    """They equal scores computed again from the checkpoint, image by image."""
    gdmd.trained(*EVERY)
    components, step = open_student(config_of(Path("run")), Path("run"))
    assert step == 2
    for teacher, at, prefix in ((False, 2, "validation/"), (True, 0, "validation/teacher/")):
        own = {prefix + label: value for label, value in expected(components, teacher).items()}
        assert scores("run", at, prefix if teacher else "validation/") == pytest.approx(own, abs=1e-5)
    assert len(scores("run", 0)) == 8 and not scores("run", 1)
    assert {path.name for path in Path("run/grids").iterdir()} == {
        *("step_000000.png", "step_000002.png", "teacher.safetensors")
    }


def test_validation_does_not_change_the_training(gdmd: Gdmd) -> None:
    gdmd.trained(*EVERY, run="with")
    gdmd.trained(run="without")
    ends = [checkpoint.load_newest(Path(name) / "checkpoints") for name in ("with", "without")]
    assert ends[0] and ends[1]
    for part, tensors in ends[1].tensors.items():
        assert all(torch.equal(value, ends[0].tensors[part][name]) for name, value in tensors.items()), part
    with_scores = [{k: v for k, v in row.items() if "validation/" not in k} for row in rows_without_speed("with")]
    assert [row for row in with_scores if len(row) > 1] == rows_without_speed("without")


def test_two_validations_of_the_same_weights_are_equal(gdmd: Gdmd) -> None:
    gdmd.trained(*EVERY)
    cfg = config_of(Path("run"))
    components, _ = open_student(cfg, Path("run"))
    validate = Validation(cfg, components)
    Path("grids").mkdir()
    found = [validate(step, Path(f"grids/step_{step}.png")) for step in (1, 5)]
    assert {key: value for key, value in found[0].items() if "/teacher/" not in key} == found[1]
    images = [Path(f"grids/step_{step}.png").read_bytes() for step in (1, 5)]  # the second with the stored teacher
    assert images[0] == images[1]


def test_resumed_run_has_the_rows_and_images_of_the_whole_one(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    every = (*EVERY, "validation.every=1")
    gdmd.trained(*every, "loop.steps=3", run="whole")
    gdmd.trained(*every, run="parts")
    monkeypatch.setattr(Validation, "_draw_teacher", None)  # its images are stored
    finished = gdmd("train", "--resume", "parts", "loop.steps=3", "--no-eval")
    assert finished.code == 0, finished.err
    assert "step 3, validation: shapes_clip " in finished.err
    steps = [row["step"] for row in read_metrics(Path("parts"))]
    assert steps == [0, 1, 2, 3] and all(scores("parts", step) == scores("whole", step) for step in steps)
    assert Path("parts/grids/step_000003.png").read_bytes() == Path("whole/grids/step_000003.png").read_bytes()


def test_other_prompts_draw_the_teacher_again(gdmd: Gdmd) -> None:
    gdmd.trained(*EVERY)
    finished = gdmd("train", "--resume", "run", "loop.steps=3", "validation.prompts=['a ring']", "--no-eval")
    assert finished.code == 0, finished.err
    assert "earlier validation scores are not comparable" in " ".join(finished.err.split())
    labels = (*LABELS, DIVERSITY)
    assert set(scores("run", 3, "validation/teacher/")) == {f"validation/teacher/{label}" for label in labels}


def dark(images: Tensor, prompts: PromptBatch) -> Tensor:
    """Scores the first image only."""
    scores = 1 - images.mean((1, 2, 3))
    scores[1:] = math.nan
    return scores


def failing(images: Tensor, prompts: PromptBatch) -> Tensor:
    if len(images) != 2:  # the trial before the training has two
        raise ValueError("no column 'answer'")
    return images.mean((1, 2, 3))


def test_images_without_a_score_are_left_out(gdmd: Gdmd) -> None:
    """A scorer that fails leaves null, with a warning; training continues."""
    scorers = ", ".join(f"{{kind: callable, target: 'test_validation:{name}'}}" for name in ("dark", "failing"))
    gdmd.trained(*EVERY, f"validation.scorers=[{scorers}]")
    row = scores("run", 2)
    assert 0 < row["validation/test_validation:dark"] < 1
    assert math.isnan(row["validation/test_validation:failing"])
    stored = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert stored[-1]["validation/test_validation:failing"] is None
    assert "validation/shapes_clip_heldout" not in row


def test_best_checkpoint_by_a_validation_score(gdmd: Gdmd) -> None:
    """The best is the validated checkpoint with the best score at its own step."""
    metric = "validation/shapes_clip_heldout"
    gdmd.trained(*EVERY, f"loop.best_metric={metric}", "loop.steps=4")
    found = {step: scores("run", step)[metric] for step in (2, 4)}
    best = named_best(Path("run/checkpoints"))
    assert best is not None and best.step == max(found, key=found.__getitem__) and best.value == found[best.step]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loop.best_metric=validation/shapes_clp",), "did you mean validation/shapes_clip?"),
        (("loop.best_metric=validation/teacher/shapes_clip",), "is not logged by this recipe"),
        (("loop.best_metric=validation/shapes_clip", "loop.checkpoint_every=3"), "set both to the same number"),
        (("validation.prompts=['a red dog']",), "validation.prompts: "),
        (("validation.prompts=missing.txt",), "prompt file missing.txt: cannot be read"),
    ],
)
def test_mistakes_are_refused_before_the_run_folder(gdmd: Gdmd, arguments: tuple[str, ...], message: str) -> None:
    refused = gdmd.train(*EVERY, *arguments)
    assert refused.code == 2 and message in refused.err and not Path("runs").exists(), refused.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.grid_every=5", "loop: grid_every was removed: set validation.every instead"),
        ("validation_steps=5", "here this is called validation.every"),
        ("validation_prompts=x.txt", "here this is called validation.prompts"),
        ("validation.prompts=3", "validation.prompts: got 3: should be a file, or a list of prompts"),
        ("validation.scorers=[{kind: shapes_pref}]", "which train the student and score the validation images anyway"),
        ("validation.scorers=[{kind: clip}, {kind: clip}]", "each scorer may be listed once"),
        ("validation.scorers=clip", "should be a list of {kind: ...}"),
    ],
)
def test_mistakes_in_the_recipe(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_recipe("shapes", [override])
    assert message in str(refused.value)


def test_the_column_of_the_training_prompts(tmp_path: Path) -> None:
    """Without it, the images of another column would be drawn and scored; it cannot be named for another file."""
    for name, header in (("p.csv", "prompt,long"), ("q.csv", "short,long")):
        (tmp_path / name).write_text(f"{header}\na cat,a cat on a mat\n")
    given = ["prompts.column=long", "validation.every=1"]
    same, other = (
        read_recipe("sdxl_gdmd", [*given, f"prompts.file={tmp_path}/{one}", f"validation.prompts={tmp_path}/q.csv"])
        for one in ("q.csv", "p.csv")
    )
    assert validation_prompts(same)[0] == ("a cat on a mat",)
    with pytest.raises(ValueError, match='validation.prompts: .*q.csv.*its columns are .*rename it to "prompt"'):
        validation_prompts(other)


def test_default_prompts_and_scorers() -> None:
    """Shapes: captions of every task and the held-out scorer. Other models: the shipped prompts, and no scorer."""
    shapes, real = read_recipe("shapes"), read_recipe("sdxl_gdmd", ["model.path=org/sdxl", "prompts.file=mine.txt"])
    assert validation_prompts(shapes) == (grid_captions(), ()) and [one.label for one in shapes.held_out] == [LABELS[2]]
    assert len(validation_prompts(real)[0]) == 8 and real.held_out == ()
    trained_on_it = read_recipe("shapes", ["rewards=[{kind: shapes_clip_heldout}]"])
    assert trained_on_it.held_out == () == read_recipe("shapes", ["validation.every=0"]).held_out


def validated(trained: list[float], held_out: list[float]) -> list[dict[str, float]]:
    pairs = zip(trained, held_out, strict=True)
    rows = [{"step": 10 * k, "validation/a": a, "validation/b": b} for k, (a, b) in enumerate(pairs)]
    return [{**rows[0], "validation/teacher/a": 0.5, "validation/teacher/b": 0.7}, *rows[1:]]


RISING = [0.0, 0.3, 0.32, 0.31, 0.4, 0.42, 0.44, 0.5, 0.52, 0.51]
NOISE = [0.0, 0.3, 0.36, 0.31, 0.33, 0.35, 0.32, 0.34, 0.3, 0.35]
FALLING = [0.0, 0.6, 0.58, 0.59, 0.5, 0.48, 0.45, 0.42, 0.4, 0.41]


@pytest.mark.parametrize(
    ("trained", "held_out", "status"),
    [
        (RISING, FALLING, "bad"),
        (RISING, RISING, "ok"),
        (RISING, NOISE, "ok"),
        (NOISE, FALLING, "look"),
        (RISING[:9], FALLING[:9], "unknown"),
    ],
)
def test_reward_hacking_is_reported(trained: list[float], held_out: list[float], status: str) -> None:
    """The trained score rises and the held-out one falls, by more than the spread; step 0 does not count."""
    rows = validated(trained, held_out)
    (panel,) = health_panels(rows, ["a"])
    assert (panel.title, panel.status) == ("Validation scores", status)
    assert "a (trained)" in panel.svg and "b (held out)" in panel.svg and panel.svg.count("teacher") >= 2
    assert (panel.finding == reward_hacking(rows, {"a"})) == (status == "bad")
    if status == "bad":
        assert "a 0.31 to 0.51" in panel.finding and "b 0.59 to 0.41" in panel.finding
    assert health_panels(rows, ["a", "b"])[0].status == "unknown"  # nothing is held out


@pytest.mark.parametrize("trained", [["a"], ["remote a", "a"]])
def test_a_remote_scorer_is_not_held_out_from_training_on_what_it_serves(trained: list[str]) -> None:
    rows = [{key.replace("/a", "/remote_a"): value for key, value in row.items()} for row in validated(RISING, FALLING)]
    (panel,) = health_panels(rows, trained)
    assert "remote_a (trained)" in panel.svg and "b (held out)" in panel.svg and panel.status == "bad"


@pytest.mark.parametrize(
    ("diversity", "status"),
    [
        ([0.4, *(0.4 - 0.03 * k for k in range(9))], "bad"),  # the last third has half of the first
        ([0.4, *(0.39 - 0.008 * k for k in range(9))], "ok"),  # falls by less than a quarter
        ([0.2, 0.19, 0.2, 0.19, 0.2, 0.18, 0.2, 0.19, 0.2, 0.19], "look"),  # less than half of the teacher's
    ],
)
def test_lost_diversity_is_reported(diversity: list[float], status: str) -> None:
    """Trained scores rise; the panel says what to do, and shows the curve."""
    rows = validated(RISING, RISING)
    rows = [row | {f"validation/{DIVERSITY}": value} for row, value in zip(rows, diversity, strict=True)]
    rows[0][f"validation/teacher/{DIVERSITY}"] = 0.4
    (panel,) = health_panels(rows, ["a"], "What to do: less.")
    assert panel.status == status and ("What to do" in panel.finding) == (status == "bad")
    assert status == "bad" or f"{diversity[-1] / 0.4:.2f} times the teacher's" in panel.finding
    assert "diversity of a prompt" in panel.svg
    assert ("diversity 0.37 to 0.19" in panel.finding) == (status == "bad")


def test_advice_names_the_options_of_the_method() -> None:
    """It names the reward gradient first, if that is on; a method without rewards gets no advice."""
    tilted = against_hacking(read_recipe("shapes_gradient"))
    assert "validation/shapes_clip_heldout" in tilted and tilted.index("reward_gradient") < tilted.index("method.gamma")
    assert "reward_gradient" not in against_hacking(read_recipe("shapes"))
    assert "method.rl_weight" in against_hacking(read_recipe("dmd_nft")) and against_hacking(read_recipe("dmd")) == ""


def test_diversity_needs_two_images_and_features() -> None:
    for overrides in (
        ["validation.images=1"],
        ["validation.every=0"],
        ["validation.scorers=[]", "rewards=[{kind: shapes_pref}]"],
    ):
        cfg = read_recipe("shapes", ["validation.images=2", *overrides])
        assert cfg.feature_scorer is None and not any(DIVERSITY in key for key in metric_keys(cfg))
    shapes = read_recipe("shapes", ["validation.images=2"])
    assert shapes.feature_scorer is not None and shapes.feature_scorer.kind == "shapes_clip_heldout"
    assert f"validation/{DIVERSITY}" in metric_keys(shapes)
    real = read_recipe("sdxl_gdmd", ["validation.images=2"])
    assert real.feature_scorer is not None and real.feature_scorer.kind == "clip"


def test_trend_of_noise_is_rarely_called_one() -> None:
    """Less than 2 % of 2,000 constant scores with noise rise or fall; the level is 1 %."""
    noise = torch.randn(2000, FEW, generator=torch.Generator().manual_seed(0)).tolist()
    found = [trend([{"step": k + 1, "validation/a": value} for k, value in enumerate(one)], "a") for one in noise]
    assert sum(one is not None and one.sign != 0 for one in found) < 40


def test_validation_rows_do_not_count_as_training() -> None:
    """The monitor of the rewards sees the same iterations with and without rows between its own."""
    logged = [{"step": 10 * k, "scores/a/unscored": 0.5, "scores/a/spread": 0.1} for k in (1, 2)]
    with_rows, without = RewardSignal(8), RewardSignal(8)
    for row in logged:
        without.add(row["step"], row)
    for row in [{"step": 0, "validation/a": 1.0}, logged[0], {"step": 15, "validation/a": 1.0}, logged[1]]:
        with_rows.add(int(row["step"]), row)
    assert with_rows == without


def test_validation_scores_are_not_part_of_the_statistics_of_training() -> None:
    """Neither prompts without text for OCR nor the parts of a composite are counted."""
    ocr = OCR.from_modules(lambda image: "")
    composite = Composite([Part(ocr)])
    batch = PromptBatch(torch.arange(1), ("a cat",), torch.arange(1), {}, {})
    with without_stats([composite]):
        composite.score(torch.rand(1, 3, 8, 8), batch)
    assert reward_stats([composite]) == {"reward/ocr/unasked": 0}
    composite.score(torch.rand(1, 3, 8, 8), batch)
    logged = reward_stats([composite])
    assert logged["reward/ocr/unasked"] == 1 and len(logged) == 2


def test_trend_needs_a_clear_change() -> None:
    """Equal means do not differ; a change of constant scores does, since nothing else moves them."""
    same = [0.0, 0.2, 0.4, 0.3, 0.4, 0.4, 0.4, 0.4, 0.2, 0.3]
    found = trend(validated(same, same), "a")
    assert found is not None and found[:2] == pytest.approx((0.3, 0.3)) and found.sign == 0
    step = [0.0, *([0.3] * 6), 0.2, 0.2, 0.2]
    assert trend(validated(step, step), "a")[2] == -1  # type: ignore[index]
