"""Uploads to a local stand-in for the Hub: the same bytes arrive, errors say what to do, no message has the token."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants
from upload_hub import LARGE, TOKEN, UploadHub, account, logged_in

from gdmd.export.upload import check_hub_target, check_repo_id, push_checkpoint, push_to_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[UploadHub]]:
    """A hub in tmp_path/hub, to which this process is logged in."""
    with logged_in(tmp_path / "hub", monkeypatch) as state:
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export: small and large files, one in a folder, one that is unfinished."""
    export = tmp_path / "export"
    (export / "scheduler").mkdir(parents=True)
    (export / "README.md").write_text("---\nlicense: mit\n---\n# A student\n")
    (export / "weights.safetensors").write_bytes(bytes(range(256)) * (LARGE // 128))
    (export / "scheduler" / "scheduler_config.json").write_text("{}")
    (export / "weights.partial").write_bytes(b"unfinished")
    return export


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def refused(call: str, folder: Path, repo_id: str = "me/student", token: str | None = None) -> str:
    """The message of an upload or a check that fails. Its traceback, with all causes, has no token."""
    with pytest.raises(ValueError) as caught:
        push_to_hub(folder, repo_id, token=token) if call == "push" else check_hub_target(repo_id, token)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(secret in shown for secret in (TOKEN, TOKEN[3:], token or TOKEN))
    return str(caught.value)


def test_uploaded_bytes(hub: type[UploadHub], folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "hub" / "me" / "student"
    assert push_to_hub(folder, "me/student", private=True) == f"{constants.ENDPOINT}/me/student"
    wanted = content(folder)
    del wanted["weights.partial"]
    assert content(there) == wanted
    assert json.loads((there / ".asked.json").read_text())["visibility"] == "private"
    assert len(hub.large) == 1


def test_existing_repository_keeps_its_other_files(hub: type[UploadHub], folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "hub" / "team" / "student"
    there.mkdir(parents=True)
    (there / "theirs.txt").write_text("kept")
    check_hub_target("team/student")
    push_to_hub(folder, "team/student")
    before = sum(line.startswith("PUT") for line in hub.asked)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another text\n")
    push_to_hub(folder, "team/student")
    assert content(there)["theirs.txt"] == b"kept" and b"Another text" in content(there)["README.md"]
    assert before == 1 == sum(line.startswith("PUT") for line in hub.asked), (
        "large files that are there are not sent again"
    )


def test_only_the_newest_checkpoint_is_on_the_hub(hub: type[UploadHub], tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "hub" / "me" / "run"
    for step in (1, 2):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step}" / "student.safetensors").write_bytes(bytes([step]) * 2 * LARGE)
    (run / "config.yaml").write_text("name: x\n")
    (run / "notes.txt").write_text("not needed to resume")
    for step in (1, 2):
        push_checkpoint(run / "checkpoints" / f"step_{step}", "me/run")
    files = {"config.yaml", "checkpoints/step_2/student.safetensors"}
    assert content(there) == {name: (run / name).read_bytes() for name in files}


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/create", 401, "does not accept the token"),
        ("/create", 403, "the token cannot write there"),
        ("/preupload", 403, "the token cannot write there"),
        ("/commit", 409, "changed during the upload"),
        ("/commit", 500, "the Hub answered 500"),
        ("/storage", 403, "the token cannot write there"),
    ],
)
def test_refused_uploads(hub: type[UploadHub], folder: Path, where: str, status: int, words: str) -> None:
    hub.answers[where] = status
    assert words in refused("push", folder)


def test_check_before_training(hub: type[UploadHub], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hub_target("me/student")
    assert "me is not a member of someone; use one of me, team" in refused("check", folder, "someone/student")
    hub.account = account(org_role="read")
    assert "me can only read from team" in refused("check", folder, "team/student")
    hub.account = account(role="read")
    assert "the token is read-only" in refused("check", folder)
    assert "does not accept the token" in refused("check", folder, token="hf_another")
    assert "a space or a special character" in refused("check", folder, token="hf_two\nlines")
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in; run `hf auth login`" in refused("check", folder)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in refused("check", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("check", folder)
    assert not any("create" in line for line in hub.asked)


@pytest.mark.parametrize(
    "wrong", ["student", "me/a/b", "me/with space", "me/" + "x" * 97, "", "https://hf.co/me/student"]
)
def test_wrong_ids(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not a hub id|is an address; give me/student"):
        check_repo_id(wrong)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder with files"):
        push_to_hub(tmp_path, "me/student")
