"""Atomic writes, JSON lines and content hashes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gdmd.io import RunError, append_jsonl, content_hash, file_hash, read_jsonl, write_atomic


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"text": "a\u2028b", "value": 1.5}], "the rows")
    append_jsonl(path, [{"text": "c", "value": float("nan")}], "the rows")
    assert read_jsonl(path) == [{"text": "a\u2028b", "value": 1.5}, {"text": "c", "value": None}]


@pytest.mark.parametrize("tail", [b'{"b": 2', b'{"b": "\xc3', b"{", b"12"])
def test_only_a_torn_last_line_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert read_jsonl(path, torn_tail=True) == [{"a": 1}]
    with pytest.raises(RunError, match="line 2"):
        read_jsonl(path)
    path.write_bytes(tail + b'\n{"a": 1}\n')
    with pytest.raises(RunError, match="line 1"):
        read_jsonl(path, torn_tail=True)


@pytest.mark.parametrize(("tail", "kept"), [(b'{"b": 2', []), (b'{"b": 2}', [{"b": 2}])])
def test_appending_never_joins_two_lines(tmp_path: Path, tail: bytes, kept: list[dict[str, int]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    append_jsonl(path, [{"c": 3}], "the rows")
    assert read_jsonl(path) == [{"a": 1}, *kept, {"c": 3}]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_files_are_written_with_the_users_own_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "x", "content", "the file")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_hashes_depend_on_content_and_on_where_parts_end(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"abc", "the file")
    assert file_hash(tmp_path / "x").startswith("ba7816bf")
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash("ab", b"c") == content_hash("ab", "c")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027])
def test_weights_of_an_asset_and_of_a_checkpoint_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
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
