"""A config loads whole, or every mistake in it is listed with its path, value, reason and cure."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from fuzzing import CASES, refusal
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

import gdmd.config
from gdmd.cli.app import main
from gdmd.config import extras
from gdmd.config.base import Config, Count, Finite, NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.load import MAX_YAML_CHARS, ConfigError, dump_config, load_config
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeConfig, RemoteConfig
from gdmd.config.run import RunConfig
from gdmd.config.sweep import SweepConfig


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


Reward = Annotated[Clip | Remote, Field(discriminator="kind")]


class Loop(Config):
    steps: Count
    seed: NonNegativeCount = 0
    lr: Positive = 1e-5
    betas: tuple[Probability, Probability] = (0.9, 0.99)


class Recipe(Config):
    name: str = "unnamed"
    loop: Loop
    method: Annotated[Gdmd | Grpo, Field(discriminator="kind")] = Gdmd()
    rewards: tuple[Reward, ...] = (Clip(kind="clip"),)
    notes: dict[str, str] = {}
    folder: str | None = None


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


def test_values_are_typed_and_frozen(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    recipe = load_config(Recipe, file)
    assert recipe == load(GOOD) == load_config(Recipe, yaml.safe_load(GOOD))
    assert (recipe.loop.lr, recipe.method, recipe.rewards[0]) == (1e-5, Gdmd(gamma=0.25), Clip(kind="clip", weight=2))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_overrides_set_fields_at_any_depth() -> None:
    recipe = load(GOOD, "rewards.0.weight=-3", "loop.lr=2e-6", "notes.why=a=b", "method={kind: dmd_grpo}", "folder=x/y")
    assert recipe.rewards[0] == Clip(kind="clip", weight=-3)
    assert (recipe.loop.lr, recipe.notes, recipe.folder) == (2e-6, {"why": "a=b"}, "x/y")
    assert recipe.method == Grpo(kind="dmd_grpo")


def test_overrides_start_from_defaults() -> None:
    bare = load("{}", "loop.steps=1", "method.gamma=0", "rewards.0.weight=5", "method.group_size=8", "loop.betas.0=0.8")
    assert bare.method == Gdmd(gamma=0, group_size=8)
    assert bare.rewards == (Clip(kind="clip", weight=5),) and bare.loop.betas == (0.8, 0.99)
    assert Recipe(loop=Loop(steps=1)).method == Gdmd(), "a default is copied, not changed in place"
    tree = {"loop": {"steps": 1}}
    assert load_config(Recipe, tree, ["loop.steps=3"]).loop.steps == 3 and tree["loop"]["steps"] == 1


def test_all_errors_at_once() -> None:
    text = (
        "name: 3\nloop: {steps: 0, lr: fast, betas: [2, 0]}\nmethod: {kind: gdmd, gama: 1}\nrewards: [{kind: remote}]\n"
    )
    lines = errors_of(text, "rubbish", "name.x=1")
    for part in ("'rubbish': is not KEY=VALUE", "'name' is 3, so nothing", "name: got 3: should be text"):
        assert sum(part in line for line in lines) == 1, part
    for path in ("loop.steps", "loop.lr", "loop.betas.0", "method.gama", "rewards.0.url"):
        assert sum(line.startswith(f"recipe.yaml: {path}: ") for line in lines) == 1, path
    assert len(lines) == 8


def test_all_mistakes_between_the_fields_of_a_section_at_once() -> None:
    """This includes mistakes between sections, and those that a method's base class finds."""
    sections = {
        "model": {
            "kind": "diffusers",
            "path": "a/b",
            "full": "student",
            "quantization": "nf4",
            "student_revision": "v1",
        },
        "method": {"kind": "dmdr", "student_input": "data", "renoise_low": 0.9, "renoise_high": 0.1},
        "loop": {"batch_size": 6, "micro_batch": 4, "optimizer": "adamw8bit", "sharding": "full"},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, {"name": "x", **sections})
    starts = {"model: student_revision", "model: quantization", "method: renoise_low", "method: renoise_x0"}
    starts |= {"loop: micro_batch", "loop: optimizer", "rewards ['shapes_clip', 'shapes_pref'] judge captions"}
    found = [next((one for one in starts if line.startswith(f"config: {one}")), line) for line in caught.value.errors]
    assert len(found) == 7 and set(found) == starts
    rewards = [{"kind": "pickscore"}, {"kind": "pickscore"}]
    between = {"method": {"kind": "dmd_grpo"}, "loop": {"batch_size": 3}, "rewards": rewards, "real_data": None}
    with pytest.raises(ConfigError, match=r"^config: group size(.*)\nconfig: each reward(.*)$"):
        load_config(RunConfig, {"name": "x", **between})


def test_mistakes_within_and_between_sections_at_once() -> None:
    """With an invalid field, sections are not compared, because a mismatch may follow from that field."""
    text = "name: x\nmethod: {kind: gdmd_tilted}\nloop: {batch_size: 6, micro_batch: 4}\nrewards: []\n"
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, text)
    within, between = caught.value.errors
    assert within.startswith("config: loop: micro_batch = 4 does not divide")
    assert between == "config: method gdmd_tilted reads rewards and needs at least one under `rewards`"
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, text, ["loop.ema=2"])
    (only,) = caught.value.errors
    assert "loop.ema: got 2" in only


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nmae: x\nloop: {steps: 1}", "nmae: got 'x': unknown key; did you mean 'name'?"),
        ("loop: {steps: 1, sede: 1}", "loop.sede: got 1: unknown key; did you mean 'seed'?"),
        ("loop: {steps: 1, x: 1}", "loop.x: got 1: unknown key; known keys are: betas, lr, seed, steps"),
        (
            "loop: {steps: 1}\nrewards: [{kind: clip}, {kind: clip, wieght: 1}]",
            "rewards.1.wieght: got 1: unknown key; did you mean 'weight'?",
        ),
        ("loop: {steps: 1}\nmethod: {kind: gdmdd}", "method.kind: got 'gdmdd': unknown kind; did you mean 'gdmd'?"),
        (
            "loop: {steps: 1}\nmethod: {kind: dmd_grpo, gamma: 1}",
            "method.gamma: got 1: kind 'dmd_grpo' has no such key, only gdmd; replace the whole section: "
            "method: {kind: dmd_grpo, ...}",
        ),
        (
            "loop: {steps: 1}\nmethod: {mode: al, kind: gdmd}",
            "method.mode: got 'al': unknown value; did you mean 'all'?",
        ),
        (
            "loop: {steps: 1}\nmethod: {gamma: 1}",
            "method: the key 'kind' is missing; write {kind: ..., ...}; known kinds are: gdmd, dmd_grpo",
        ),
        ("name: x", "loop: is missing; this key is required"),
        ("loop: {steps: true}", "loop.steps: got True: input should be a valid integer"),
        ("loop: {steps: 1.0}", "loop.steps: got 1.0: input should be a valid integer"),
        ("loop: {steps: 1, lr: yes}", "loop.lr: got True: should be a number, not a boolean"),
        ("loop: {steps: 1, lr: .inf}", "loop.lr: got inf: input should be a finite number"),
        ("loop: {steps: 1, betas: [1]}", "loop.betas.1: is missing; this key is required"),
        (
            "loop:",
            "loop: got nothing (null): should be a mapping, like {betas: ...}; known keys are: betas, lr, seed, steps",
        ),
        (f"loop: {{steps: 0x{'f' * 5000}}}", "loop.steps: got a whole number of 20000 bits: "),
        ("loop: &a {steps: *a}", "loop.steps: input should be a valid integer"),
    ],
)
def test_mistake_in_a_file(text: str, line: str) -> None:
    (error,) = errors_of(text)
    assert error.startswith(f"recipe.yaml: {line}"), error


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
        ("name=[a", ["override 'name=[a'", "line 1", "put the whole argument in quotes, like 'name=[...]'"]),
        ("loop.steps=", ["loop.steps: got nothing (null)"]),
    ],
)
def test_mistake_in_an_override(override: str, parts: list[str]) -> None:
    (error,) = errors_of(GOOD, override)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty; expected 'key: value' lines"]),
        ("# only a comment\n", ["is empty"]),
        ("- 1\n- 2\n", ["got [1, 2]", "a mapping"]),
        ("recipes/shapes.yaml", ["a mapping"]),
        ("name: x\nloop: {steps: 1\n", ["line 3"]),
        ("name: x\nloop:\n\tsteps: 1\n", ["line 3", "'\\t'"]),
        ("name: x\nname: y\nloop: {steps: 1}\n", ["line 2", "duplicate key 'name'", "first on line 1"]),
        ("loop:\n  steps: 1\n  seed: 2\n  steps: 3\n", ["line 4", "duplicate key 'steps'", "first on line 2"]),
        ("loop: {steps: 1}\nname: !!python/object:os.system x\n", ["line 2", "could not determine a constructor"]),
        ("? [a]\n: 1\n", ["line 1", "unhashable"]),
        ("name: x\x07\n", ["special characters are not allowed"]),
        ("name: " + "[" * 700, ["nested too deeply"]),
        ("name: " + "9" * 5000, ["cannot be read as YAML", "4300 digits"]),
        ("name: !!int x", ["cannot be read as YAML", "'x'"]),
        ('name: "\\UFFFFFFFF"', ["cannot be read as YAML"]),
        ("name: " + "x" * MAX_YAML_CHARS, ["characters, at most"]),
        ("a: 1\n---\nb: 2\n", ["line 2", "expected a single document"]),
    ],
)
def test_text_that_is_not_a_mapping(text: str, parts: list[str]) -> None:
    (error,) = errors_of(text)
    assert error.startswith("recipe.yaml: ")
    assert all(part in error for part in parts), error


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00name")
    for path, part in [(tmp_path / "no.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")]:
        with pytest.raises(ConfigError, match=part) as caught:
            load_config(Recipe, path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="null"):
        load_config(Recipe, Path("a\0b"))


def test_merge_keys_are_not_duplicates() -> None:
    assert load_config(Loop, "<<: {steps: 1, seed: 3}\nseed: 4\n").seed == 4
    assert load("notes: &a {x: p}\nloop: {steps: 1}\nmethod: {kind: gdmd}\n").notes == {"x": "p"}


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
def test_number_types_accept_and_reject_values(kind: object, good: list[object], bad: list[object]) -> None:
    adapter: TypeAdapter[float] = TypeAdapter(kind)
    for value in good:
        assert adapter.validate_python(value) == float(value)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


def test_defaults_are_validated() -> None:
    class Wrong(Config):
        steps: Count = 0

    with pytest.raises(ConfigError, match="steps: got 0"):
        load_config(Wrong, "{}")


@pytest.mark.parametrize("path", ["1e-4", "models=v1", "a #1.txt", "2024-01-01", "2024", "a: b", "[x]", "on"])
def test_existing_path_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).touch()
    (tmp_path / "3").touch()
    text = "loop: {steps: 1}\nrewards: [{kind: remote, url: x}]"
    recipe = load(text, f"name={path}", f"rewards.0.url={path}", f"folder={path}", "loop.steps=3")
    first = recipe.rewards[0]
    assert (recipe.name, recipe.folder, recipe.loop.steps) == (path, path, 3)
    assert isinstance(first, Remote) and first.url == path


def test_dates_are_text() -> None:
    assert load("name: 2024-01-01\nloop: {steps: 1}", "folder=2024-13-45").name == "2024-01-01"


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells expand ~ at the start of a word only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    given = "loop: {steps: 1}\nname: ~/model\nrewards: [{kind: remote, url: x}]\nnotes: {why: ~/missing}"
    recipe = load(given, "rewards.0.url=~/model", "folder=~/model")
    first = recipe.rewards[0]
    assert (recipe.name, recipe.folder) == (f"{tmp_path}/model", f"{tmp_path}/model")
    assert isinstance(first, Remote) and first.url == f"{tmp_path}/model"
    assert recipe.notes["why"] == "~/missing"


SECRET = "s3cret-of-somebody"
URLS = [
    f"https://user:{SECRET}@scores.example:8766",
    f"https://{SECRET}@scores.example",
    f"https://user:{SECRET * 9}@scores.example/{'a' * 90}",  # longer than an error shows
    f"https://:{SECRET}@scores.example",
]


@pytest.mark.parametrize("url", URLS)
def test_passwords_in_urls_are_refused_and_redacted(url: str) -> None:
    """A config is written to run folders and model cards, its errors to logs."""
    with pytest.raises(ConfigError, match=r"url: got .*token_variable") as refused:
        load_config(RemoteConfig, f"{{url: '{url}', reward: clip}}", ["retires=3"])
    assert SECRET not in str(refused.value) and "://...@" in str(refused.value) and len(refused.value.errors) == 2
    with pytest.raises(ConfigError, match="parts") as refused:
        load_config(CompositeConfig, f"{{kind: composite, parts: {{reward: {{url: '{url}'}}}}}}")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("rest", ["?key=x", "/#x"])
def test_urls_with_a_query_are_refused(rest: str) -> None:
    with pytest.raises(ConfigError, match="address only"):
        load_config(RemoteConfig, f"{{url: 'http://localhost{rest}', reward: clip}}")


def test_command_line_redacts_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "sd3_gdmd", f"rewards=[{{kind: remote, reward: clip, url: '{URLS[0]}'}}]"])
    said = capsys.readouterr()
    assert "password" in said.err and SECRET not in said.out + said.err


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", "/etc/passwd", "a\\b", "", "CON:"])
def test_sweep_rows_are_file_names(name: str) -> None:
    row = {"name": name, "kind": "gdmd"}
    with pytest.raises(ConfigError, match=r"rows\.0\.name"):
        load_config(SweepConfig, {"name": "x", "base": "shapes", "headline": "x", "rows": [row]})


recipes = st.builds(
    Recipe,
    name=st.text(),
    loop=st.builds(Loop, steps=st.integers(1, 2**63 - 1), lr=st.floats(1e-300, 1e300)),
    method=st.one_of(
        st.builds(Gdmd, gamma=st.floats(0, 1e9), mode=st.sampled_from(["all", "fake", "t"])),
        st.builds(Grpo, kind=st.just("dmd_grpo"), clip=st.floats(1e-30, 1)),
    ),
    rewards=st.lists(st.builds(Remote, kind=st.just("remote"), url=st.text())).map(tuple),
    notes=st.dictionaries(st.text(), st.text()),
)


@CASES
@given(recipes)
def test_dump_loads_back_equal(recipe: Recipe) -> None:
    assert load_config(Recipe, dump_config(recipe)) == recipe


keys = st.sampled_from(["name", "loop", "steps", "method", "kind", "gamma", "rewards", "0", "nmae", "<<", "notes"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), keys)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))
fragments = st.sampled_from(list("{}[],:-?!&*|>%@`'\"#\n\t 0x_.=~<") + ["loop: ", "!!int ", "!!bool ", "&a ", "*a "])
texts = st.one_of(st.text(), st.lists(fragments).map("".join), trees.map(yaml.safe_dump), st.just(GOOD))
paths = st.lists(keys | st.text(max_size=4), min_size=1, max_size=4).map(".".join)
words = st.lists(st.text() | st.tuples(paths, texts).map("=".join), max_size=3)


@CASES
@given(texts, words)
def test_any_text_loads_or_is_a_config_error(text: str, overrides: list[str]) -> None:
    assert refusal(lambda: load(text, *overrides)) or load(dump_config(load(text, *overrides)))


def test_loading_imports_no_torch() -> None:
    code = "import sys, gdmd.config.load, gdmd.config.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_install_advice_names_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert extras.install("study") == "pip install -e '.[study]'"
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert extras.install("study") == f"pip install -e '.[study]' in {tmp_path}"
    monkeypatch.setattr(extras, "ROOT", tmp_path / "deeper")
    assert extras.install("8bit") == "pip install -e '.[8bit]' in a checkout of gdmd"


def test_every_field_is_described() -> None:
    """The configuration reference is generated from the descriptions."""
    for module in pkgutil.walk_packages(gdmd.config.__path__, "gdmd.config."):
        for name, cls in vars(importlib.import_module(module.name)).items():
            if isinstance(cls, type) and issubclass(cls, Config):
                missing = [key for key, field in cls.model_fields.items() if not field.description and key != "kind"]
                assert not missing, (name, missing)


def test_override_of_an_anchor_keeps_its_alias() -> None:
    text = """
    name: x
    loop: {}
    prompts: {file: p.txt}
    model: {kind: diffusers, path: a/b, student_lora: &lora {path: c/d}, teacher_loras: [*lora]}
    rewards: [{kind: clip}]
    """
    cfg = load_config(RunConfig, text, ["model.student_lora.weight=0.5"])
    assert isinstance(cfg.model, DiffusersModel) and cfg.model.student_lora is not None
    assert (cfg.model.student_lora.weight, cfg.model.teacher_loras[0].weight) == (0.5, 1.0)


def test_a_revision_without_its_model_is_refused() -> None:
    given = {"path": "a/b", "student_revision": "v2", "scoring_decoder_revision": "v1"}
    with pytest.raises(
        ConfigError, match=r"student_revision is set, but student is not(.*)\n(.*)scoring_decoder is not: set it"
    ):
        DiffusersModel(**given)
    assert DiffusersModel(**given, student="c/d", scoring_decoder="e/f").student_revision == "v2"
