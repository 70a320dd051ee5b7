"""Which diffusers pipelines belong to the Shapes world, and what a recipe may say about one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdmd.config import shapes_pipeline
from gdmd.config.load import ConfigError, load_config
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import MARKER, is_shapes_pipeline, located, read_shapes_pipeline

CONTENT = {"family": "sd3", "command": "gdmd pretrain pipeline sd3", "seed": 0, "steps": 9, "height": 32, "width": 32}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a shipped pipeline called sd3: only its marker."""
    monkeypatch.setattr(shapes_pipeline, "PIPELINES", tmp_path)
    folder = tmp_path / "sd3"
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps(CONTENT | {"max_tokens": 7, "shapeseval": 0.5}))
    return folder


def read(*overrides: str) -> RunConfig:
    return load_config(RunConfig, "name: x\nloop: {}\nmodel: {kind: diffusers, height: 32, width: 32}", overrides)


def test_shipped_pipelines_have_names(shipped: Path) -> None:
    assert located("shapes:sd3") == str(shipped) and located("org/sd3") == "org/sd3"
    trained = read_shapes_pipeline("shapes:sd3")
    assert trained is not None and (trained.family, trained.steps, trained.max_tokens) == ("sd3", 9, 7)
    assert is_shapes_pipeline(str(shipped)) and not is_shapes_pipeline(str(shipped.parent))
    cfg = read("model.path=shapes:sd3", "model.max_tokens=7")
    assert cfg.shapes_world and cfg.model.path == "shapes:sd3" and cfg.model.location == str(shipped)


def test_unknown_name_is_one_of_all_errors(shipped: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read("model.path=shapes:sd33", "loop.stepz=3")
    assert len(raised.value.errors) == 2
    assert "'shapes:sd33' is not a shipped pipeline; did you mean 'shapes:sd3'?" in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (("model.height=1024", "model.max_tokens=7"), "set model.height=32"),
        (("model.width=48",), "set model.width=32 model.max_tokens=7"),
    ],
)
def test_settings_are_the_trained_ones(shipped: Path, overrides: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ConfigError, match="trained on the Shapes world with other settings") as raised:
        read("model.path=shapes:sd3", *overrides)
    assert str(raised.value).endswith(cure)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Invalid JSON"), ("[]", "an object"), (json.dumps(CONTENT), "max_tokens: Field required")],
)
def test_damaged_marker_is_an_error(shipped: Path, content: str, reason: str) -> None:
    (shipped / MARKER).write_text(content)
    with pytest.raises(ConfigError, match=reason) as raised:
        read(f"model.path={shipped}")
    assert str(shipped / MARKER) in str(raised.value) and "copy the pipeline again" in str(raised.value)


def test_shapes_rewards_need_a_shapes_pipeline(shipped: Path) -> None:
    read(f"model.path={shipped}", "model.max_tokens=7")
    moved = shipped.parent / "moved"
    assert not read(f"model.path={moved}").shapes_world  # the base model of a run, which --base will locate
    moved.mkdir()
    for path in ("org/sd3", str(moved)):
        with pytest.raises(ConfigError, match=r"judge captions of the Shapes world.*not a folder with shapes_pipeline"):
            read(f"model.path={path}")
