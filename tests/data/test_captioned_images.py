"""Folders and tars of captioned images: what is read, what is reported, what is an error."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from tiny_images import png

from gdmd.data.captioned_images import Captioned, Unusable, captioned_images, pixels


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return file.getvalue()


GOOD = tar([("a.png", png(1)), ("a.txt", b"one"), ("b.json", b'{"caption": "two"}'), ("b.png", png(2))])


def found(source: Path) -> list[Captioned | Unusable]:
    return list(captioned_images(source))


def read(source: Path) -> list[tuple[str, int]]:
    """(caption, red) of what can be used."""
    return [(f.caption, int(pixels(f.content, 8, 8)[0, 0, 0])) for f in found(source) if isinstance(f, Captioned)]


def test_folder_table_and_tar_give_the_same_images(tmp_path: Path) -> None:
    siblings, listed = tmp_path / "siblings" / "deep", tmp_path / "listed"
    for folder in (siblings, listed):
        folder.mkdir(parents=True)
        for name, red in (("a", 1), ("b", 2)):
            (folder / f"{name}.png").write_bytes(png(red))
    (siblings / "a.txt").write_text("one\n")
    (siblings / "b.txt").write_text("two")
    lines = ['{"file_name": "a.png", "text": "one"}', '{"file_name": "b.png", "text": "two"}']
    (listed / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.tar").write_bytes(GOOD)
    wanted = [("one", 1), ("two", 2)]
    assert read(tmp_path / "siblings") == read(listed) == read(tmp_path / "t.tar") == wanted


def test_images_without_captions_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.tar").write_bytes(tar([("x/b.png", png(2)), ("x/c.png", png(2)), ("x/c.txt", b" ")]))
    assert found(tmp_path)[0] == Unusable("a.png", "has no caption a.txt")
    first, second = found(tmp_path / "t.tar")
    assert "t.tar/x/b.png" in str(first) and "no caption" in str(first) and "empty" in str(second)


def test_images_in_a_tar_whose_name_has_another_dot_are_reported(tmp_path: Path) -> None:
    """Their entry, up to the first dot, has no image; x.mask.png next to x.png is not an image to train on."""
    lost = [("a.1.5.png", png(1)), ("a.1.5.txt", b"one"), ("._a.png", b"")]
    (tmp_path / "t.tar").write_bytes(tar([*lost, ("x.png", png(2)), ("x.mask.png", png(3)), ("x.txt", b"two")]))
    first, second = found(tmp_path / "t.tar")
    assert first == Unusable("t.tar/a.1.5.png", "has another dot in its name; rename it")
    assert isinstance(second, Captioned) and second.caption == "two"


def test_file_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "one"}')
    with pytest.raises(ValueError, match="is outside the folder"):
        found(tmp_path / "d")


def test_tars_are_not_extracted_and_truncated_ones_are_errors(tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    (inner / "t.tar").write_bytes(tar([("../../x.png", png(1)), ("../../x.txt", b"one")]))
    assert read(inner / "t.tar") == [("one", 1)]
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "t.tar"]
    (inner / "t.tar").write_bytes(GOOD[:1600])
    with pytest.raises(ValueError, match="truncated, damaged"):
        found(inner / "t.tar")


def test_several_tars_in_one_file_are_an_error(tmp_path: Path) -> None:
    """Readers of tars stop at the end of the first one."""
    (tmp_path / "t.tar").write_bytes(GOOD + GOOD)
    with pytest.raises(ValueError, match="data after the end mark at byte 4096"):
        found(tmp_path / "t.tar")


def test_linked_folders_and_hidden_files(tmp_path: Path) -> None:
    """A folder may have other caption files, links (one to its parent), and hidden files of macOS and notebooks."""
    images = tmp_path / "images"
    (images / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (images / "link").symlink_to(tmp_path / "far")
    (images / "loop").symlink_to(images)
    for place in ("a.png", "b.png", "._a.png", ".ipynb_checkpoints/a.png", "link/c.png"):
        (images / place).write_bytes(png(3))
    (images / "a.caption").write_text("one")
    (images / "b.json").write_text('{"prompt": "two"}')
    (images / "link/c.txt").write_text("three")
    assert read(images) == [("one", 3), ("two", 3), ("three", 3)] and len(found(images)) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text,note\na.png,"one, red",x\n'),
        ("metadata.csv", '\ufefffile_name,text\na.png,"one, red",\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "one, red"}\n'),
        ("metadata.jsonl", '\ufeff{"file_name": "a.png", "text": "one, red"}\n\n'),
    ],
)
def test_tables_in_practice(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / name).write_text(content)
    assert read(tmp_path) == [("one, red", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", "{", "line 1: "),
        ("metadata.jsonl", '{"text": "one"}', 'line 1: expected "file_name" and "text"'),
        ("metadata.csv", 'file_name,text\n"a', "not a CSV file in UTF-8"),
        ("metadata.csv", "file_name,text\na.png,one, red\n", "line 2: more cells than columns"),
    ],
)
def test_malformed_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.tar.gz", "unpack other archives"),
        ("nowhere", "does not exist; check the path"),
        ("shards-*.tar", "patterns are not expanded: list the files"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        found(tmp_path / name)


@CASES
@given(content=mutated([GOOD], st.binary(max_size=6) | st.just(b"\0" * 512) | st.just(b"\xff" * 12)))
def test_mutated_tars_are_read_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.tar"
    file.write_bytes(content)
    refusal(lambda: found(file))
