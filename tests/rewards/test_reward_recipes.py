"""Rewards of real images in a recipe: kinds, composites, functions; what is logged; the program around them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdmd.cli.app import main
from gdmd.config.load import ConfigError, load_config
from gdmd.config.rewards import CallableConfig, RemoteReward
from gdmd.config.run import RunConfig
from gdmd.data.prompts import PromptStream, read_prompts
from gdmd.recipes.build_rewards import build_rewards, image_reward, require_weights, reward_stats
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.rewards.callable import CallableReward, imported
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.weights import published
from gdmd.types import PromptBatch

RECIPE = "name: x\nloop: {}\nrewards:\n"


def batch_of(count: int = 4) -> PromptBatch:
    index = torch.arange(count)
    return PromptBatch(index, tuple("abcd"[:count]), index, {}, {})


def red(images: Tensor, prompts: Any) -> Tensor:
    return images[:, 0].mean((1, 2))


def wide(images: Tensor, prompts: Any) -> Tensor:
    return 100 + 10 * images[:, 1].mean((1, 2))


def pictures() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- composite and callable


def test_a_composite_is_the_weighted_mean_of_standardized_scores_and_logs_every_part_in_its_own_units() -> None:
    parts = [
        Part(CallableReward(red, "red", True), 1.0, 0.5, 0.1),
        Part(CallableReward(wide, "wide", True), 3.0, 105, 2),
    ]
    reward, images = Composite(parts), pictures().requires_grad_()
    scores = reward.score(images, batch_of())
    r, w = red(pictures(), ()).double(), wide(pictures(), ()).double()
    torch.testing.assert_close(scores.double(), ((r - 0.5) / 0.1 + 3 * (w - 105) / 2) / 4, rtol=1e-5, atol=1e-5)
    logged = reward_stats([reward])
    assert float(logged["reward/composite/red"]) == pytest.approx(float(r.mean()))
    assert float(logged["reward/composite/wide"]) == pytest.approx(float(w.mean()))
    (slope,) = torch.autograd.grad(scores.sum(), images)
    assert reward.differentiable and (slope[:, :2] != 0).all() and (slope[:, 2] == 0).all()


def test_a_composite_does_not_score_what_a_part_does_not_score_and_is_as_differentiable_as_its_parts() -> None:
    half = CallableReward(lambda images, prompts: [1.0, float("nan"), 1.0, 1.0], "half")
    reward = Composite([Part(CallableReward(red, "red", True)), Part(half)])
    assert reward.score(pictures(), batch_of()).isnan().tolist() == [False, True, False, False]
    assert not reward.differentiable
    assert float(reward.stats()["reward/composite/half"]) == 1.0
    with pytest.raises(ValueError, match="different names"):
        Composite([Part(half), Part(half)])
    with pytest.raises(ValueError, match="weights and stds above 0"):
        Composite([Part(half, std=0.0)])


def test_a_function_is_called_with_images_and_texts_and_must_give_one_number_per_image() -> None:
    seen: list[Any] = []
    reward = CallableReward(lambda images, prompts: seen.append(prompts) or red(images, prompts), "f")
    scores = reward.score(pictures().requires_grad_(), batch_of())
    assert seen == [("a", "b", "c", "d")] and not scores.requires_grad
    with pytest.raises(ValueError, match=r"returned shape \[2\] for 4 images"):
        CallableReward(lambda images, prompts: [1, 2], "f").score(pictures(), batch_of())
    with pytest.raises(ValueError, match=r"infinite at samples \[0\]"):
        CallableReward(lambda images, prompts: [float("inf"), 0, 0, 0], "f").score(pictures(), batch_of())


def test_a_function_is_named_as_module_and_name_and_mistakes_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_rewards.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\nx = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = CallableReward.from_target("my_own_rewards:bright")
    torch.testing.assert_close(reward.score(pictures(), batch_of()), pictures().mean((1, 2, 3)))
    for target, message in (
        ("my_own_rewards", "write it as module:function"),
        ("my_own_rewards:dark", "has no 'dark'; check the name"),
        ("no_such_module:f", "cannot be imported"),
        ("my_own_rewards:x", "is of type int, not a function"),
    ):
        with pytest.raises(ValueError, match=message):
            CallableReward.from_target(target)
    sys.modules.pop("my_own_rewards")


# ---------------------------------------------------------------- recipes


def test_a_recipe_names_rewards_of_every_kind_and_keeps_their_order() -> None:
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
def test_a_wrong_reward_is_named_before_anything_is_loaded(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, RECIPE + f"  - {line}\n")


def test_rewards_are_built_from_their_configs_and_missing_weights_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    text = RECIPE + "  - {kind: callable, target: 'test_reward_recipes:red'}\n  - {kind: clip}\n  - {kind: pickscore}\n"
    monkeypatch.setitem(sys.modules, "test_reward_recipes", sys.modules[__name__])
    built = build_rewards(load_config(RunConfig, text).rewards)  # lazily: nothing is downloaded
    assert [reward.name for reward in built] == ["test_reward_recipes:red", "clip", "pickscore"]
    for kind in ("hps", "hps_v2", "imagereward", "aesthetic"):
        with pytest.raises(ValueError, match=f"reward {kind}: no converted weights in"):
            build_rewards(load_config(RunConfig, RECIPE + f"  - {{kind: {kind}}}\n").rewards)
    with pytest.raises(ValueError, match="no folder with weights"):
        build_rewards(load_config(RunConfig, RECIPE + "  - {kind: clip, path: ./missing}\n").rewards)


def test_a_remote_reward_reports_its_failures_for_the_log() -> None:
    from gdmd.rewards.remote import RemoteScorer

    reward = RemoteScorer(RemoteReward(url="http://127.0.0.1:1", reward="hps"))
    keys = {"reward/remote_hps/unscored", "reward/remote_hps/retries"}
    assert set(reward_stats([reward])) == keys
    assert set(reward_stats([Composite([Part(reward)])])) == keys


class Words:
    def encode(self, texts: Any) -> dict[str, Tensor]:
        return {"tokens": torch.tensor([[len(text)] for text in texts])}

    def null(self, count: int) -> dict[str, Tensor]:
        return {"tokens": torch.zeros(count, 1)}


def test_the_objects_of_a_jsonl_prompt_file_reach_the_rewards_with_their_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a dog", "id": 1}, {"prompt": "two cats", "id": 2}, {"prompt": "a dog", "id": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path)
    assert found.meta is not None
    stream = PromptStream([list(found.texts)], Words(), 24, seed=0, group=2, meta=[found.meta])
    batch = stream.at(0)
    assert [one["prompt"] for one in batch.meta] == list(batch.text)
    assert {one["id"] for one in batch.meta} == {1, 2, 3}  # rows of one prompt keep their own
    assert [one["id"] for one in stream.at(0, 4, 12).meta] == [one["id"] for one in batch.meta[4:12]]


# ---------------------------------------------------------------- the program


@pytest.fixture
def gdmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path / "rewards"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_list_names_every_published_reward_with_range_and_weights(gdmd: Any) -> None:
    code, printed, _ = gdmd("rewards", "list", "--json")
    rows = {row["kind"]: row for row in json.loads(printed)}
    assert code == 0 and set(rows) == {"clip", "hps", "hps_v2", "pickscore", "imagereward", "aesthetic", "ocr"}
    assert rows["hps"]["converted"] == "" and rows["clip"]["converted"] is None
    assert "HPS_v2.1_compressed.pt" in rows["hps"]["weights"] and "@" in rows["pickscore"]["weights"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewards", "check", "foo"], "unknown reward 'foo'; published ones are clip, hps"),
        (["rewards", "check", "hps"], "no converted weights in"),
        (["rewards", "check", "clip", "--record", "a", "--against", "b"], "not both"),
        (["rewards", "check", "clip", "--against", "none.json"], "cannot be read as JSON"),
        (["rewards", "convert", "hps", "none.pt"], "no such file"),
        (["rewards", "convert", "clip", "none.pt"], "needs no conversion"),
        (["rewards", "serve", "clip", "--host", "0.0.0.0"], "so a token is needed"),
        (["rewards", "serve", "no_such_kind"], "unknown kind; known are: clip, hps"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_2(gdmd: Any, words: list[str], message: str) -> None:
    code, _, printed = gdmd(*words)
    assert code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("kind", "name"), [("hps", "xswu/HPSv2@697403c78157"), ("clip", "openai/clip-vit-large-patch14@32bd64288804")]
)
def test_fetching_offline_names_the_pinned_revision_and_says_what_to_do(gdmd: Any, kind: str, name: str) -> None:
    pytest.importorskip("huggingface_hub")
    code, _, printed = gdmd("rewards", "fetch", kind)
    assert code == 2 and f"cannot fetch {name}: the hub cannot be reached (HF_HUB_OFFLINE is set)" in printed
    assert "Traceback" not in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ("{kind: clip, path: org/clip}", "org/clip"),
        ("{kind: pickscore, path: org/pick}", "org/pick"),
        ("{kind: composite, parts: [{reward: {kind: clip, path: org/clip}}]}", "org/clip"),
        ("{kind: aesthetic, path: ., clip: org/clip}", "org/clip"),
        ("{kind: ocr, path: org/ocr}", "org/ocr"),
    ],
)
def test_weights_that_cannot_be_had_are_named_before_anything_is_trained(reward: str, name: str) -> None:
    pytest.importorskip("transformers")
    cfg = load_config(RunConfig, f"{RECIPE}  - {reward}\n")
    with pytest.raises(ValueError, match=f"cannot load {name}: it is not in the cache.*HF_HUB_OFFLINE is set"):
        require_weights(cfg.rewards)


def test_weights_in_a_folder_and_rewards_without_weights_ask_nobody(tmp_path: Path) -> None:
    rewards = (
        f"  - {{kind: clip, path: '{tmp_path}'}}\n  - {{kind: shapes_clip}}\n  - {{kind: callable, target: 'a:b'}}\n"
    )
    require_weights(load_config(RunConfig, RECIPE + rewards).rewards)


@pytest.mark.parametrize(
    ("recipe", "overrides", "refused"),
    [
        ("sdxl_dmdr", ["rewards=[{kind: pickscore}]"], True),
        ("sdxl_dmdr", ["rewards=[{kind: clip}, {kind: aesthetic}]"], True),
        ("sdxl_gdmd", ["method={kind: dmd_refl}", "rewards=[{kind: pickscore}]"], True),
        ("sdxl_gdmd", ["method={kind: dmd_refl, margin: 24}", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_gdmd", ["method={kind: dmd_refl, rl_weight: 0}", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_dmdr", ["method.strategy=dpo", "rewards=[{kind: pickscore}]"], False),
        ("sdxl_dmdr", [], False),
        ("sdxl_gdmd", [], False),
    ],
)
def test_a_reward_that_lies_above_the_hinge_is_refused(recipe: str, overrides: list[str], refused: bool) -> None:
    if refused:
        with pytest.raises(ValueError, match="method.margin 0.7 is below every score of (pickscore|aesthetic)"):
            read_recipe(recipe, overrides)
    else:
        read_recipe(recipe, overrides)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith(("_gdmd", "_dmdr"))])
def test_the_rewards_of_a_real_recipe_load_as_published(name: str) -> None:
    kinds = [part.reward.kind for r in read_recipe(name).rewards if r.kind == "composite" for part in r.parts]
    kinds += [r.kind for r in read_recipe(name).rewards if r.kind != "composite"]
    assert all(kind.startswith("shapes_") or not published(kind).converted for kind in kinds)


def test_a_reward_may_be_a_function_in_a_file_or_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some where").mkdir()
    (tmp_path / "some where" / "beside.py").write_text("SCALE = 3\n")
    text = "from beside import SCALE\ndef warm(images, prompts):\n    return [SCALE] * len(images)\n"
    (tmp_path / "some where" / "own_reward.py").write_text(text)
    (tmp_path / "here_reward.py").write_text("def two(images, prompts):\n    return [2] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    index = torch.arange(2)
    images, prompts = torch.rand(2, 3, 4, 4), PromptBatch(index, ("a", "b"), index, {}, {})
    for target, label, score in (
        ("some where/own_reward.py:warm", "own_reward:warm", 3),
        ("here_reward:two", "here_reward:two", 2),
    ):
        spec = CallableConfig(target=target)
        reward = image_reward(spec, "cpu")
        assert spec.label == reward.name == label
        assert reward.score(images, prompts).tolist() == [score] * 2
    assert imported("some where/own_reward.py:warm") is imported(f"{tmp_path}/some where/own_reward.py:warm")
    with pytest.raises(ValueError, match=r"'gone.py:warm' cannot be imported \(there is no file .*gone.py\)"):
        imported("gone.py:warm")
    with pytest.raises(ValueError, match="has no 'cold'"):
        imported("some where/own_reward.py:cold")
