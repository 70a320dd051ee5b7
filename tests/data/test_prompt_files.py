"""Prompt files of every format, and for each mistake one clear error that names the line, entry or member."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st

from gdmd.data.prompt_files import LONGEST_PROMPT, MAX_MEMBER_BYTES, prompts_in
from gdmd.data.prompts import read_prompts

Member = tuple[str, bytes]


def tar(members: list[Member], links: tuple[tuple[str, str], ...] = ()) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, target in links:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def error(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


PARTI = """Prompt\tCategory\tChallenge\tNote
a red dog\tAnimals\tBasic\t
"G I G G L E" painted on a wall, in red\tIllustrations\tWriting & Symbols\tx
"""
"""Like PartiPrompts.tsv: cells begin with a quote but are not quoted."""
RING, CROSS = "a ring, red", "a cross; blue"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("p.txt", "a red circle \r\n  zwei Ringe äöü\nno newline", ("a red circle", "zwei Ringe äöü", "no newline")),
        ("p.TXT", "\ufeffa dog\n\n  \na cat, and a dog\n", ("a dog", "a cat, and a dog")),
        ("p.tsv", PARTI, ("a red dog", '"G I G G L E" painted on a wall, in red')),
        ("p.csv", 'Prompts,Category\n"a red dog, running",Colors\na cat,Colors\n', ("a red dog, running", "a cat")),
        ("p.CSV", '\ufeffid,caption\r\n1,"a ""big"" dog"\r\n\r\n2,"two\r\nlines"\r\n', ('a "big" dog', "two\nlines")),
        ("p.Tsv", 'text\tn\n"a dog\twith a tab"\t2\n', ("a dog\twith a tab",)),
        ("p.csv", "prompt,text\na sign,STOP\n", ("a sign",)),
        ("p.csv", "prompt,a,b\na short row\na long row,1,2,,\n", ("a short row", "a long row")),
        ("excel.csv", 'Nr;Prompt\n1;a ring, red\n2;"a cross; blue"\n', (RING, CROSS)),
        ("tabs.csv", "Prompt\tNr\na ring, red\t1\na cross; blue\t2\n", (RING, CROSS)),
        ("commas.tsv", 'Prompt,Nr\n"a ring, red",1\na cross; blue,2\n', (RING, CROSS)),
        ("one.csv", 'Prompt\n"a ring, red"\na cross; blue\n', (RING, CROSS)),
        ("p.NDJSON", '{"prompt": "a dog", "id": 1}\n{"prompt": "a cat", "id": 2}\n', ("a dog", "a cat")),
        ("p.jsonl", '{"Prompt": "not this", "prompt": "a dog"}', ("a dog",)),
        ("p.JSONL", '\ufeff{"Prompt": "a dog"}\n', ("a dog",)),
        ("p.jsonl", '{"prompt": " a\u2028b "}\n{"prompt": "c"}\n', ("a\u2028b", "c")),
        ("p.JSON", '[{"PROMPTS": "a dog"}]', ("a dog",)),
        ("p.json", '["a ring", {"prompt": "zwei Ringe äöü", "tag": 3}]', ("a ring", "zwei Ringe äöü")),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str, texts: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name).texts == texts


@pytest.mark.parametrize(
    "first",
    ["[a cat] in the snow", "text, graffiti on a wall", "a prompt, please", "{cat|dog} in rain", "7", "caption"],
)
def test_prose_is_not_taken_for_another_format(tmp_path: Path, first: str) -> None:
    (tmp_path / "p.txt").write_text(f"{first}\na ring\n")
    assert read_prompts(tmp_path / "p.txt").texts == (first, "a ring")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "is empty; it needs at least one prompt"),
        ("p.txt", "\n   \t\n", "is empty"),
        ("p.txt", "a " * 5000, f"line 1: 10000 characters; at most {LONGEST_PROMPT}"),
        ("p.txt", b"a ring\n\xff\xfe broken", "not UTF-8 at byte 7; convert it"),
        ("p.txt", "a\n\nä\0", "line 3: the character U+0000"),
        ("p.txt", "a ring\n".encode("utf-16-le"), "line 1: the character U+0000"),
        ("p.txt", "a\n\ufeffb", "line 2: the character U+FEFF"),
        ("p.txt", '{"prompt": "a ring"}\n{"prompt": "a cross"}\n', "use the extension .jsonl"),
        ("p.txt", '["a ring", "a cross"]', "use the extension .jsonl, or .json"),
        ("p.txt", "Prompt\tCategory\na ring\tBasic\n", "use the extension .csv or .tsv"),
        ("p.txt", "id,prompt\n1,a ring\n", "use the extension .csv or .tsv"),
        ("p.txt", "\nprompts\na ring\n", "or remove that line"),
        ("p.jsonl", "", "is empty"),
        ("p.jsonl", '[{"prompt": "a ring"},\n {"prompt": "a cross"}]', "use the extension .json"),
        ("p.jsonl", '{"prompt": "a ring"}\n{"prompt": ', "line 2: not JSON"),
        ("p.jsonl", '{"id": 1, "text": "a ring"}', """line 1: expected one key "prompt", got 'id', 'text'. If"""),
        ("p.jsonl", '{"prompt": 7}', "line 1: 'prompt' must be a string, got 7"),
        ("p.jsonl", '{"prompt": "a ring"}\n{"prompt": null}', "line 2: 'prompt' must be a string, got null"),
        ("p.jsonl", '{"prompt": {"en": "a ring"}}', 'line 1: \'prompt\' must be a string, got {"en": "a ring"}'),
        ("p.jsonl", '\n{"prompt": "a ring"}\n{"id": 2}', "line 3: 'prompt' must be a string, got only 'id'"),
        ("p.jsonl", '{"caption": "a ring", "text": "x"}', "name it with prompts.column=NAME"),
        ("p.jsonl", '"a ring"', "line 1: expected"),
        ("p.jsonl", '{"prompt": " "}', "line 1: the prompt is empty"),
        ("p.jsonl", json.dumps({"prompt": "x" * 10_000}), "line 1: 10000 characters"),
        ("p.jsonl", r'{"prompt": "\ud800"}', "U+D800"),
        ("p.jsonl", r'{"prompt": "a\u0000"}', "U+0000"),
        ("p.jsonl", "[" * 100_000, "line 1: cannot be read as JSON"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1: cannot be read as JSON"),
        ("p.json", "", "p.json: is empty; it needs at least one prompt"),
        ("p.json", "[]", "is empty; it needs at least one prompt"),
        ("p.json", '{"prompt": "a ring"}', "got dict; for one object per line use the extension .jsonl"),
        ("p.json", '{"prompts": ["a ring"]}', "got dict; save the array itself"),
        ("p.json", '["a ring",\n "a cross"', "at line 2, column"),
        ("p.json", '["a ring", 7]', 'entry 2: expected {"prompt": "..."}, got 7'),
        ("p.json", '["a ring", " "]', "entry 2: the prompt is empty"),
        ("p.json", json.dumps(["a ring", "x" * 5000]), "entry 2: 5000 characters"),
        ("p.json", r'["a ring", "a\u0000"]', "entry 2: the character U+0000"),
        (
            "p.csv",
            "a red dog\na blue cat\n",
            "line 1: no column is named prompt, caption or text; its columns are 'a red",
        ),
        ("p.csv", "Subject;Category\na dog;x\n", "its columns are 'Subject', 'Category'"),
        (
            "p.csv",
            "Prompt,prompt\na,b\n",
            "'Prompt' and 'prompt' could be the prompts; name it with prompts.column=NAME",
        ),
        ("p.csv", "caption,text\na,b\n", "'caption' and 'text' could be the prompts"),
        ("p.csv", "prompt,x,x\na,b,c\n", "two columns are named 'x'"),
        ("p.csv", "prompt,x\na dog\n,y\n", "line 3: the prompt is empty"),
        ("p.csv", "prompt,x\na dog, running,y\n", "line 2: 3 cells under 2 columns"),
        ("p.csv", 'prompt,x\n"two\nlines",y\n"open,y\n', "line 4: not a CSV row"),
        ("p.csv", 'prompt,x\n"a" dog,y\n', "line 2: not a CSV row"),
        ("p.csv", "prompt,x\n", "is empty; it needs at least one prompt"),
        ("p.csv", "\n\n", "is empty; it needs a header"),
        ("p.csv", "prompt\n" + "x" * 5000, "line 2: 5000 characters"),
        ("p.yaml", "prompts:\n  - a\n", "unknown extension '.yaml'; use .txt (one prompt per line), .csv, .tsv"),
        ("prompts", "a dog", "it has no extension; use .txt"),
        ("p.jsonl.gz", "", "decompress it and use .txt"),
    ],
)
def test_errors(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in error(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    for path in (tmp_path / "absent.txt", tmp_path / "absent.tar", tmp_path, tmp_path / "folder.tar"):
        assert "cannot be read" in error(path) and "check the path" in error(path)


def test_parquet_without_pyarrow(tmp_path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is not None:
        pytest.skip("pyarrow is installed")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert "reading .parquet needs pyarrow; do: pip install pyarrow" in error(tmp_path / "p.parquet")


def test_columns_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("caption,text,n\na dog,un chien,1\n")
    assert read_prompts(path, "text").meta == ({"prompt": "un chien", "caption": "a dog", "n": "1"},)
    (tmp_path / "p.jsonl").write_text('{"text": "a dog "}\n{"text": "a dog", "id": 3}\n')
    assert read_prompts(tmp_path / "p.jsonl", "text").meta == ({"prompt": "a dog"}, {"prompt": "a dog", "id": 3})
    (tmp_path / "p.json").write_text('["a ring", {"prompt": "b", "tag": 3}]')
    assert read_prompts(tmp_path / "p.json").meta == ({"prompt": "a ring"}, {"prompt": "b", "tag": 3})
    with pytest.raises(ValueError, match="has no column 'words'; its columns are 'caption', 'text', 'n'"):
        read_prompts(path, "words")
    (tmp_path / "p.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match="a .txt file has no column 'text'"):
        read_prompts(tmp_path / "p.txt", "text")


def test_the_column_of_a_tar_is_a_key_of_its_json(tmp_path: Path) -> None:
    path = tmp_path / "p.tar"
    path.write_bytes(tar([("0.txt", b"a ring"), ("0.json", b'{"long": "a red ring"}'), ("0.big.json", b" " * 2**21)]))
    assert read_prompts(path, "long").texts == ("a red ring",)
    assert read_prompts(path).texts == ("a ring",)
    path.write_bytes(tar([("0.txt", b"a ring"), ("0.caption", b"two")]))
    with pytest.raises(
        ValueError, match="member 0.json: is missing, there is only .txt, .caption; leave the column out"
    ):
        read_prompts(path, "long")


def test_an_entry_of_a_tar_whose_name_has_another_dot_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.tar").write_bytes(tar([("0.txt", b"a ring"), ("photo 1.5.txt", b"a cross")]))
    assert "member photo 1.txt: is missing, there is only .5.txt; the name of an entry" in error(tmp_path / "p.tar")


def test_teacher_prompts(tmp_path: Path) -> None:
    """Every format with columns can have them; the prompts themselves may be read from that column, too."""
    rows = [{"prompt": "a ring", "teacher_prompt": "a red ring"}, {"prompt": "a cross", "teacher_prompt": ""}]
    table = "\n".join(",".join(row.values()) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows])
    members = [("0.txt", b"a ring"), ("0.json", b'{"teacher_prompt": "a red ring"}')]
    members += [("1.json", b'{"prompt": "a cross", "teacher_prompt": ""}')]
    contents = {"p.csv": table.encode(), "p.tsv": table.replace(",", "\t").encode(), "p.tar": tar(members)}
    contents["p.json"] = json.dumps(rows).encode()
    contents["p.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = read_prompts(tmp_path / name)
        assert found.rows == tuple(rows) and found.meta == ({"prompt": "a ring"}, {"prompt": "a cross"})
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]))
    assert read_prompts(tmp_path / "one.jsonl", "teacher_prompt").rows == ({"prompt": "a red ring"},)


def test_note_names_the_column_blank_lines_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("Prompts,id\na dog,1\n,\n\na cat,2\na dog,3\n")
    assert read_prompts(path).note() == (
        f"prompt file {path}: 3 prompts; read from 'Prompts'; 2 blank lines skipped; 1 repeats an earlier prompt"
    )
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    assert read_prompts(tmp_path / "p.txt").note() == ""


# ---------------------------------------------------------------- WebDataset


def test_webdataset(tmp_path: Path) -> None:
    members = [
        ("000.jpg", b"\xff\xd8 not read"),
        ("000.txt", b"a red ring\n"),
        ("a/001.caption", "zwei Ringe äöü".encode()),
        ("a/001.json", b'{"width": 512}'),
        ("b/001.json", b'{"prompt": "a cross", "width": 64}'),
        ("b/001.thumb.json", b"not a prompt"),
        ("README", b"no extension"),
    ]
    (tmp_path / "p.tar").write_bytes(tar(members))
    found = prompts_in(tmp_path / "p.tar")
    assert found.texts == ("a red ring", "zwei Ringe äöü", "a cross")
    assert found.prompts[1].where == "member a/001.caption"
    assert found.meta == (
        {"prompt": "a red ring"},
        {"prompt": "zwei Ringe äöü", "width": 512},
        {"prompt": "a cross", "width": 64},
    )


def test_nothing_is_extracted_and_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    links = (("000.txt", "../secret.txt"), ("001.txt", "/etc/hostname"))
    path = tmp_path / "in" / "p.tar"
    path.write_bytes(tar([("../../escaped.txt", b"a ring"), ("/abs.txt", b"a cross")], links))
    assert read_prompts(path).texts == ("a ring", "a cross")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "p.tar", "secret.txt"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "has no member that ends in .txt, .caption or .json"),
        ([("0.jpg", b"x")], "has no member"),
        ([("0.txt", b"a\xff")], "member '0.txt': not UTF-8 at byte 1"),
        ([("0.txt", b"  \n")], "member 0.txt: the prompt is empty"),
        ([("0.txt", b"a"), ("0.txt", b"b")], "member '0.txt': appears twice"),
        ([("0.txt", b"x" * (MAX_MEMBER_BYTES + 1))], f"bytes; at most {MAX_MEMBER_BYTES}"),
        ([("0.json", b'{"words": "a"}')], """member 0.json: expected one key "prompt", got 'words'"""),
        ([("0.json", b"[1")], "member 0.json: not JSON"),
    ],
)
def test_bad_members(tmp_path: Path, members: list[Member], message: str) -> None:
    (tmp_path / "p.tar").write_bytes(tar(members))
    assert message in error(tmp_path / "p.tar")


GOOD = tar([(f"{k}.txt", f"prompt number {k}".encode()) for k in range(3)])
END = 3 * 1024


@pytest.mark.parametrize(
    "cut", [0, 1, 511, 512, 520, 1023, 1024, 1500, 1536, 1540, 2048, END - 512, END - 1, END, END + 100]
)
def test_truncated_tar(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.tar"
    path.write_bytes(GOOD[: END + 512])
    assert len(read_prompts(path).prompts) == 3
    path.write_bytes(GOOD[:cut])
    assert "truncated, damaged, or not an uncompressed tar" in error(path)


def test_damaged_tar(tmp_path: Path) -> None:
    content = bytearray(GOOD)
    content[1024 + 3] ^= 0xFF  # in the name of the second member, so that its checksum is wrong
    (tmp_path / "p.tar").write_bytes(content)
    assert "damaged header at byte 1024" in error(tmp_path / "p.tar")
    (tmp_path / "p.tar").write_text("a ring\n" * 200)
    assert "not an uncompressed tar" in error(tmp_path / "p.tar")


FILES = [
    ("p.tar", tar([("000.txt", b"a red ring"), ("000.png", b"\x89PNG"), ("001.json", b'{"prompt": "b", "k": 1}')])),
    ("p.jsonl", '{"prompt": "a\u2028b", "k": "\u0085"}\n{"prompt": "b", "k": [1]}\n'.encode()),
    ("p.csv", b'id,prompt\n1,"a ""big"" dog"\n'),
    ("p.txt", "a red ring\nzwei Ringe \u00e4\n\u4e00\n".encode()),
]
PIECES = st.sampled_from(
    [b"", b"\0" * 512, b"7777777", b"\x80" + b"\xff" * 11, b"../../x", b'"', b"[" * 3000]
    + [b"\n", b"\r\n\r\n", b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
)


@pytest.mark.parametrize(("name", "original"), FILES)
@CASES
@given(data=st.data())
def test_mutated_files_are_read_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, original: bytes, data: st.DataObject
) -> None:
    """Lines are never lost silently."""
    path = tmp_path_factory.getbasetemp() / name
    content = data.draw(mutated([original], PIECES | st.binary(max_size=6)))
    path.write_bytes(content)
    texts: list[str] = []
    if refusal(lambda: texts.extend(prompts_in(path).texts)):
        return
    assert all(0 < len(text) <= LONGEST_PROMPT for text in texts)
    if path.suffix in (".txt", ".jsonl"):
        lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").decode().split("\n")
        assert len(texts) == sum(bool(line.strip()) for line in lines)


BAD = {
    "p.txt": ["a\x00", "a cat", "b\x01"],
    "p.jsonl": ['{"prompt": "a cat"}', '{"prompt": 1}', "[1]", '{"prompt": ""}'],
    "q.jsonl": ["{", '{"prompt": "a cat"}', "}"],
    "p.csv": ["prompt,n", "a cat,1,2", "a dog,1", "b,c,d"],
    "t.jsonl": [
        '{"prompt": "a", "teacher_prompt": 1}',
        '{"prompt": "b"}',
        '{"prompt": "c", "teacher_prompt": "\\u0000"}',
    ],
}


@pytest.mark.parametrize(("name", "wrong"), list(zip(BAD, ((1, 3), (2, 3, 4), (1, 3), (2, 4), (1, 3)), strict=True)))
def test_all_mistakes_of_a_file_at_once(tmp_path: Path, name: str, wrong: tuple[int, ...]) -> None:
    file = tmp_path / name
    file.write_text("\n".join(BAD[name]))
    with pytest.raises(ValueError) as raised:
        read_prompts(file)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0].split(", ")[1] for line in lines] == [f"line {number}" for number in wrong]


def test_a_long_list_of_mistakes_is_cut(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\x00\n" * 12)
    with pytest.raises(ValueError) as raised:
        read_prompts(tmp_path / "p.txt")
    assert len(lines := str(raised.value).splitlines()) == 6 and lines[-1] == "and 7 more"
