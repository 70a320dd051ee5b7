"""Atomic writes, JSON lines and content hashes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import gdmd.io
from gdmd.io import (
    RunError,
    append_jsonl,
    content_hash,
    file_hash,
    read_json,
    read_jsonl,
    weight_variant,
    weights_fingerprint,
    write_atomic,
)


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"text": "a\u2028b", "value": 1.5}], "the rows")
    append_jsonl(path, [{"text": "c", "value": float("nan")}], "the rows")
    assert read_jsonl(path) == [{"text": "a\u2028b", "value": 1.5}, {"text": "c", "value": None}]


@pytest.mark.parametrize("tail", [b'{"b": 2', b'{"b": "\xc3', b"{", b"12"])
def test_torn_last_line(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert read_jsonl(path, torn_tail=True) == [{"a": 1}]
    with pytest.raises(RunError, match="line 2"):
        read_jsonl(path)
    path.write_bytes(tail + b'\n{"a": 1}\n')
    with pytest.raises(RunError, match="line 1"):
        read_jsonl(path, torn_tail=True)


@pytest.mark.parametrize("content", ["{", "[1]", "", '{"a": \x00}'])
def test_damaged_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"cannot read .*result\.json: .*\. Delete it\.$"):
        read_json(tmp_path / "result.json", "Delete it.")
    (tmp_path / "result.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "result.json", "") == {"a": 1}


@pytest.mark.parametrize(("tail", "kept"), [(b'{"b": 2', []), (b'{"b": 2}', [{"b": 2}])])
def test_append_after_a_torn_line(tmp_path: Path, tail: bytes, kept: list[dict[str, int]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    append_jsonl(path, [{"c": 3}], "the rows")
    assert read_jsonl(path) == [{"a": 1}, *kept, {"c": 3}]


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_write_atomic_follows_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "x", "content", "the file")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_hashes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"abc", "the file")
    assert file_hash(tmp_path / "x").startswith("ba7816bf")
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("ab", b"c") == content_hash("ab", "c")


def pipeline(folder: Path) -> Path:
    """The files of a pipeline, next to other files."""
    index = {"_class_name": "X", "unet": ["diffusers", "Y"], "tokenizer": ["transformers", "Z"], "extra": [None, None]}
    files = {
        "model_index.json": json.dumps(index),
        "unet/config.json": "{}",
        "unet/model.safetensors": "weights",
        "unet/model.fp16.safetensors": "half",
        "tokenizer/vocab.json": "{}",
        "README.md": "read me",
        "single_file.safetensors": "not read",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "unet/model.safetensors", "tokenizer/vocab.json"]
)
def test_fingerprint_notices_edits_of_same_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gdmd.io, "REMEMBERED", 0)
    monkeypatch.setattr("gdmd.io.time.time", lambda: 1e10)  # files count as settled, so every hash is remembered
    base = pipeline(tmp_path / "base")
    first = weights_fingerprint(base)
    assert weights_fingerprint(base) == first and len(list((tmp_path / "home").rglob("hashes/*"))) == 4
    file, before = base / name, (base / name).stat()
    file.write_bytes(file.read_bytes().replace(b"e", b"o").replace(b"{}", b"[]"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and weights_fingerprint(base) != first


def test_remembered_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gdmd.io, "REMEMBERED", 0)
    monkeypatch.setattr("gdmd.io.time.time", lambda: 1e10)
    base = pipeline(tmp_path / "base")
    first = weights_fingerprint(base)
    with monkeypatch.context() as patch:
        patch.setattr(gdmd.io, "file_hash", lambda path: pytest.fail(f"{path} was read again"))
        assert weights_fingerprint(base) == first


def test_fingerprint_without_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pipeline(tmp_path / "base")
    first = weights_fingerprint(base)
    monkeypatch.setattr(gdmd.io, "REMEMBERED", 0)
    monkeypatch.chdir(tmp_path)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("gdmd.io.Path.home", nowhere)
    assert weights_fingerprint(base) == first and sorted(file.name for file in tmp_path.iterdir()) == ["base"]


def test_fingerprint_covers_what_is_loaded(tmp_path: Path) -> None:
    base, moved = pipeline(tmp_path / "base"), pipeline(tmp_path / "moved")
    assert weights_fingerprint(base) == weights_fingerprint(moved)
    half = weights_fingerprint(base, "fp16")
    assert half != weights_fingerprint(base)
    for name in ("README.md", "single_file.safetensors", "unet/model.fp16.safetensors"):
        (moved / name).write_text("another")
    assert weights_fingerprint(base) == weights_fingerprint(moved) and weights_fingerprint(moved, "fp16") != half
    assert weights_fingerprint(base / "unet/config.json") != weights_fingerprint(base / "README.md")
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RunError, match="model"):
            weights_fingerprint(nothing / "empty")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
    ],
)
def test_weight_variant(name: str, variant: str | None) -> None:
    assert weight_variant(name) == variant


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027])
def test_weights_follow_the_umask(tmp_path: Path, umask: int) -> None:
    import torch

    from gdmd.runs import checkpoint
    from gdmd.runs.assets import save_asset

    before = os.umask(umask)
    try:
        asset = save_asset(tmp_path / "asset.safetensors", {"a": torch.ones(2)}, command="x", seed=0)
        saved = checkpoint.save(tmp_path, 1, {"student": {"a": torch.ones(2)}}, {})
    finally:
        os.umask(before)
    files = [asset, *saved.iterdir()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}
    assert not list(tmp_path.rglob("*.mode"))
