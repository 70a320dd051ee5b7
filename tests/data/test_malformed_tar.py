"""Damaged and hostile prompt archives: read, or refused with their place; nothing is written, nothing lost in silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st

from gdmd.data.prompt_files import LONGEST_PROMPT, prompts_in


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return file.getvalue()


GOOD = tar([("000.txt", b"a red ring"), ("000.png", b"\x89PNG"), ("001.json", b'{"prompt": "b", "k": 1}')])
PIECES = st.sampled_from(
    [
        b"",
        b"\0",
        b"\0" * 512,
        b"7777777",
        b"-1",
        b"\x80" + b"\xff" * 11,
        b"L",
        b"5",
        b"../../x",
        b"\xff",
        b"ustar",
        b"x" * 600,
    ]
) | st.binary(max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tar")


@CASES
@given(content=mutated([GOOD], PIECES) | st.binary() | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end]))
def test_a_tar_of_any_bytes_is_read_or_refused_and_writes_nothing(content: bytes, folder: Path) -> None:
    path = folder / "prompts.tar"
    path.write_bytes(content)
    found: list[str] = []
    refused = refusal(lambda: found.extend(prompts_in(path).texts))
    assert refused or all(0 < len(text) <= LONGEST_PROMPT for text in found)
    assert [entry.name for entry in folder.iterdir()] == ["prompts.tar"]


@CASES
@given(
    names=st.lists(
        st.sampled_from(["../../x.txt", "/etc/x.txt", "a/../../b.json", "0.txt", "0.caption", "..txt", ".txt"]),
        min_size=1,
        max_size=3,
    ),
    text=st.binary(max_size=40) | st.sampled_from([b'{"prompt": "a"}', b"a ring", b"", b"x" * 10_000, b"\xff"]),
)
def test_names_that_lead_elsewhere_write_nothing(names: list[str], text: bytes, folder: Path) -> None:
    path = folder / "prompts.tar"
    path.write_bytes(tar([(name, text) for name in names]))
    refusal(lambda: prompts_in(path))
    assert [entry.name for entry in folder.iterdir()] == ["prompts.tar"]
    assert not (folder.parent / "x.txt").exists() and not (folder.parent.parent / "x.txt").exists()
