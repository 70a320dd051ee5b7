"""Configurations, comparisons and prompt files that are malformed: refused with a message, never a traceback or a hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st

from gdmd.config.load import ConfigError, dump_config, load_config
from gdmd.config.run import RunConfig
from gdmd.config.strict_yaml import LONGEST_TEXT, YamlError, parse_yaml
from gdmd.data.prompt_files import LONGEST_PROMPT
from gdmd.data.prompts import read_prompts
from gdmd.recipes.read import FOLDER, read_recipe
from gdmd.sweep.spec import _arguments, read_sweep

RECIPES = [(FOLDER / f"{name}.yaml").read_text() for name in ("shapes_smoke", "gdmd_paper", "dmd_grpo")]
COMPARISON = """name: mine
base: shapes_smoke
student_updates: 4
seeds: [0, 1]
budgets: [updates, passes]
headline: ours
overrides: {}
rows:
  - {name: ours, kind: gdmd, label: Ours}
  - {name: dmd, kind: rival, recipe: dmd}
"""
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 40))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 40))
FRAGMENTS = st.sampled_from(
    ["", "\n", "\t", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: *a\n", "!!int ", "!!binary ", "!!python/none ", "%"]
    + ["\x00", "\ufeff", "\u2028", '"\\uD800"', '"\\UFFFFFFFF"', "9" * 5000, "0x" + "f" * 5000, "1e999", ".nan", "null"]
    + ["[" * 3000, "0000-99-99", "~", "? ", "--- ", "...\n", "%YAML 9.9\n", "../../x", "$(id)", "<script>", "é", "\\"]
) | st.text(max_size=6)  # fmt: skip


@CASES
@given(mutated(RECIPES, FRAGMENTS) | st.text())
def test_a_damaged_recipe_loads_or_is_a_config_error(text: str) -> None:
    message = refusal(lambda: load_config(RunConfig, text))
    assert message or load_config(RunConfig, dump_config(load_config(RunConfig, text)))


@CASES
@given(content=st.binary() | mutated([text.encode() for text in RECIPES], st.binary(max_size=4)))
def test_a_recipe_file_of_any_bytes_loads_or_is_a_config_error(content: bytes) -> None:
    path = Path(_folder()) / "bytes.yaml"
    path.write_bytes(content)
    refusal(lambda: read_recipe(str(path)))


@CASES
@given(st.lists(st.text() | st.tuples(st.sampled_from(["name", "loop.seed", "method.kind"]), FRAGMENTS).map("=".join)))
def test_any_overrides_load_or_are_a_config_error(overrides: list[str]) -> None:
    refusal(lambda: read_recipe("shapes_smoke", overrides))


@pytest.mark.parametrize("key", ["method.kind", "loop.seed", "name"])
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 5000, "[0x" + "f" * 5000 + "]"])
def test_a_whole_number_that_cannot_be_printed_is_named_by_its_size(key: str, number: str) -> None:
    message = refusal(lambda: read_recipe("shapes_smoke", [f"{key}={number}"]))
    assert message is not None and ("bits" in message or "4300 digits" in message) and "unprintable" not in message


@CASES
@given(mutated([COMPARISON], FRAGMENTS))
def test_a_damaged_comparison_loads_or_is_a_config_error(text: str) -> None:
    path = Path(_folder()) / "mutated.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refusal(lambda: read_sweep(str(path)))


@CASES
@given(st.text() | st.text().map(lambda text: text + ".yaml"))
def test_any_name_of_a_recipe_or_comparison_is_known_or_a_config_error(name: str) -> None:
    refusal(lambda: read_recipe(name))
    refusal(lambda: read_sweep(name))


@pytest.mark.parametrize("name", ["x" * 5000 + ".yaml", "a\0b.yaml", "x" * 100_000, "", ".yaml", "/.yaml"])
def test_a_name_that_cannot_be_a_file_is_a_config_error(name: str) -> None:
    for read in (read_recipe, read_sweep):
        with pytest.raises(ConfigError):
            read(name)


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", "/etc/passwd", "a\\b", "", "CON:"])
def test_a_row_cannot_lead_out_of_the_comparisons_folder(name: str, tmp_path: Path) -> None:
    for old in ("name: mine", "name: dmd,"):
        path = tmp_path / "spec.yaml"
        path.write_text(COMPARISON.replace(old, old.replace("mine", repr(name)).replace("dmd", repr(name))))
        with pytest.raises(ConfigError, match="name"):
            read_sweep(str(path))


def test_overrides_of_a_comparison_arrive_as_they_were_written() -> None:
    (word,) = _arguments({"model.teacher": "\U0001f600"})
    assert parse_yaml(word.partition("=")[2]) == "\U0001f600"


@pytest.mark.parametrize("text", [BOMB, MERGES, BOMB.replace("a39:", "method: {kind: *a38}\na39:")])
def test_aliases_that_multiply_are_refused_before_they_fill_the_memory(text: str) -> None:
    assert "aliases repeat" in refusal(lambda: load_config(RunConfig, text))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('a: "\\UFFFFFFFF"', "escaped character"),
        (f"%YAML {'9' * 5000}.1\n--- a", "directive"),
        ("a: " + "x" * LONGEST_TEXT, "characters, at most"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_no_reader_can_take_is_one_error(text: str, part: str) -> None:
    with pytest.raises(YamlError, match=part):
        parse_yaml(text)


def test_brackets_inside_brackets_are_refused_before_they_cost_time() -> None:
    """The reader's time grows with their square: 3,000 in each of 40 overrides took 20 s, and 500 are no better."""
    began = time.process_time()
    assert "nested too deeply" in refusal(lambda: read_recipe("shapes_smoke", [f"name={'[' * 3000}"] * 40))
    assert time.process_time() - began < 3
    assert load_config(RunConfig, "{name: a, loop: {betas: [.9, .99]}}").loop.betas == (0.9, 0.99)


def test_a_number_of_thousands_of_digits_inside_a_list_is_shown_by_its_size() -> None:
    assert "20000 bits" in refusal(lambda: load_config(RunConfig, "name: [0x" + "f" * 5000 + "]"))


PIECES = st.sampled_from(
    [b"", b"\n", b"\r", b"\r\n\r\n", b" ", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", "\u2028".encode(), b'{"prompt": 1}']
    + [b"[" * 3000, b'"\\ud800"', b"9" * 5000, b"x" * 10_000, b"\xff\xfea\0", b"\x1b[2J", b'{"prompt": ', b"}", b"NaN"]
) | st.binary(max_size=6)  # fmt: skip
GOOD = [
    "a red ring\nzwei Ringe \u00e4\n\u4e00\n".encode(),
    b'{"prompt": "a"}\n{"prompt": "b", "k": [1]}\n',
    b"\xef\xbb\xbfa\nb",
]


@CASES
@given(content=mutated(GOOD, PIECES) | st.binary(), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_a_damaged_prompt_file_loses_no_line_in_silence(content: bytes, suffix: str) -> None:
    path = Path(_folder()) / f"prompts{suffix}"
    path.write_bytes(content)
    found: list[str] = []
    if refusal(lambda: found.extend(read_prompts(path).texts)):
        return
    lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").decode().split("\n")
    assert len(found) == sum(bool(line.strip()) for line in lines)
    for prompt in found:
        assert 0 < len(prompt) <= LONGEST_PROMPT and prompt.strip() == prompt
        assert not set(prompt.encode()) & (set(range(32)) - {9})


@pytest.mark.parametrize(
    ("content", "suffix", "part"),
    [
        ("a\n" + "x" * 10_000, ".txt", "line 2: 10000 characters"),
        ('{"prompt": "' + "x" * 10_000 + '"}', ".jsonl", "line 1: 10000 characters"),
        ("a\n\nä\0", ".txt", r"line 3: the character U\+0000"),
        ("a\nä\n".encode() + "ä".encode("latin-1"), ".txt", "not UTF-8 at byte 5"),
        ("a ring\n".encode("utf-16"), ".txt", "not UTF-8 at byte 0"),
        ("a ring\n".encode("utf-16-le"), ".txt", r"line 1: the character U\+0000"),
        ("a\n\ufeffb", ".txt", r"line 2: the character U\+FEFF"),
        (b"a\0b", ".txt", r"U\+0000"),
        (r'{"prompt": "\ud800"}', ".jsonl", r"U\+D800"),
        (r'{"prompt": "a\u0000"}', ".jsonl", r"U\+0000"),
        ("[" * 100_000, ".jsonl", "line 1: cannot be read as JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", ".jsonl", "line 1: cannot be read as JSON"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused_with_its_line(
    content: str | bytes, suffix: str, part: str, tmp_path: Path
) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=part):
        read_prompts(path)


def test_a_byte_order_mark_and_a_line_separator_inside_a_prompt_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\n'.encode())
    assert read_prompts(path).texts == ("a\u2028b",)


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _FOLDER.append(str(tmp_path_factory.mktemp("malformed")))


_FOLDER: list[str] = []


def _folder() -> str:
    return _FOLDER[-1]
