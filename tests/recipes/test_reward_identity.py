"""Scorers as command-line arguments, and the hash of everything that their scores depend on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gdmd.evaluation.scorers import read_scorer, read_scorers
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.runs.assets import asset_path, load_asset, save_asset


def test_scorers_are_read_from_arguments() -> None:
    spec: Any = read_scorer("clip,path=models/clip,dtype=bf16,chunk=8")
    assert (spec.kind, spec.path, spec.dtype, spec.chunk) == ("clip", "models/clip", "bf16", 8)
    assert read_scorer("my_rewards:sharpness").label == "my_rewards:sharpness"
    with pytest.raises(ValueError, match="given twice"):
        read_scorers(["clip", "clip,dtype=bf16"])
    with pytest.raises(ValueError, match="is not a key=value"):
        read_scorer("clip,bf16")
    with pytest.raises(ValueError, match="chunk: got -1: .* greater than or equal to 0"):
        read_scorer("hps,chunk=-1")
    with pytest.raises(ValueError, match="batch: got 4: kind 'clip' has no such key, only remote$"):
        read_scorer("clip,batch=4")


def test_scorer_identity_depends_on_content_not_location(tmp_path: Path) -> None:
    shipped = load_asset(asset_path("shapes_clip"))
    place = save_asset(tmp_path / "scorer.safetensors", shipped.tensors, command="a copy", seed=0)
    spec = read_scorer(f"shapes_clip,asset={place}")
    first = scorer_identity(spec)
    moved = shutil.copy(place, tmp_path / "moved.safetensors")
    assert scorer_identity(read_scorer(f"shapes_clip,asset={moved}")) == first
    save_asset(place, {key: value * 0.5 for key, value in shipped.tensors.items()}, command="a copy", seed=0)
    assert scorer_identity(spec) != first
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        (folder / name).write_text("{}")
    arguments = [f"clip,path={folder}", f"clip,path={folder},dtype=bf16", f"pickscore,path={folder}"]
    known = [scorer_identity(read_scorer(word)) for word in arguments]
    assert len(set(known)) == 3
    assert scorer_identity(read_scorer(f"{arguments[0]},device=cuda:1,chunk=2,offload=true")) == known[0]
    (folder / "vocab.txt").write_text("[]")
    assert scorer_identity(read_scorer(arguments[0])) != known[0]


def test_scorer_identity_of_a_hub_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec, pinned = read_scorer("clip,path=org/clip"), read_scorer(f"clip,path=org/clip,revision={'a' * 40}")
    assert scorer_identity(spec) != scorer_identity(spec) and scorer_identity(pinned) == scorer_identity(pinned)
    branch = tmp_path / "models--org--clip" / "refs" / "main"
    branch.parent.mkdir(parents=True)
    branch.write_text("a" * 40)
    assert scorer_identity(spec) == scorer_identity(pinned)
    branch.write_text("b" * 40)
    assert scorer_identity(spec) != scorer_identity(pinned)
