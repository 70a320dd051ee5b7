"""Which configuration continues a run: that of its folder, also when an older version wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gdmd.evaluation.run_report import report_run
from gdmd.io import RunError
from gdmd.recipes.read import read_recipe
from gdmd.recipes.run_folders import check_resumable, config_of, resumed
from gdmd.runs.run_folder import config_change_lines, create, read_facts


def older_run(tmp_path: Path) -> Path:
    """A run of a version that knew neither ``real_data`` nor ``loop.start_from``."""
    config = read_recipe("shapes_smoke", []).model_dump(mode="json")
    del config["real_data"], config["loop"]["start_from"]
    return create(tmp_path / "run", config).path


def test_new_fields_count_as_defaults(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    cfg, again = resumed(run, None, ["loop.steps=9"])
    assert cfg.real_data is None and cfg.loop.steps == 9
    assert again.config == yaml.safe_load((run / "config.yaml").read_text()) == cfg.model_dump(mode="json")


def test_new_field_with_another_value(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="loop.start_from:  -> elsewhere"):
        check_resumable(older_run(tmp_path), None, ["loop.start_from=elsewhere"])


def test_recipe_may_be_given_again_on_resume(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    assert check_resumable(run, "shapes_smoke", ["loop.steps=9"]).loop.steps == 9
    with pytest.raises(
        RunError, match=r"method.gamma: 1.0 -> 0.25\..*leave out the recipe shapes_smoke and these keys"
    ):
        check_resumable(run, "shapes_smoke", ["method.gamma=0.25"])


def test_fewer_steps_than_the_run_has_made(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    (run / "checkpoints" / "step_000008").mkdir(parents=True)
    assert check_resumable(run, None, ["loop.steps=8"]).loop.steps == 8
    with pytest.raises(RunError, match=r"loop.steps=7: .* has already trained for 8 steps\. Give more steps"):
        check_resumable(run, None, ["loop.steps=7"])


def test_nonfinite_policy_may_change(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    cfg, _ = resumed(run, None, ["loop.on_nonfinite=skip", "loop.skip_limit=99"])
    assert (cfg.loop.on_nonfinite, cfg.loop.skip_limit) == ("skip", 99)
    with pytest.raises(RunError, match="loop.lr_student"):
        check_resumable(run, None, ["loop.lr_student=1e-6"])


def test_run_json_and_report_name_what_was_changed_on_resume(tmp_path: Path) -> None:
    """The report shows the first command, which alone would give another student."""
    run = older_run(tmp_path)
    resumed(run, None, [])
    assert "config_changes" not in read_facts(run), "a field of a newer version is not a change"
    (run / "checkpoints" / "step_000008").mkdir(parents=True)
    resumed(run, None, ["loop.steps=20", "validation.images=1"])
    resumed(run, None, ["loop.steps=20", "validation.images=1"])
    found = read_facts(run)["config_changes"]
    assert [(one["key"], one["was"], one["now"], one["step"]) for one in found if one["key"] == "loop.steps"] == [
        ("loop.steps", 12, 20, 8)
    ]
    assert config_change_lines(read_facts(run)) == ["loop.steps: 12 -> 20, from step 8 on"]
    assert "<dt>changed on resume</dt><dd>loop.steps: 12 -&gt; 20, from step 8 on" in report_run(run).read_text()


def test_lora_targets_may_name_the_layers_of_an_older_version(tmp_path: Path) -> None:
    recipe = read_recipe("sd15_gdmd", ["prompts.file=words.txt"])
    run = create(tmp_path / "run", recipe.model_dump(mode="json")).path
    resumed(run, None, ["model.lora_targets=[to_q, to_k]"])
    assert config_of(run).model.lora_targets == ("to_q", "to_k")  # type: ignore[union-attr]


REMOTE = "{kind: remote, url: 'http://127.0.0.1:1', reward: clip}"


@pytest.mark.parametrize("where", ["0", "1.parts.0.reward"])
def test_reward_server_may_move(tmp_path: Path, where: str) -> None:
    composite = f"{{kind: composite, parts: [{{reward: {REMOTE.replace('clip', 'hps')}}}]}}"
    cfg = read_recipe("sd15_gdmd", ["prompts.file=words.txt", f"rewards=[{REMOTE}, {composite}]"])
    run = create(tmp_path / "run", cfg.model_dump(mode="json")).path
    own = f"rewards.{where}"
    again, _ = resumed(run, None, [f"{own}.url=https://scores.example", f"{own}.retries=9", f"{own}.on_failure=skip"])
    assert "https://scores.example" in (run / "config.yaml").read_text() and again != cfg
    for change in (f"{own}.reward=pickscore", "rewards.1.parts.0.weight=2.0"):
        with pytest.raises(RunError, match="Its value -> yours: rewards"):
            check_resumable(run, None, [change])


def test_a_resumed_run_may_say_that_its_reward_function_is_differentiable(tmp_path: Path) -> None:
    """Earlier versions stored false for every function that says so with an attribute."""
    function = "{kind: callable, target: 'mine:warm', differentiable: false}"
    cfg = read_recipe("sd15_gdmd", ["prompts.file=words.txt", f"rewards=[{function}]"])
    run = create(tmp_path / "run", cfg.model_dump(mode="json")).path
    resumed(run, None, ["rewards.0.differentiable=true"])
    assert config_of(run).rewards[0].differentiable  # type: ignore[union-attr]
    with pytest.raises(RunError, match="image_type"):
        check_resumable(run, None, ["rewards.0.image_type=tensor"])


@pytest.mark.parametrize("recipe", ["dmd", "dmd_nft", "dmdr"])
def test_baseline_of_an_older_version(tmp_path: Path, recipe: str) -> None:
    """Its fake score learned from other samples, so it would continue as a different algorithm."""
    config = read_recipe(recipe, []).model_dump(mode="json")
    assert check_resumable(create(tmp_path / "new", config).path, None).name == recipe
    del config["method"]["fake_samples"]
    older = create(tmp_path / "old", config).path
    assert config_of(older).method.kind == recipe, "it can still be sampled and exported"
    with pytest.raises(RunError, match=f"earlier version of gdmd, which trained {recipe} differently"):
        check_resumable(older, None)
