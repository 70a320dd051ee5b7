"""Prompts in JSON arrays and WebDataset tars: read in memory, and one clear error for what is damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from gdmd.data.prompt_files import LARGEST_MEMBER, prompts_in
from gdmd.data.prompts import read_meta, read_prompts

Member = tuple[str, bytes]


def tar(path: Path, members: list[Member], links: tuple[tuple[str, str], ...] = ()) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, target in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_json_array_holds_strings_or_objects(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a ring", {"prompt": "zwei Ringe äöü", "tag": 3}], indent=1))
    assert read_prompts(path) == ("a ring", "zwei Ringe äöü")
    assert read_meta(path) == {"zwei Ringe äöü": {"prompt": "zwei Ringe äöü", "tag": 3}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file: not JSON"),
        ("[]", "is empty; it needs at least one prompt"),
        ('{"prompt": "a ring"}', "expected a JSON array .*, got dict; for one object a line use the ending .jsonl"),
        ('["a ring",\n "a cross"', "not JSON .* at line 2, column"),
        ('["a ring", 7]', 'entry 2: expected {"prompt": "..."}, got \'7\''),
        ('["a ring", " "]', "entry 2: empty line"),
        (json.dumps(["a ring", "x" * 5000]), "entry 2: 5000 characters"),
        (r'["a ring", "a\u0000"]', r"entry 2: the character U\+0000"),
    ],
)
def test_a_bad_json_array_says_which_entry(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_webdataset_tar_is_read_entry_by_entry(tmp_path: Path) -> None:
    members = [
        ("000.jpg", b"\xff\xd8 not read"),
        ("000.txt", b"a red ring\n"),
        ("a/001.caption", "zwei Ringe äöü".encode()),
        ("a/001.json", b'{"width": 512}'),
        ("b/001.json", b'{"prompt": "a cross", "width": 64}'),
        ("b/001.thumb.json", b"not a prompt"),
        ("README", b"no ending"),
    ]
    path = tar(tmp_path / "p.tar", members)
    assert read_prompts(path) == ("a red ring", "zwei Ringe äöü", "a cross")
    assert [prompt.where for prompt in prompts_in(path)][1] == "member a/001.caption"
    assert read_meta(path) == {"zwei Ringe äöü": {"width": 512}, "a cross": {"prompt": "a cross", "width": 64}}


def test_nothing_is_extracted_and_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    links = (("000.txt", "../secret.txt"), ("001.txt", "/etc/hostname"))
    path = tar(tmp_path / "in" / "p.tar", [("../../escaped.txt", b"a ring"), ("/abs.txt", b"a cross")], links)
    assert read_prompts(path) == ("a ring", "a cross")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "p.tar", "secret.txt"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no member that ends in .txt, .caption or .json"),
        ([("0.jpg", b"x")], "holds no member"),
        ([("0.txt", b"a\xff")], "member '0.txt': not UTF-8 at byte 1"),
        ([("0.txt", b"  \n")], "member 0.txt: empty line"),
        ([("0.txt", b"a"), ("0.txt", b"b")], "member '0.txt': comes twice"),
        ([("0.txt", b"x" * (LARGEST_MEMBER + 1))], f"bytes; at most {LARGEST_MEMBER}"),
        ([("0.json", b'{"caption": "a"}')], 'member 0.json: expected {"prompt": "..."}'),
        ([("0.json", b"[1")], "member 0.json: not JSON"),
    ],
)
def test_a_bad_tar_says_which_member(tmp_path: Path, members: list[Member], message: str) -> None:
    assert message in refusal(tar(tmp_path / "p.tar", members))


def test_a_truncated_tar_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    members = [(f"{k}.txt", f"prompt number {k}".encode()) for k in range(3)]
    whole = tar(tmp_path / "whole.tar", members).read_bytes()
    end = 3 * 1024
    for cut in (0, 1, 511, 512, 520, 1023, 1024, 1500, 1536, 1540, 2048, end - 512, end - 1, end, end + 100):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        assert "truncated, damaged, or no plain tar" in refusal(path), cut
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert len(read_prompts(tmp_path / "cut.tar")) == 3


def test_a_damaged_header_loses_no_prompt_in_silence(tmp_path: Path) -> None:
    path = tar(tmp_path / "p.tar", [(f"{k}.txt", b"a ring") for k in range(3)])
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 0xFF  # in the name of the second member: its checksum is wrong now
    path.write_bytes(content)
    assert "damaged header at byte 1024" in refusal(path)


def test_a_missing_tar_a_folder_and_a_text_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("a ring\n" * 200)
    (tmp_path / "folder.tar").mkdir()
    assert "no plain tar" in refusal(tmp_path / "text.tar")
    assert "cannot be read" in refusal(tmp_path / "folder.tar")
    assert "cannot be read" in refusal(tmp_path / "absent.tar")
