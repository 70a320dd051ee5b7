"""Models that cannot be downloaded or loaded give one clear message, in training and as a source of images."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import httpx
import huggingface_hub as hub
from huggingface_hub import errors

from gdmd.config.image_source import read_source
from gdmd.config.model import DiffusersModel
from gdmd.models.loading import open_family
from gdmd.sources.open import open_source

ID = "org/model"
OPEN: dict[str, Callable[[], Any]] = {
    f"model.path '{ID}'": lambda: open_family(DiffusersModel(path=ID, revision="v9")),
    f"source '{ID}'": lambda: open_source(read_source(f"{ID},revision=v9")),
}


def answer(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize("what", OPEN)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("no", response=answer(403)), "access is gated; accept its terms.*hf auth login"),
        (lambda: errors.RevisionNotFoundError("no", response=answer(404)), "it has no revision 'v9'"),
        (lambda: errors.RepositoryNotFoundError("no", response=answer(404)), "the hub has no such id"),
        (lambda: errors.RemoteEntryNotFoundError("no", response=answer(404)), "it has no file model_index.json"),
        (lambda: errors.LocalEntryNotFoundError("no"), "not in the cache, and the hub cannot be reached"),
        (lambda: errors.HfHubHTTPError("too many", response=answer(429)), r"the hub cannot be read \(too many"),
    ],
)
def test_hub_errors_say_why(
    what: str, error: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error()

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=f"^{what}.*{message}"):
        OPEN[what]()


@pytest.mark.parametrize("what", OPEN)
def test_missing_library_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, there = tmp_path / "model_index.json", importlib.util.find_spec
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(file))
    parts = dict.fromkeys(("transformer", "vae", "text_encoder", "scheduler"), ["diffusers", "Part"])
    parts |= {"tokenizer": ["transformers", "PixtralProcessor"]}
    file.write_text(json.dumps({"_class_name": "Flux2Pipeline", **parts}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else there(name))
    with pytest.raises(ValueError, match=rf"^{what}: component 'tokenizer' \(PixtralProcessor\) needs torchvision"):
        OPEN[what]()
