"""The hub commits that a run was made with: kept in run.json, reported if nothing pins them, compared on resume."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from rich.console import Console

from gdmd.config.model import DiffusersModel
from gdmd.recipes.hub_revisions import record_commits
from gdmd.runs.run_folder import create, read_facts

OLD, NEW = "a" * 40, "b" * 40


def downloaded(cache: Path, name: str, file: str, commit: str) -> None:
    """The hub's cache after a download of ``main`` at this commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for place, text in ((folder / "refs" / "main", commit), (folder / "snapshots" / commit / file, "{}")):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def told(model: DiffusersModel, run: Path, cache: Path) -> str:
    console = Console(file=io.StringIO(), width=400)
    record_commits(model, create(run, {}), console, cache)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_unpinned_ids_are_reported(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    model = DiffusersModel(path="org/teacher", scoring_decoder="org/tiny", scoring_decoder_revision="main")
    downloaded(cache, "org/teacher", "model_index.json", OLD)
    downloaded(cache, "org/tiny", "config.json", OLD)
    said = told(model, run, cache).splitlines()
    assert said[0] == f"org/teacher is not pinned to a commit; model.revision={OLD} reproduces this run"
    assert f"model.scoring_decoder_revision={OLD}" in said[1]
    assert read_facts(run)["hub_commits"] == {"org/teacher": OLD, "org/tiny": OLD}


def test_accepted_change_updates_the_commit(tmp_path: Path) -> None:
    cache, console = tmp_path / "cache", Console(file=io.StringIO(), width=400)
    run, model = create(tmp_path / "run", {}), DiffusersModel(path="org/teacher")
    for commit in (OLD, NEW):
        downloaded(cache, "org/teacher", "model_index.json", commit)
        record_commits(model, run, console, cache)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[-1] == f"org/teacher is not pinned to a commit; model.revision={NEW} reproduces this run"
    assert read_facts(run.path)["hub_commits"] == {"org/teacher": NEW}


def test_pinned_ids_and_folders_are_silent(tmp_path: Path) -> None:
    downloaded(tmp_path / "cache", "org/teacher", "model_index.json", OLD)
    (tmp_path / "own").mkdir()
    assert told(DiffusersModel(path="org/teacher", revision=OLD), tmp_path / "pinned", tmp_path / "cache") == ""
    assert read_facts(tmp_path / "pinned")["hub_commits"] == {"org/teacher": OLD}
    assert told(DiffusersModel(path=str(tmp_path / "own")), tmp_path / "local", tmp_path / "cache") == ""
    assert "hub_commits" not in read_facts(tmp_path / "local")
