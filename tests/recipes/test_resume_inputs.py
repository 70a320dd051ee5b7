"""A run is resumed with the inputs it began with, or with others that the user accepted and the run shows."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_world import TINY, Gdmd, make_assets

from gdmd.cli.app import main
from gdmd.export.card import _table
from gdmd.recipes.inputs import _places, _weights
from gdmd.recipes.run_folders import config_of
from gdmd.runs import assets
from gdmd.runs.inputs import changes_of
from gdmd.runs.run_folder import open_run, read_facts, write_facts

REWARD = "rewards=[{kind: callable, target: 'own_reward:red'}]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with assets and "here": a prompt file, a reward, a teacher and a run of one step on them."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        here = folder / "here"
        here.mkdir()
        patch.chdir(here)
        patch.syspath_prepend(str(here))
        patch.delitem(sys.modules, "own_reward", raising=False)
        patch.setattr(assets, "asset_folder", lambda: make_assets(folder / "assets"))
        Path("p.txt").write_text("a red ring\na blue cross\n")
        Path("own_reward.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
        shutil.copy(make_assets(folder / "assets") / "shapes_teacher.safetensors", "teacher.safetensors")
        given = ("model.teacher=teacher.safetensors", "prompts.file=p.txt", REWARD, "loop.steps=1", "--run", "run")
        with pytest.raises(SystemExit, match="0"):
            main(["train", "shapes_smoke", *TINY, *given, "--no-eval"])
    sys.modules.pop("own_reward", None)
    return folder


@pytest.fixture
def gdmd(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gdmd:
    """The program in a copy of that folder."""
    gdmd = Gdmd(main, trained / "assets", tmp_path, monkeypatch, capsys)
    shutil.copytree(trained / "here", gdmd.folder, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(gdmd.folder))
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    return gdmd


def resume(gdmd: Gdmd, *words: str, steps: int = 2) -> str:
    """What a resume prints; its exit code comes last."""
    finished = gdmd("train", "--resume", "run", f"loop.steps={steps}", "--no-eval", *words)
    return f"{finished.err}\nexit code {finished.code}"


def edit(name: str) -> None:
    """Other content of the same kind under the same name, as a new process would read it."""
    path = Path(name)
    sys.modules.pop(path.stem, None)
    end = {".safetensors": b"\x01", ".txt": b"a red cross\n", ".py": b"\n"}[path.suffix]
    path.write_bytes(path.read_bytes()[: -1 if path.suffix == ".safetensors" else None] + end)


def test_fingerprints_are_recorded(gdmd: Gdmd) -> None:
    inputs = read_facts(Path("run"))["inputs"]
    assert set(inputs) == {"prompts.file", "model.teacher", "model.vae", "rewards.0.target"}
    assert inputs["prompts.file"]["given"] == "p.txt"
    assert all(one["fingerprint"].startswith("sha256:") and one["since"] for one in inputs.values())


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("prompts.file", "p.txt"),
        ("model.teacher", "teacher.safetensors"),
        ("rewards.0.target", "own_reward.py"),
    ],
)
def test_changed_input_must_be_accepted(gdmd: Gdmd, field: str, name: str) -> None:
    before = read_facts(Path("run"))
    edit(name)
    teacher = Path("run/grids/teacher.safetensors")
    teacher.write_bytes(b"validation images of the teacher before the change")
    said = resume(gdmd)
    assert f"error: {field}: " in said and "has different content" in said and "--accept-changes" in said
    assert said.endswith("exit code 2") and read_facts(Path("run")) == before
    assert teacher.is_file()
    assert resume(gdmd, "--accept-changes").endswith("exit code 0")
    assert not teacher.is_file()
    facts = read_facts(Path("run"))
    (change,) = facts["changes"]
    assert (change["input"], change["step"]) == (field, 1)
    assert change["was"] == before["inputs"][field] and change["now"] == facts["inputs"][field]
    if field == "prompts.file":
        assert resume(gdmd, steps=3).endswith("exit code 0")  # it is the run's own input from now on
        assert gdmd("report", "run").code == 0
        assert f"{field} changed at step 1" in Path("run/report.html").read_text()
    card = "\n".join(_table(config_of(Path("run")), facts, [], [], {}))
    assert f"| inputs changed | {field} changed at step 1" in card
    assert "| changed on resume | loop.steps: 1 -> 2, from step 1 on |" in card


def test_all_changes_at_once(gdmd: Gdmd) -> None:
    edit("p.txt")
    edit("own_reward.py")
    said = resume(gdmd)
    assert "prompts.file: " in said and "rewards.0.target: " in said


@pytest.mark.parametrize(("field", "name"), [("prompts.file", "p.txt"), ("model.teacher", "teacher.safetensors")])
def test_moved_input_needs_its_new_path(gdmd: Gdmd, field: str, name: str) -> None:
    Path("elsewhere").mkdir()
    moved = shutil.move(name, f"elsewhere/{name}")
    said = resume(gdmd)
    assert f"{field}: {name} is missing" in said and f"{field}=PATH" in said and said.endswith("exit code 2")
    said = resume(gdmd, f"{field}={moved}")
    assert f"{field} moved from {name} to {moved}; the content is the same" in said and said.endswith("exit code 0")
    assert f"{moved}" in Path("run/config.yaml").read_text()
    assert read_facts(Path("run"))["inputs"][field]["given"] == str(moved)
    shutil.copy(moved, "other" + Path(name).suffix)
    edit("other" + Path(name).suffix)
    said = resume(gdmd, f"{field}=other{Path(name).suffix}", steps=3)
    assert "has different content" in said and said.endswith("exit code 2")
    assert "other" not in Path("run/config.yaml").read_text()


def test_moved_reward_code_needs_its_new_target(gdmd: Gdmd) -> None:
    shutil.move("own_reward.py", "moved_reward.py")
    sys.modules.pop("own_reward", None)
    said = resume(gdmd)
    assert "rewards.0.target: own_reward:red is missing" in said and "rewards.0.target=PATH" in said
    said = resume(gdmd, "rewards.0.target=moved_reward.py:red")
    assert "rewards.0.target moved from own_reward:red to moved_reward.py:red" in said and said.endswith("exit code 0")
    code = Path("moved_reward.py").read_text()
    Path("other.py").write_text(code + "\n\ndef green(images, prompts):\n    return images[:, 1].mean((1, 2))\n")
    said = resume(gdmd, "rewards.0.target=other.py:green", steps=3)
    assert "other.py:green (was moved_reward.py:red) has different content" in said and said.endswith("exit code 2")


def test_run_without_fingerprints(gdmd: Gdmd) -> None:
    write_facts(Path("run"), {k: v for k, v in read_facts(Path("run")).items() if k != "inputs"})
    shutil.copy("p.txt", "q.txt")
    said = resume(gdmd, "prompts.file=q.txt")  # not known to be the same
    assert "prompts.file: q.txt (was p.txt): the run recorded no fingerprint" in said and "exit code 2" in said
    assert "cannot be checked." in said and "inputs changed" not in said and "recorded from now on" not in said
    assert "recorded no fingerprints" in resume(gdmd)
    assert "recorded no fingerprints" not in resume(gdmd, steps=3)


def test_prompts_in_another_format(gdmd: Gdmd) -> None:
    Path("p.txt").write_bytes(b"\xef\xbb\xbfa red ring\r\n\r\na blue cross")
    assert resume(gdmd).endswith("exit code 0")
    Path("p.csv").write_text("Prompts\na red ring\na blue cross\n")
    said = resume(gdmd, "prompts.file=p.csv", steps=3)
    assert "prompts.file moved from p.txt to p.csv; the content is the same" in said and said.endswith("exit code 0")
    Path("p.csv").write_text("Prompts\na blue cross\na red ring\n")  # another order draws other batches
    assert resume(gdmd, steps=4).endswith("exit code 2")


@pytest.mark.parametrize("place", ["snapshots/{}", "elsewhere/{}"])
def test_hub_id_equals_its_cache_folder(tmp_path: Path, place: str) -> None:
    commit, before = "a" * 40, {"model.path": {"given": "org/model", "fingerprint": f"commit:{'a' * 40}"}}
    folder = tmp_path / "models--org--model" / place.format(commit)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    changes = changes_of(before, {"model.path": _weights(str(folder), None)})
    assert [change.known for change in changes] == ([] if place.startswith("snapshots") else [False])
    assert all("cannot be compared with what the run has used" in str(change) for change in changes)


def test_second_stage_needs_the_same_base(gdmd: Gdmd) -> None:
    shutil.copy("teacher.safetensors", "other.safetensors")
    same = ("loop.start_from=run", "loop.seed=1", "prompts.file=p.txt")
    assert gdmd.train(*same, "model.teacher=other.safetensors", "--run", "second").code == 0  # a copy is the same
    finished = gdmd.train(*same, "--run", "third")
    assert finished.code == 0, finished.err  # the shipped one, of the same content
    edit("other.safetensors")
    finished = gdmd.train(*same, "model.teacher=other.safetensors", "--run", "fourth")
    assert finished.code == 2 and "loop.start_from=run was trained on another base model" in finished.err
    assert not Path("fourth").exists()
    assert gdmd.train(*same, "model.teacher=other.safetensors", "--run", "fifth", "--accept-changes").code == 0


def test_first_stage_without_run_json(gdmd: Gdmd) -> None:
    Path("run/run.json").unlink()
    finished = gdmd.train("loop.start_from=run", "loop.seed=1", "prompts.file=p.txt", "--run", "second")
    assert finished.code == 0, finished.err


def test_old_run_with_hub_commit(gdmd: Gdmd) -> None:
    facts = {k: v for k, v in read_facts(Path("run")).items() if k != "inputs"}
    write_facts(Path("run"), facts | {"hub_commits": {"org/model": "a" * 40}})
    run = replace(open_run(Path("run")), config={"model": {"path": "org/model"}})
    for commit, changed in (("a" * 40, False), ("b" * 40, True)):
        now = {"model.path": _weights("org/model", commit)}
        assert [change.known for change in changes_of(_places(run, now), now)] == [True] * changed


def test_changed_setting_is_refused_with_advice(gdmd: Gdmd) -> None:
    said = resume(gdmd, "loop.batch_size=4")
    assert "loop.batch_size: 2 -> 4" in said and "loop.start_from=run" in said
    assert "--resume" not in said and said.endswith("exit code 2")


def test_first_stage_may_be_removed(gdmd: Gdmd) -> None:
    own = ("loop.start_from=run", "model.teacher=teacher.safetensors", "loop.steps=1", "--run", "second")
    assert gdmd.train(*own).code == 0
    shutil.rmtree("run")
    finished = gdmd("train", "--resume", "second", "loop.steps=2", "--no-eval", "--json")
    assert finished.code == 0 and json.loads(finished.out)["step"] == 2, finished.err
