"""Rewards in recipes: configs, building, weights that are missing, functions, and the ``gdmd rewards`` commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_rewards import prompt_batch, random_images

from gdmd.cli.app import main
from gdmd.config.load import ConfigError, load_config
from gdmd.config.rewards import CallableConfig
from gdmd.config.run import RunConfig
from gdmd.recipes.build_rewards import build_rewards, image_reward, require_weights
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.user_code import imported
from gdmd.rewards.weights import pretrained_weights

RECIPE = "name: x\nloop: {}\nrewards:\n"
PROMPTS = prompt_batch("abcd")


def specs(*rewards: str) -> Any:
    return load_config(RunConfig, RECIPE + "".join(f"  - {reward}\n" for reward in rewards)).rewards


def test_rewards_of_every_kind_in_order() -> None:
    text = RECIPE + (
        "  - {kind: shapes_clip}\n  - {kind: clip, path: models/clip, dtype: bf16, offload: true}\n"
        "  - {kind: remote, url: 'http://127.0.0.1:1', reward: hps}\n"
        "  - {kind: composite, parts: [{reward: {kind: hps}, weight: 2, std: 0.03},"
        " {reward: {kind: callable, target: 'a.b:c'}}]}\n"
    )
    cfg = load_config(RunConfig, text)
    assert [reward.label for reward in cfg.rewards] == ["shapes_clip", "clip", "remote hps", "composite"]
    again = load_config(RunConfig, text, ["rewards.1.chunk=4", "rewards.3.parts.0.weight=5"])
    assert again.rewards[1].chunk == 4 and again.rewards[3].parts[0].weight == 5  # type: ignore[union-attr]
    assert RunConfig.model_validate(cfg.model_dump(mode="json")) == cfg


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{kind: clipp}", "clip"),
        ("{kind: clip, dtypo: bf16}", "dtypo"),
        ("{kind: callable, target: no_colon}", "target"),
        ("{kind: remote, url: 'ftp://x', reward: a}", "url"),
        ("{kind: composite, parts: []}", "parts"),
        ("{kind: composite, parts: [{reward: {kind: hps}}, {reward: {kind: hps}}]}", "a part once"),
        ("{kind: composite, parts: [{reward: {kind: hps}, std: 0}]}", "std"),
        ("{kind: clip}\n  - {kind: clip}", "listed once"),
    ],
)
def test_wrong_configs_are_errors(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        specs(line)


def test_building_loads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    built = build_rewards(specs("{kind: callable, target: 'operator:add'}", "{kind: clip}", "{kind: pickscore}"))
    assert [reward.name for reward in built] == ["operator:add", "clip", "pickscore"]
    for kind in ("hps", "hps_v2", "imagereward", "aesthetic", "hpsv3"):
        with pytest.raises(ValueError, match=f"reward {kind}: no converted weights in"):
            build_rewards(specs(f"{{kind: {kind}}}"))
    with pytest.raises(ValueError, match="not a folder with weights"):
        build_rewards(specs("{kind: clip, path: ./missing}"))


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ("{kind: clip, path: org/clip}", "org/clip"),
        ("{kind: pickscore, path: org/pick}", "org/pick"),
        ("{kind: composite, parts: [{reward: {kind: clip, path: org/clip}}]}", "org/clip"),
        ("{kind: aesthetic, path: ., clip: org/clip}", "org/clip"),
        ("{kind: ocr, path: org/ocr}", "org/ocr"),
        ("{kind: geneval2, path: org/vlm}", "org/vlm"),
    ],
)
def test_missing_weights_are_reported_before_training(reward: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot load {name}: it is not in the cache.*HF_HUB_OFFLINE is set"):
        require_weights(specs(reward))


def test_no_weights_are_required_of_folders_and_functions(tmp_path: Path) -> None:
    require_weights(
        specs(f"{{kind: clip, path: '{tmp_path}'}}", "{kind: shapes_clip}", "{kind: callable, target: 'a:b'}")
    )


REFL = "method={kind: dmd_refl"


@pytest.mark.parametrize(
    ("recipe", "overrides", "refused"),
    [
        ("sdxl_dmdr", ["rewards=[{kind: pickscore}]"], True),
        ("sdxl_dmdr", ["rewards=[{kind: clip}, {kind: aesthetic}]"], True),
        ("sdxl_gdmd", [REFL + "}", "rewards=[{kind: pickscore}]"], True),
        ("sdxl_gdmd", [REFL + ", margin: 24}", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_gdmd", [REFL + ", rl_weight: 0}", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_dmdr", ["method.strategy=dpo", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_dmdr", [], False),
        ("sdxl_gdmd", [], False),
    ],
)
def test_rewards_above_the_hinge_are_an_error(recipe: str, overrides: list[str], refused: bool) -> None:
    if refused:
        with pytest.raises(ValueError, match="method.margin 0.7 is below every score of (pickscore|aesthetic)"):
            read_recipe(recipe, overrides)
    else:
        read_recipe(recipe, overrides)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith(("_gdmd", "_dmdr"))])
def test_shipped_recipes_need_no_conversion(name: str) -> None:
    rewards = read_recipe(name).rewards
    kinds = [part.reward.kind for reward in rewards if reward.kind == "composite" for part in reward.parts]
    kinds += [reward.kind for reward in rewards if reward.kind != "composite"]
    assert all(kind.startswith("shapes_") or not pretrained_weights(kind).converted for kind in kinds)


# ---------------------------------------------------------------- functions


def test_a_function_gets_images_and_texts_without_gradient() -> None:
    seen: list[Any] = []
    reward = CallableReward(lambda images, prompts: seen.append(prompts) or images.mean((1, 2, 3)), "f")
    assert not reward.score(random_images().requires_grad_(), PROMPTS).requires_grad
    assert seen == [["a", "b", "c", "d"]]


def test_functions_in_files_and_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some where").mkdir()
    (tmp_path / "some where" / "neighbor.py").write_text("SCALE = 3\n")
    text = "from neighbor import SCALE\ndef warm(images, prompts):\n    return [SCALE] * len(images)\n"
    (tmp_path / "some where" / "own_reward.py").write_text(text)
    (tmp_path / "here_reward.py").write_text("def two(images, prompts):\n    return [2] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    for target, label, score in (
        ("some where/own_reward.py:warm", "own_reward:warm", 3),
        ("here_reward:two", "here_reward:two", 2),
    ):
        spec = CallableConfig(target=target)
        reward = image_reward(spec, "cpu")
        assert spec.label == reward.name == label
        assert reward.score(torch.rand(4, 3, 4, 4), PROMPTS).tolist() == [score] * 4
    assert imported("some where/own_reward.py:warm") is imported(f"{tmp_path}/some where/own_reward.py:warm")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("statistics", "write it as module:function"),
        ("statistics:meen", r"has no 'meen'; did you mean 'mean'"),
        ("statistics:zzzz", "has no 'zzzz'; check the name"),
        ("no_such_module:f", "cannot be imported"),
        ("math:pi", "is of type float, which cannot be called"),
        ("gone.py:warm", r"'gone.py:warm' cannot be imported \(there is no file .*gone.py\)"),
    ],
)
def test_functions_that_cannot_be_imported_are_errors(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported(target)


# ---------------------------------------------------------------- commands


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["rewards", *words])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_list_has_every_pretrained_reward(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    code, printed, _ = run(capsys, "list", "--json")
    rows = {row["kind"]: row for row in json.loads(printed)}
    assert code == 0 and set(rows) == {
        "clip",
        "hps",
        "hps_v2",
        "pickscore",
        "imagereward",
        "aesthetic",
        "hpsv3",
        "geneval2",
        "ocr",
    }
    assert rows["hps"]["converted"] == "" and rows["clip"]["converted"] is None
    assert "HPS_v2.1_compressed.pt" in rows["hps"]["weights"] and "@" in rows["pickscore"]["weights"]


OFFLINE = "the hub cannot be reached (HF_HUB_OFFLINE is set)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "foo", "x.pt"], "unknown reward 'foo'; known rewards are clip, hps"),
        (["convert", "hps", "none.pt"], "no such file"),
        (["convert", "clip", "none.pt"], "needs no conversion"),
        (["serve", "clip", "--host", "0.0.0.0"], "so a token is needed"),
        (["serve", "no_such_kind"], "unknown kind; known values are: clip, hps"),
        (["fetch", "hps"], f"cannot fetch xswu/HPSv2@697403c78157: {OFFLINE}"),
        (["fetch", "clip"], f"cannot fetch openai/clip-vit-large-patch14@32bd64288804: {OFFLINE}"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    code, _, printed = run(capsys, *words)
    assert code == 2 and message in printed and "Traceback" not in printed
