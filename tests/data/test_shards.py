"""Shards: rows are found again by their keys, and damage is an error and never another row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_roles import same
from torch import Tensor

from gdmd.data.shards import Shards

KEYS = ["one", "two", "three"]


def rows(keys: Sequence[str]) -> dict[str, Tensor]:
    numbers = torch.tensor([[float(len(key)), float(ord(key[1]))] for key in keys], dtype=torch.bfloat16)
    return {"embeds": numbers[:, :, None], "mask": numbers > 4}


def opened(folder: Path) -> Shards:
    return Shards(folder, "keys", "rows", "delete the file")


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    opened(tmp_path).write(KEYS, rows(KEYS))
    (file,) = tmp_path.iterdir()  # no partial file is left
    return file


def test_rows_in_any_order(shard: Path) -> None:
    shards = opened(shard.parent)
    shards.write(["four"], rows(["four"]))
    assert all(key in shards for key in [*KEYS, "four"]) and "five" not in shards
    wanted = ["four", "three", "one", "three"]
    assert same(shards.read(wanted), rows(wanted)) and same(opened(shard.parent).read(wanted), rows(wanted))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial file would stay on the full disk for good: its name contains the process id."""

    def full(tensors: object, path: Path, header: object) -> None:
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        opened(tmp_path).write(KEYS, rows(KEYS))
    assert not list(tmp_path.iterdir())


def test_flipped_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # in the mask of the last row
    shard.write_bytes(content)
    assert same(opened(shard.parent).read(KEYS[:2]), rows(KEYS[:2]))
    with pytest.raises(ValueError, match=r"damaged \(row 2 differs from what was written\); delete the file"):
        opened(shard.parent).read(KEYS)


@pytest.mark.parametrize("length", [0, 20, -1])
def test_truncated_shard(shard: Path, length: int) -> None:
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"rows .*{shard.name}: damaged \(.*delete the file"):
        opened(shard.parent)


@pytest.mark.parametrize("header", [{}, {"keys": "{"}, {"keys": '["one"]'}, {"keys": json.dumps(KEYS), "crc32": "[1]"}])
def test_header_that_does_not_fit(shard: Path, header: dict[str, str]) -> None:
    safetensors.torch.save_file(rows(KEYS), shard, header)
    with pytest.raises(ValueError, match="damaged"):
        opened(shard.parent)


def test_shard_of_an_earlier_version_has_no_checksums(shard: Path) -> None:
    safetensors.torch.save_file(rows(KEYS), shard, {"keys": json.dumps(KEYS)})
    assert same(opened(shard.parent).read(KEYS), rows(KEYS))


def test_missing_shard(shard: Path) -> None:
    shards = opened(shard.parent)
    shard.unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(no such file\); delete the file"):
        shards.read(KEYS)
    assert "one" not in opened(shard.parent)


@pytest.mark.parametrize("keys", [["four", "five"], KEYS], ids=["other keys", "the same"])
def test_concurrent_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]) -> None:
    """Another process writes just before this one does."""
    one, other = opened(tmp_path), opened(tmp_path)
    save = safetensors.torch.save_file

    def meanwhile(*arguments: object) -> None:
        monkeypatch.setattr(safetensors.torch, "save_file", save)
        other.write(keys, rows(keys))
        save(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", meanwhile)
    one.write(KEYS, rows(KEYS))
    for shards, known in ((one, KEYS), (other, keys), (opened(tmp_path), [*KEYS, *keys])):
        assert same(shards.read(known), rows(known))
    assert not list(tmp_path.glob(".*"))
