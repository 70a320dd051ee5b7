"""An image source as one command-line argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gdmd.config.image_source import read_source, read_sources


def test_source_with_settings() -> None:
    source = read_source("lcm=models/sdxl,lora=a/b.safetensors,steps=4,guidance=0,scheduler=lcm,trained=hps+clip")
    assert (source.name, source.where, source.steps, source.guidance) == ("lcm", "models/sdxl", 4, 0.0)
    assert source.lora == "a/b.safetensors" and source.trained == ("hps", "clip")
    assert read_source("runs/mine/").name == "mine" and read_source("my run=x").slug == "my-run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,step=4", "did you mean steps"),
        ("x,steps=four", "steps: got 'four'"),
        ("x,steps=4,steps=5", "given twice"),
        ("x,guidance=-1", "guidance: got '-1'"),
        ("x,scheduler=magic", "scheduler: got 'magic'"),
        ("=x", "has no location"),
        ("x,timesteps=999+half", r"timesteps.0: got '999'|timesteps.1: got 'half'"),
        ("x,shift=0", "shift: got '0'"),
        ("x,device=gpu", "device: got 'gpu': is not a device; write cpu, cuda, cuda:1 or mps"),
        ("x,steps", "is not a key=value"),
        ("x,lora=a,b.safetensors", "'b.safetensors' is not a key=value.*needs quotes"),
    ],
)
def test_bad_source_arguments(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_source(text)


def test_an_option_may_not_differ_from_the_source() -> None:
    source = read_source("x,steps=4,checkpoint=best")
    assert source.with_options({"steps": 4, "device": "cpu", "dtype": None}).device == "cpu"
    with pytest.raises(
        ValueError, match=r"it has steps=4, but --steps 8; checkpoint=best, but --checkpoint last; give"
    ):
        source.with_options({"steps": 8, "checkpoint": "last"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/lr=1e-4", {"name": "lr=1e-4", "where": "runs/lr=1e-4"}),  # 1e-4 exists, too: the whole path wins
        ("runs/lr=1e-4/,checkpoint=best", {"name": "lr=1e-4", "where": "runs/lr=1e-4/", "checkpoint": "best"}),
        ("x=runs/lr=1e-4", {"name": "x", "where": "runs/lr=1e-4"}),
        ("lr=1e-4", {"name": "lr", "where": "1e-4"}),
        ("runs/lr=2e-4", {"name": "lr=2e-4", "where": "runs/lr=2e-4"}),  # not the name runs/lr and the place 2e-4
        ("runs/a,b Ünï", {"name": "a,b Ünï", "where": "runs/a,b Ünï"}),
        ("y=runs/a,b Ünï,checkpoint=3", {"name": "y", "where": "runs/a,b Ünï", "checkpoint": "3"}),
        ("a,steps=4", {"name": "a,steps=4", "where": "a,steps=4"}),
        ("a,steps=5", {"name": "a", "where": "a", "steps": 5}),
        ("m,lora=p,q=r.safetensors,steps=2", {"name": "m", "where": "m", "lora": "p,q=r.safetensors", "steps": 2}),
        ("x=\"not,there=1\",base='c,d',steps=3", {"name": "x", "where": "not,there=1", "base": "c,d", "steps": 3}),
        ("it's", {"name": "it's", "where": "it's"}),
    ],
)
def test_paths_with_commas_and_equals_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lr=1e-4", "1e-4", "2e-4", "runs/a,b Ünï", "a,steps=4", "it's"):
        Path(folder).mkdir(parents=True)
    Path("p,q=r.safetensors").touch()
    assert read_source(text).model_dump(exclude_unset=True) == expected


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs/a,b").mkdir(parents=True)
    found = read_source("x=~/runs/a,b,lora=~/runs/a,b,steps=2")
    assert (found.name, found.where, found.lora) == ("x", f"{tmp_path}/runs/a,b", f"{tmp_path}/runs/a,b")


def test_study_names_and_scorer_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdmd.evaluation.scorers import read_scorer
    from gdmd.study.folders import named_folders

    monkeypatch.chdir(tmp_path)
    Path("runs/lr=1e-4").mkdir(parents=True)
    Path("clip,b=1").mkdir()
    assert named_folders(["runs/lr=1e-4", "x=runs/lr=1e-4", "y=other"]) == {
        "lr=1e-4": Path("runs/lr=1e-4"),
        "x": Path("runs/lr=1e-4"),
        "y": Path("other"),
    }
    spec: Any = read_scorer("clip,path=clip,b=1")
    assert spec.path == "clip,b=1" and read_scorer('clip,path="clip,b=1"') == spec


def test_two_sources_with_one_name() -> None:
    with pytest.raises(ValueError, match="two sources are called"):
        read_sources(["a/x", "b/x"])
