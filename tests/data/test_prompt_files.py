"""Prompt files by their ending: tables, JSON and WebDataset tars, and one clear error for what is damaged."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest

from gdmd.data.prompt_files import LARGEST_MEMBER, prompts_in
from gdmd.data.prompts import read_prompts

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
    assert read_prompts(path).texts == ("a ring", "zwei Ringe äöü")
    assert read_prompts(path).meta == ({"prompt": "a ring"}, {"prompt": "zwei Ringe äöü", "tag": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file: not JSON"),
        ("[]", "is empty; it needs at least one prompt"),
        ('{"prompt": "a ring"}', "expected a JSON array .*, got dict; for one object a line use the ending .jsonl"),
        ('{"prompts": ["a ring"]}', "got dict; save the array itself"),
        ('["a ring",\n "a cross"', "not JSON .* at line 2, column"),
        ('["a ring", 7]', 'entry 2: expected {"prompt": "..."}, got 7'),
        ('["a ring", " "]', "entry 2: the prompt is empty"),
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
    found = prompts_in(path)
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
    path = tar(tmp_path / "in" / "p.tar", [("../../escaped.txt", b"a ring"), ("/abs.txt", b"a cross")], links)
    assert read_prompts(path).texts == ("a ring", "a cross")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "p.tar", "secret.txt"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no member that ends in .txt, .caption or .json"),
        ([("0.jpg", b"x")], "holds no member"),
        ([("0.txt", b"a\xff")], "member '0.txt': not UTF-8 at byte 1"),
        ([("0.txt", b"  \n")], "member 0.txt: the prompt is empty"),
        ([("0.txt", b"a"), ("0.txt", b"b")], "member '0.txt': comes twice"),
        ([("0.txt", b"x" * (LARGEST_MEMBER + 1))], f"bytes; at most {LARGEST_MEMBER}"),
        ([("0.json", b'{"words": "a"}')], """member 0.json: expected one key "prompt", got 'words'"""),
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
    assert len(read_prompts(tmp_path / "cut.tar").prompts) == 3


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


PARTI = """Prompt\tCategory\tChallenge\tNote
a red dog\tAnimals\tBasic\t
"G I G G L E" painted on a wall, in red\tIllustrations\tWriting & Symbols\tx
"""
"""As PartiPrompts.tsv: cells that begin with a quote and are not quoted."""


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("p.tsv", PARTI, ("a red dog", '"G I G G L E" painted on a wall, in red')),
        ("p.csv", 'Prompts,Category\n"a red dog, running",Colors\na cat,Colors\n', ("a red dog, running", "a cat")),
        ("p.CSV", '\ufeffid,caption\r\n1,"a ""big"" dog"\r\n\r\n2,"two\r\nlines"\r\n', ('a "big" dog', "two\nlines")),
        ("p.Tsv", 'text\tn\n"a dog\twith a tab"\t2\n', ("a dog\twith a tab",)),
        ("p.csv", "prompt,text\na sign,STOP\n", ("a sign",)),
        ("p.csv", "prompt,a,b\na short row\na long row,1,2,,\n", ("a short row", "a long row")),
        ("p.NDJSON", '{"prompt": "a dog", "id": 1}\n{"prompt": "a cat", "id": 2}\n', ("a dog", "a cat")),
        ("p.jsonl", '{"Prompt": "not this", "prompt": "a dog"}', ("a dog",)),
        ("p.JSONL", '\ufeff{"Prompt": "a dog"}\n', ("a dog",)),
        ("p.JSON", '[{"PROMPTS": "a dog"}]', ("a dog",)),
        ("p.TXT", "\ufeffa dog\n\n  \na cat, and a dog\n", ("a dog", "a cat, and a dog")),
    ],
)
def test_a_file_is_read_by_its_ending_in_any_case(
    tmp_path: Path, name: str, content: str, texts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name).texts == texts


@pytest.mark.parametrize("name", ["p.yaml", "p.yml", "p.md", "p.csv.gz", "p.xlsx", "prompts"])
def test_an_ending_that_is_not_known_is_refused_with_the_list(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompts:\n  - a red dog\n")
    assert ".txt (one prompt a line), .csv, .tsv, .jsonl, .ndjson, .json" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a red dog\na blue cat\n", "line 1: no column is called prompt, caption or text; its columns are 'a red dog'"),
        ("Subject;Category\na dog;x\n", "its columns are 'Subject', 'Category'"),
        ("Prompt,prompt\na,b\n", "'Prompt' and 'prompt' may be the prompts; name it with prompts.column=NAME"),
        ("caption,text\na,b\n", "'caption' and 'text' may be the prompts"),
        ("prompt,x,x\na,b,c\n", "two columns are called 'x'"),
        ("prompt,x\na dog\n,y\n", "line 3: the prompt is empty"),
        ("prompt,x\na dog, running,y\n", "line 2: 3 cells under 2 columns"),
        ('prompt,x\n"two\nlines",y\n"open,y\n', "line 4: not a CSV row"),
        ('prompt,x\n"a" dog,y\n', "line 2: not a CSV row"),
        ("prompt,x\n", "is empty; it needs at least one prompt"),
        ("\n\n", "is empty; it needs a header"),
        ("prompt\n" + "x" * 5000, "line 2: 5000 characters"),
    ],
)
def test_a_bad_table_says_which_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    assert message in refusal(tmp_path / "p.csv")


def test_a_column_can_be_named_and_the_others_are_metadata(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("caption,text,n\na dog,un chien,1\n")
    assert read_prompts(path, "text").meta == ({"prompt": "un chien", "caption": "a dog", "n": "1"},)
    (tmp_path / "p.jsonl").write_text('{"text": "a dog"}\n')
    assert read_prompts(tmp_path / "p.jsonl", "text").meta == ({"prompt": "a dog"},)
    with pytest.raises(ValueError, match="has no column 'words'; its columns are 'caption', 'text', 'n'"):
        read_prompts(path, "words")
    (tmp_path / "p.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match="a .txt file has no column 'text'"):
        read_prompts(tmp_path / "p.txt", "text")


def test_what_is_skipped_or_comes_twice_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("Prompts,id\na dog,1\n,\n\na cat,2\na dog,3\n")
    assert read_prompts(path).note() == (
        f"prompt file {path}: 3 prompts; read from 'Prompts'; 2 blank lines skipped; 1 repeats an earlier prompt"
    )
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    assert read_prompts(tmp_path / "p.txt").note() == ""


def test_rows_of_one_prompt_keep_their_own_metadata(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a dog", "id": 1}\n{"prompt": "a cat", "id": 2}\n{"prompt": "a dog ", "id": 3}\n')
    found = read_prompts(path)
    assert found.texts == ("a dog", "a cat", "a dog")
    assert found.meta is not None and [one["id"] for one in found.meta] == [1, 2, 3]
    assert found.meta[2]["prompt"] == "a dog"  # as it is embedded, drawn and written


def test_parquet_without_pyarrow_is_one_clear_error(tmp_path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is not None:
        pytest.skip("pyarrow is installed")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert "reading .parquet needs pyarrow; do: pip install pyarrow" in refusal(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("excel.csv", 'Nr;Prompt\n1;a ring, red\n2;"a cross; blue"\n', "Prompt"),
        ("tabs.csv", "Prompt\tNr\na ring, red\t1\na cross; blue\t2\n", "Prompt"),
        ("commas.tsv", 'Prompt,Nr\n"a ring, red",1\na cross; blue,2\n', "Prompt"),
        ("one.csv", 'Prompt\n"a ring, red"\na cross; blue\n', "Prompt"),
    ],
)
def test_a_table_is_separated_as_its_header_is(tmp_path: Path, name: str, content: str, column: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    found = read_prompts(path)
    assert (found.texts, found.column) == (("a ring, red", "a cross; blue"), column)


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("p.txt", '{"prompt": "a ring"}\n{"prompt": "a cross"}\n', "use the ending .jsonl"),
        ("p.txt", '["a ring", "a cross"]', "use the ending .jsonl, or .json"),
        ("p.txt", "Prompt\tCategory\na ring\tBasic\n", "use the ending .csv or .tsv"),
        ("p.txt", "id,prompt\n1,a ring\n", "use the ending .csv or .tsv"),
        ("p.txt", "\nprompts\na ring\n", "or remove that line"),
        ("p.jsonl", '[{"prompt": "a ring"},\n {"prompt": "a cross"}]', "use the ending .json"),
        ("p.jsonl.gz", "", "unpack it and give .txt"),
    ],
)
def test_another_format_under_this_ending_is_refused_with_the_right_one(
    tmp_path: Path, name: str, content: str, advice: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert advice in refusal(path)


@pytest.mark.parametrize(
    "first",
    ["[a cat] in the snow", "text, graffiti on a wall", "a prompt, please", "{cat|dog} in rain", "7", "caption"],
)
def test_prose_is_not_taken_for_another_format(tmp_path: Path, first: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(f"{first}\na ring\n")
    assert read_prompts(path).texts == (first, "a ring")
