"""From votes to a report: known votes give known numbers, simulated preferences are recovered, the commands work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from study_world import MODELS, write_images, write_study

from gdmd.cli.app import main
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import ClipConfig
from gdmd.config.run import RunConfig
from gdmd.config.study import StudyConfig
from gdmd.config.training import LoopConfig
from gdmd.runs.run_folder import create
from gdmd.shapes.grammar import TASKS as SHAPES_TASKS
from gdmd.study.analyze import analyze
from gdmd.study.records import IMAGES, VOTES, Plan, Prompt, Trial, Vote, read_plan, vote_of
from gdmd.study.report import markdown_text, verdict
from gdmd.study.simulate import RaterModel, recovery, simulated_votes, synthetic_plan
from gdmd.study.store import Store

CFG = StudyConfig(raters=8, pairs_per_rater=24, votes_per_pair=4, repeats=4, checks=2, questions=("overall",))
PLAN = synthetic_plan(CFG, ("ours", "theirs"), 60)


def votes_by(plan: Plan, left_answer: Any) -> list[Vote]:
    """Every screen answered by ``left_answer(rater, trial)``."""
    return [
        vote_of(plan, rater, trial, question, left_answer(rater, trial), elapsed_ms=2000)
        for rater, who in enumerate(plan.raters)
        for trial in who.trials
        for question in plan.questions
    ]


def prefers(model: str) -> Any:
    return lambda _, trial: trial.expected or ("left" if trial.left_model == model else "right")


def test_unanimous_raters() -> None:
    found = analyze(PLAN, votes_by(PLAN, prefers("ours")), replicates=200)
    (pair,) = found.pairs
    assert (pair.wins, pair.ties, pair.losses) == (8 * 24, 0, 0), "repeats and checks are no votes"
    assert pair.win_rate == pair.score == 1 and pair.p < 1e-50
    assert "no bound" in found.bradley_terry[0].why_not
    assert found.agreement[0].pairwise == 1 and found.agreement[0].self_same == found.agreement[0].self_count == 32
    assert found.bias[0].share == pytest.approx(0.5)
    assert all(row.used and row.checks_passed == 2 for row in found.raters)


def test_two_votes_that_agree_claim_nothing() -> None:
    """Every bootstrap sample of equal votes is the same: 2 of 2 votes have the interval [100, 100], but p = 0.5."""
    own = {"votes_per_pair": 1, "repeats": 0, "checks": 0}
    plan = synthetic_plan(CFG.model_copy(update=own | {"raters": 2, "pairs_per_rater": 1}), ("ours", "theirs"), 9)
    found = analyze(plan, votes_by(plan, prefers("ours")), replicates=200)
    assert found.pairs[0].clustered == (1.0, 1.0) and found.pairs[0].p == 0.5
    assert verdict(found).sentence == "Overall: too few votes to compare ours and theirs."
    assert "raters prefer ours" in verdict(analyze(PLAN, votes_by(PLAN, prefers("ours")), replicates=200)).sentence
    one = synthetic_plan(CFG.model_copy(update=own | {"raters": 1}), ("ours", "theirs"), 60)
    assert "| 100.0 % | " in markdown_text(
        analyze(one, votes_by(one, prefers("ours")), replicates=200)
    )  # no [nan, nan]


def test_prompts_of_the_same_text_are_one_cluster() -> None:
    twice = PLAN.model_copy(update={"prompts": tuple(Prompt(text=f"prompt {k // 2}") for k in range(60))})
    votes = simulated_votes(PLAN, RaterModel(), 0)
    assert (
        analyze(twice, votes, replicates=200).pairs[0].prompts < analyze(PLAN, votes, replicates=200).pairs[0].prompts
    )


def test_always_left_is_bias_not_preference() -> None:
    found = analyze(PLAN, votes_by(PLAN, lambda *_: "left"), max_failed_checks=2, replicates=200)
    assert found.bias[0].share == 1 and found.bias[0].p < 1e-50
    assert found.pairs[0].win_rate == pytest.approx(0.5)
    assert found.agreement[0].self_same == 0, "a repeat has the sides exchanged"


def test_raters_who_fail_a_check_are_left_out() -> None:
    def answer(rater: int, trial: Trial) -> str:
        if rater == 3:
            return "tie"
        return str(prefers("ours")(rater, trial))

    votes = votes_by(PLAN, answer)
    found = analyze(PLAN, votes, replicates=200)
    assert [row.rater for row in found.raters if not row.used] == [3]
    assert found.pairs[0].ties == 0 and found.pairs[0].raters == 7
    assert analyze(PLAN, votes, max_failed_checks=2, replicates=200).pairs[0].ties == 24
    with pytest.raises(ValueError, match="--max-failed"):
        analyze(PLAN, votes_by(PLAN, lambda *_: "tie"), replicates=200)
    with pytest.raises(ValueError, match="no votes yet"):
        analyze(PLAN, [])


def test_clustered_interval_covers_a_known_win_rate() -> None:
    found = recovery(PLAN, RaterModel(win_rate=0.65, prompt_spread=0.6, rater_spread=0.6), studies=40, replicates=200)
    assert found.mean_win_rate == pytest.approx(found.truth, abs=0.025)
    assert found.truth < 0.65, "the spread draws the average to one half"
    assert found.clustered_covered >= 0.88
    assert found.wilson_covered < found.clustered_covered, "votes that cluster are fewer than they seem"


def test_equal_models_are_rarely_different() -> None:
    found = recovery(PLAN, RaterModel(win_rate=0.5, tie_rate=0.3), studies=40, replicates=200)
    assert found.found <= 0.05 and 0.88 <= found.wilson_covered
    assert found.mean_win_rate == pytest.approx(0.5, abs=0.02)


def test_a_study_in_which_nobody_passes_the_checks_finds_nothing() -> None:
    """Two careless raters pass both checks with probability 1/9 each."""
    plan = synthetic_plan(CFG.model_copy(update={"raters": 2, "votes_per_pair": 2}), ("ours", "b"), 60)
    found = recovery(plan, RaterModel(careless=1.0), studies=20, replicates=200)
    assert 10 <= found.lost < 20 and 0.3 < found.mean_win_rate < 0.7 and 0 < found.wilson_covered <= 1
    with pytest.raises(ValueError, match="none of 1 simulated studies has a decided vote"):
        recovery(plan, RaterModel(tie_rate=0.9999), studies=1, replicates=200)


def test_bradley_terry_scores_of_three_models() -> None:
    plan = synthetic_plan(CFG.model_copy(update={"pairs_per_rater": 30}), ("ours", "b", "c"), 60)
    found = analyze(plan, simulated_votes(plan, RaterModel(win_rate=0.8), 1), replicates=400)
    scores = found.bradley_terry[0].scores
    assert max(scores, key=scores.__getitem__) == "ours"
    assert scores["ours"] - (scores["b"] + scores["c"]) / 2 == pytest.approx(1.39 * 0.83, abs=0.5)
    low, high = found.bradley_terry[0].intervals["ours"]
    assert low < scores["ours"] < high
    assert all(pair.p_holm >= pair.p for pair in found.pairs)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("ours", "b"), ("ours", "c"), ("b", "c")]


def test_models_without_a_vote_against_the_rest_have_not_won_or_lost() -> None:
    """The first votes of a study may leave out a model."""
    plan = synthetic_plan(CFG.model_copy(update={"pairs_per_rater": 30}), ("ours", "b", "c"), 60)
    votes = simulated_votes(plan, RaterModel(), 1)
    found = analyze(plan, [vote for vote in votes if "c" not in (vote.first, vote.second)], replicates=200)
    assert found.bradley_terry[0].why_not == "one model (or group of models) has no vote against the rest"


@pytest.fixture
def voted(tmp_path: Path) -> tuple[Path, Plan]:
    study, plan, _ = write_study(tmp_path, raters=4, pairs_per_rater=6)
    store = Store(study / VOTES)
    for rater, who in enumerate(plan.raters):
        for trial in who.trials:
            answer = prefers(MODELS[0])(rater, trial) if trial.prompt else trial.expected or "tie"
            store.vote(rater, trial.id, dict.fromkeys(plan.questions, answer), 3000)
    store.close()
    return study, plan


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_analyze_writes_report_figure_and_exports(voted: tuple[Path, Plan], capsys: pytest.CaptureFixture[str]) -> None:
    study, plan = voted
    assert run("study", "analyze", str(study), "--json", "--replicates", "200") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["wins"] == 20 and found["pairs"][0]["ties"] == 4
    assert {pair["task"] for pair in found["by_task"]} == {"counting", "position"}
    folder = study / "report"
    page = (folder / "report.html").read_text()
    assert "Overall: raters prefer" in page and MODELS[0] in page and "://" not in page
    assert "| Overall | all | Secret-Alpha | Secret-Beta | 20 | 4 | 0 |" in (folder / "report.md").read_text()
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")
    with (folder / "votes.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 3 * sum(len(who.trials) for who in plan.raters)
    assert {row["kind"] for row in rows} == {"pair", "repeat", "check"}


def test_results_fit_on_a_terminal_of_80_columns(
    voted: tuple[Path, Plan], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("study", "analyze", str(voted[0]), "--replicates", "200") == 0
    printed = capsys.readouterr().out
    assert "Secret-Alpha against Secret-Beta" in printed and "20 / 4 / 0" in printed and "91.7 %" in printed
    assert "Prompt alignment" in printed and "…" not in printed


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path)
    named = [f"{name}={tmp_path / 'images' / name}" for name in MODELS]
    sizes = ("--raters", "3", "--pairs", "6", "--question", "overall")
    assert run("study", "plan", *named, "-o", str(tmp_path / "two"), *sizes) == 0
    printed = capsys.readouterr().err
    assert "3 raters x 11 screens: 18 votes per model pair" in printed and "pairs of images" not in printed
    assert run("study", "plan", *named, "-o", str(tmp_path / "many"), *sizes, "--votes", "1") == 0
    assert "each is judged by up to 3 raters instead of 1" in capsys.readouterr().err
    assert run("study", "plan", *named, "-o", str(tmp_path / "two"), *sizes) == 2
    assert "never written over another" in capsys.readouterr().err
    assert run("study", "plan", *named, "-o", str(tmp_path / "three"), *sizes, "--repeats", "9") == 2
    assert "lower --repeats" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_plan_draws_shapes_models_from_the_same_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--raters", "1", "--votes", "1", "--pairs", "6", "--repeats", "0", "--checks", "0", "--per-task", "1")
    study = tmp_path / "study"
    named = ("plain=teacher-4-plain", "again=teacher-4-plain", "guided=teacher-4")
    assert run("study", "plan", *named, "-o", str(study), *sizes) == 0
    plan = read_plan(study)
    assert [prompt.task for prompt in plan.prompts] == list(SHAPES_TASKS)
    shown = {
        (model, trial.prompt): (study / IMAGES / f"{image}.png").read_bytes()
        for trial in plan.raters[0].trials
        for model, image in ((trial.left_model, trial.left), (trial.right_model, trial.right))
    }
    same = [shown["plain", k] == shown["again", k] for m, k in shown if m == "plain" and ("again", k) in shown]
    other = [shown["plain", k] == shown["guided", k] for m, k in shown if m == "plain" and ("guided", k) in shown]
    assert same and all(same) and other and not any(other)

    folder = write_images(tmp_path / "own", MODELS[0], 2)
    assert run("study", "plan", f"own={folder}", "teacher-4", "-o", str(tmp_path / "two"), *sizes) == 2
    assert f"--per-task 1 has no effect: the prompts are those of {folder}" in capsys.readouterr().err
    assert run("study", "plan", f"own={folder}", "teacher-4", "-o", str(tmp_path / "two"), *sizes[:-2]) == 2
    assert "thing" in capsys.readouterr().err  # the folder's prompts are not in the language of the Shapes world
    cfg = RunConfig(name="x", loop=LoopConfig(), model=DiffusersModel(path="a/b"), rewards=(ClipConfig(),))
    create(tmp_path / "real", cfg.model_dump(mode="json"), ["gdmd"])
    assert run("study", "plan", f"real={tmp_path / 'real'}", "teacher-4", "-o", str(tmp_path / "two"), *sizes) == 2
    real, printed = tmp_path / "real", capsys.readouterr().err
    assert f"gdmd eval preference {real} --prompts FILE, and give real={real}/preference/images" in printed
    assert not (tmp_path / "two").exists()


def test_serving_to_others_needs_a_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.delenv("GDMD_STUDY_TOKEN", raising=False)
    study, _, _ = write_study(tmp_path)
    assert run("study", "serve", str(study), "--host", "0.0.0.0") == 2
    assert "GDMD_STUDY_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("GDMD_STUDY_TOKEN", "short")
    assert run("study", "serve", str(study), "--host", "0.0.0.0") == 2
    assert "at least 16 random ones" in capsys.readouterr().err
    assert run("study", "analyze", str(study)) == 2
    assert "no votes yet" in capsys.readouterr().err


def test_simulate_prints_what_the_numbers_can_find(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--studies", "5", "--prompts", "40", "--pairs", "20", "--win-rate", "0.7", "--json")
    assert run("study", "simulate", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["mean_win_rate"] == pytest.approx(0.7, abs=0.1)
    assert (
        run("study", "simulate", "--studies", "2", "--raters", "3", "--pairs", "2", "--json") == 0
    )  # fewer than repeats
    capsys.readouterr()
    assert run("study", "simulate", "--win-rate", "1.5") == 2
    assert "win_rate" in capsys.readouterr().err


def test_simulate_with_one_rater_has_no_clustered_interval(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("study", "simulate", "--raters", "1", "--votes", "1", "--studies", "3")
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["clustered_covered"] is None
    assert run(*arguments) == 0
    assert "contains the score  no interval" in capsys.readouterr().out


def test_simulate_refuses_numbers_that_a_planned_study_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, _, _ = write_study(tmp_path)
    assert run("study", "simulate", str(study), "--studies", "2", "--raters", "40", "--pairs", "9") == 2
    assert f"--raters, --pairs: {study} has its own numbers" in capsys.readouterr().err
