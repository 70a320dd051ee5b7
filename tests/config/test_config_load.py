"""A config is loaded whole, or every mistake in it is listed with its place, value, reason and cure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from gdmd.config import extras
from gdmd.config.base import Config, Count, Finite, NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.load import ConfigError, dump_config, load_config


class Gdmd(Config):
    kind: Literal["gdmd"] = "gdmd"
    gamma: NonNegative = 0.5
    group_size: Count = 4
    mode: Literal["all", "fake", "t"] = "all"


class Grpo(Config):
    kind: Literal["dmd_grpo"]
    clip: Positive = 1e-4


class Clip(Config):
    kind: Literal["clip"]
    weight: Finite = 1.0


class Remote(Config):
    kind: Literal["remote"]
    url: str
    retries: int | Literal["never"] = "never"


Reward = Annotated[Clip | Remote, Field(discriminator="kind")]


class Loop(Config):
    steps: Count
    seed: NonNegativeCount = 0
    lr: Positive = 1e-5
    drop: Probability = 0.1


class Recipe(Config):
    name: str = "unnamed"
    loop: Loop
    method: Annotated[Gdmd | Grpo, Field(discriminator="kind")] = Gdmd()
    rewards: tuple[Reward, ...] = (Clip(kind="clip"),)
    notes: dict[str, str] = {}
    folder: Path | None = None


GOOD = """
name: shapes
loop: {steps: 10, lr: 1e-5}
method: {kind: gdmd, gamma: 0.25}
rewards:
  - {kind: clip, weight: 2}
  - {kind: remote, url: "http://localhost"}
"""


def load(text: str, *overrides: str) -> Recipe:
    return load_config(Recipe, text, overrides, "recipe.yaml")


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert str(caught.value).splitlines() == list(caught.value.errors)
    return str(caught.value).splitlines()


def only_error_of(text: str, *overrides: str) -> str:
    (error,) = errors_of(text, *overrides)
    return error


def test_a_good_file_becomes_typed_frozen_values(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    recipe = load_config(Recipe, file, [], str(file))
    assert recipe == load(GOOD)
    assert (recipe.loop.lr, recipe.method, recipe.rewards[0]) == (1e-5, Gdmd(gamma=0.25), Clip(kind="clip", weight=2))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_overrides_set_names_indices_and_parts_that_the_file_leaves_out() -> None:
    recipe = load(GOOD, "rewards.0.weight=-3", "loop.lr=2e-6", "notes.why=a=b", "method={kind: dmd_grpo}", "folder=x/y")
    assert recipe.rewards[0] == Clip(kind="clip", weight=-3)
    assert (recipe.loop.lr, recipe.notes, recipe.folder) == (2e-6, {"why": "a=b"}, Path("x/y"))
    assert recipe.method == Grpo(kind="dmd_grpo")
    bare = load("loop: {steps: 1}", "method.gamma=0", "rewards.0.weight=5", "method.group_size=8")
    assert bare.method == Gdmd(gamma=0, group_size=8)
    assert bare.rewards == (Clip(kind="clip", weight=5),)
    assert load("{name: x}", "loop.steps=3").loop.steps == 3
    assert Recipe(loop=Loop(steps=1)).method == Gdmd(), "a default is copied, not changed in place"


def test_every_error_is_listed_on_its_own_line_with_file_path_value_and_reason() -> None:
    text = "name: 3\nloop: {steps: 0, lr: fast, drop: 1.5}\nmethod: {kind: gdmd, gama: 1}\nrewards: [{kind: remote}]\n"
    lines = errors_of(text)
    expected = {
        "name": "got 3:",
        "loop.steps": "got 0:",
        "loop.lr": "got 'fast':",
        "loop.drop": "got 1.5:",
        "method.gama": "got 1: unknown key; did you mean 'gamma'?",
        "rewards.0.url": "is missing; this key is required",
    }
    assert len(lines) == len(expected)
    for path, reason in expected.items():
        assert any(line.startswith(f"recipe.yaml: {path}: {reason}") for line in lines), (path, lines)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nmae: x\nloop: {steps: 1}", "nmae: got 'x': unknown key; did you mean 'name'?"),
        ("loop: {steps: 1, sede: 1}", "loop.sede: got 1: unknown key; did you mean 'seed'?"),
        (
            "loop: {steps: 1}\nrewards: [{kind: clip}, {kind: clip, wieght: 1}]",
            "rewards.1.wieght: got 1: unknown key; did you mean 'weight'?",
        ),
        ("loop: {steps: 1}\nmethod: {kind: gdmdd}", "method.kind: got 'gdmdd': unknown kind; did you mean 'gdmd'?"),
        (
            "loop: {steps: 1}\nmethod: {kind: dmd_grpo, gamma: 1}",
            "method.gamma: got 1: kind 'dmd_grpo' has no such key ('gdmd' has); replace the whole section: "
            "method: {kind: dmd_grpo, ...}",
        ),
        (
            "loop: {steps: 1}\nmethod: {mode: al, kind: gdmd}",
            "method.mode: got 'al': unknown value; did you mean 'all'?",
        ),
        (
            "loop: {steps: 1}\nmethod: {gamma: 1}",
            "method: the key 'kind' is missing; write {kind: ..., ...}; known are: gdmd, dmd_grpo",
        ),
        ("name: x", "loop: is missing; this key is required"),
        ("loop: {steps: true}", "loop.steps: got True: input should be a valid integer"),
        ("loop: {steps: 1.0}", "loop.steps: got 1.0: input should be a valid integer"),
        ("loop: {steps: 1, lr: yes}", "loop.lr: got True: should be a number, not a truth value"),
        ("loop: {steps: 1, lr: .inf}", "loop.lr: got inf: input should be a finite number"),
        (
            "loop:",
            "loop: got nothing (null): should be a mapping, like {drop: ...}; known keys are: drop, lr, seed, steps",
        ),
    ],
)
def test_a_mistake_names_its_place_and_the_cure(text: str, line: str) -> None:
    assert only_error_of(text) == f"recipe.yaml: {line}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("methd.gamma=0", ["recipe.yaml (override 'methd.gamma=0'): methd", "did you mean 'method'?"]),
        ("method.gama=0", ["(override 'method.gama=0'): method.gama: got 0", "did you mean 'gamma'?"]),
        ("method.kind=gdm", ["(override 'method.kind=gdm'): method.kind: got 'gdm'", "did you mean 'gdmd'?"]),
        ("rewards.1.ulr=x", ["rewards.1.ulr: got 'x'", "did you mean 'url'?"]),
        ("method.gamma=-1", ["(override 'method.gamma=-1'): method.gamma: got -1", "greater than or equal to 0"]),
        ("rewards.2.weight=1", ["override 'rewards.2.weight=1'", "list of 2, got '2'", "index from 0 to 1"]),
        ("rewards.first.weight=1", ["got 'first'", "index from 0 to 1"]),
        ("rewards.\u00b2.weight=1", ["list of 2", "index from 0 to 1"]),
        ("loop.steps.x=1", ["'loop.steps' is 10", "set 'loop.steps' itself"]),
        ("gamma", ["override 'gamma'", "is not KEY=VALUE"]),
        ("=1", ["is not KEY=VALUE"]),
        ("loop..steps=1", ["is not KEY=VALUE"]),
        ("name=[a", ["override 'name=[a'", "line 1", "put the whole word into quotes, like 'name=[...]'"]),
        ("loop.steps=", ["loop.steps: got nothing (null)"]),
    ],
)
def test_a_wrong_override_is_named_with_its_cure(override: str, parts: list[str]) -> None:
    error = only_error_of(GOOD, override)
    assert all(part in error for part in parts), error


def test_wrong_overrides_and_wrong_values_are_listed_together() -> None:
    assert len(errors_of("loop: {steps: 0}", "rubbish", "name.x=1", "method.gama=1")) == 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty"]),
        ("# only a comment\n", ["is empty"]),
        ("- 1\n- 2\n", ["got [1, 2]", "a mapping"]),
        ("recipes/shapes.yaml", ["a mapping"]),
        ("name: x\nloop: {steps: 1\n", ["line 3"]),
        ("name: x\nloop:\n\tsteps: 1\n", ["line 3", "'\\t'"]),
        ("name: x\nname: y\nloop: {steps: 1}\n", ["line 2", "duplicate key 'name'", "first on line 1"]),
        ("loop:\n  steps: 1\n  seed: 2\n  steps: 3\n", ["line 4", "duplicate key 'steps'", "first on line 2"]),
        ("loop: &a\n  steps: *a\n", ["line 2", "contains itself"]),
        ("loop: {steps: 1}\nname: 2024-13-45\n", ["line 2", "2024-13-45"]),
        ("loop: {steps: 1}\nname: !!python/object:os.system x\n", ["line 2", "could not determine a constructor"]),
        ("? [a]\n: 1\n", ["line 1", "unhashable"]),
        ("name: x\x07\n", ["line 1", "U+0007"]),
        ("name: " + "[" * 2000, ["nested too deeply"]),
        ("a: 1\n---\nb: 2\n", ["expected a single document"]),
    ],
)
def test_text_that_is_no_mapping_is_refused_with_a_line(text: str, parts: list[str]) -> None:
    error = only_error_of(text)
    assert error.startswith("recipe.yaml: ")
    assert all(part in error for part in parts), error


def test_merge_keys_may_be_overruled_without_being_duplicates() -> None:
    text = "notes: &a {x: p, y: q}\nloop: {steps: 1}\n"
    assert load(text + "method: {kind: gdmd}\n").notes == {"x": "p", "y": "q"}
    merged = "loop: &a {steps: 1, seed: 3}\n"
    assert load_config(Loop, "<<: {steps: 1, seed: 3}\nseed: 4\n").seed == 4
    assert load(merged + "notes: {}\n").loop.seed == 3


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00name")
    for path, part in [(tmp_path / "no.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")]:
        with pytest.raises(ConfigError, match=part) as caught:
            load_config(Recipe, path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="not a path"):
        load_config(Recipe, Path("a\0b"))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, [1, 7], [0, -1, True, 1.0, "1", 2**63, None]),
        (NonNegativeCount, [0, 7], [-1, False, 0.0, "0"]),
        (Positive, [1e-9, 3, "1e-5"], [0, -1.0, True, float("nan"), float("inf"), "fast"]),
        (NonNegative, [0, "1e-5"], [-1e-9, False, float("inf")]),
        (Probability, [0, 1, 0.5], [-0.1, 1.1, True, float("nan")]),
        (Finite, [-1, "-1e3"], [True, float("-inf"), "x"]),
    ],
)
def test_number_types_take_what_they_say_and_nothing_else(kind: object, good: list[object], bad: list[object]) -> None:
    adapter: TypeAdapter[float] = TypeAdapter(kind)
    for value in good:
        assert adapter.validate_python(value) == float(value)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


def test_a_wrong_default_is_an_error_too() -> None:
    class Wrong(Config):
        steps: Count = 0

    with pytest.raises(ConfigError, match="steps: got 0"):
        load_config(Wrong, "{}")


recipes = st.builds(
    Recipe,
    name=st.text(),
    loop=st.builds(Loop, steps=st.integers(1, 2**63 - 1), lr=st.floats(1e-300, 1e300), drop=st.floats(0, 1)),
    method=st.one_of(
        st.builds(Gdmd, gamma=st.floats(0, 1e9), mode=st.sampled_from(["all", "fake", "t"])),
        st.builds(Grpo, kind=st.just("dmd_grpo"), clip=st.floats(1e-30, 1)),
    ),
    rewards=st.lists(st.builds(Remote, kind=st.just("remote"), url=st.text(), retries=st.integers(0, 9))).map(tuple),
    notes=st.dictionaries(st.text(), st.text()),
)


@given(recipes)
def test_what_is_dumped_loads_back_equal(recipe: Recipe) -> None:
    assert load_config(Recipe, dump_config(recipe)) == recipe


@pytest.mark.parametrize("path", ["1e-4", "models=v1", "a #1.txt", "2024-01-01", "a: b", "[x]", "on"])
def test_an_existing_path_is_taken_as_it_is_by_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).touch()
    (tmp_path / "3").touch()
    text = "loop: {steps: 1}\nrewards: [{kind: remote, url: x}]"
    recipe = load(text, f"name={path}", f"rewards.0.url={path}", f"notes.why={path}", "loop.steps=3")
    first = recipe.rewards[0]
    assert (recipe.name, recipe.notes["why"], recipe.loop.steps) == (path, path, 3)
    assert isinstance(first, Remote) and first.url == path


def test_a_path_below_the_home_folder_is_found_where_no_shell_has_expanded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    given = "loop: {steps: 1}\nname: ~/model\nrewards: [{kind: remote, url: x}]\nnotes: {why: ~/missing}"
    recipe = load(given, "rewards.0.url=~/model", "folder=~/model")
    first = recipe.rewards[0]
    assert (recipe.name, recipe.folder) == (f"{tmp_path}/model", tmp_path / "model")
    assert isinstance(first, Remote) and first.url == f"{tmp_path}/model"
    assert recipe.notes["why"] == "~/missing"


keys = st.sampled_from(
    ["name", "loop", "steps", "lr", "method", "kind", "gamma", "rewards", "0", "nmae", "<<", "notes"]
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), keys)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
fragments = st.sampled_from(
    list("{}[],:-?!&*|>%@`'\"#\n\t 0x_.=~<") + ["loop: ", "!!int ", "!!timestamp ", "&a ", "*a "]
)
texts = st.one_of(st.text(), st.lists(fragments).map("".join), trees.map(yaml.safe_dump), st.just(GOOD))
paths = st.lists(keys | st.text(max_size=4), min_size=1, max_size=4).map(".".join)
overrides_given = st.lists(st.text() | st.tuples(paths, texts).map("=".join), max_size=3)


@given(texts, overrides_given)
def test_garbage_gives_a_config_or_a_config_error_and_nothing_else(text: str, overrides: list[str]) -> None:
    try:
        recipe = load(text, *overrides)
    except ConfigError as error:
        assert error.errors and all(line and "\n" not in line for line in error.errors)
    else:
        assert load(dump_config(recipe)) == recipe


def test_loading_a_config_imports_no_torch() -> None:
    code = "import sys, gdmd.config.load, gdmd.config.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_optional_libraries_are_installed_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert extras.install("study") == "pip install -e '.[study]'"
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert extras.install("study") == f"pip install -e '.[study]' in {tmp_path}"
    monkeypatch.setattr(extras, "ROOT", tmp_path / "deeper")
    assert extras.install("8bit") == "pip install -e '.[8bit]' in a checkout of gdmd"
