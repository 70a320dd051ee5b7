"""Prompt files say what is wrong with them, and the training stream is a function of (seed, step)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st

from gdmd.data.prompt_files import LONGEST_PROMPT
from gdmd.data.prompts import PromptStream, batch_of, read_prompts
from gdmd.diffusion.rng import SampleRng
from gdmd.shapes.captions import training_captions
from gdmd.shapes.grammar import NULL, TASKS, catalog, tokenize
from gdmd.shapes.latents import RenderedLatents
from gdmd.shapes.roles import ShapesTextEncoder


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def stream(seed: int = 0, batch: int = 16) -> PromptStream:
    return PromptStream(training_captions(), ShapesTextEncoder(), batch, seed)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a red circle \r\n  zwei Ringe äöü\nlast without newline")
    assert read_prompts(path).texts == ("a red circle", "zwei Ringe äöü", "last without newline")


def test_a_jsonl_file_has_one_object_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "a ring", "tag": 3}\n{"prompt": "a cross"}\n')
    assert read_prompts(path).texts == ("a ring", "a cross")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "is empty; it needs at least one prompt"),
        ("p.jsonl", "", "is empty"),
        ("p.txt", "\n   \t\n", "is empty"),
        ("p.txt", "a " * 5000, f"line 1: 10000 characters; at most {LONGEST_PROMPT}"),
        ("p.txt", b"a ring\n\xff\xfe broken", "not UTF-8 at byte 7; convert it"),
        ("p.jsonl", '{"prompt": "a ring"}\n{"prompt": ', "line 2: not JSON"),
        ("p.jsonl", '{"id": 1, "text": "a ring"}', """line 1: expected one key "prompt", got 'id', 'text'. If"""),
        ("p.jsonl", '{"prompt": 7}', "line 1: 'prompt' must be a text, got 7"),
        ("p.jsonl", '{"prompt": "a ring"}\n{"prompt": null}', "line 2: 'prompt' must be a text, got null"),
        ("p.jsonl", '{"prompt": {"en": "a ring"}}', 'line 1: \'prompt\' must be a text, got {"en": "a ring"}'),
        ("p.jsonl", '\n{"prompt": "a ring"}\n{"id": 2}', "line 3: 'prompt' must be a text, got only 'id'"),
        ("p.jsonl", '{"caption": "a ring", "text": "x"}', "name it with prompts.column=NAME"),
        ("p.jsonl", '"a ring"', "line 1: expected"),
        ("p.jsonl", '{"prompt": " "}', "line 1: the prompt is empty"),
        ("p.jsonl", json.dumps({"prompt": "x" * 10_000}), "line 1: 10000 characters"),
        ("p.txt", "a\n\nä\0", "line 3: the character U+0000"),
        ("p.txt", "a ring\n".encode("utf-16-le"), "line 1: the character U+0000"),
        ("p.txt", "a\n\ufeffb", "line 2: the character U+FEFF"),
        ("p.jsonl", r'{"prompt": "\ud800"}', "U+D800"),
        ("p.jsonl", r'{"prompt": "a\u0000"}', "U+0000"),
        ("p.jsonl", "[" * 100_000, "line 1: cannot be read as JSON"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1: cannot be read as JSON"),
    ],
)
def test_a_bad_prompt_file_is_one_clear_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_prompts(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_line_separator_inside_a_prompt_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '\ufeff{"prompt": "a\u2028b"}\n')
    assert read_prompts(path).texts == ("a\u2028b",)


PIECES = st.sampled_from([b"", b"\n", b"\r", b"\r\n\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"}"])
ORIGINALS = ["a red ring\nzwei Ringe \u00e4\n\u4e00\n".encode(), b'{"prompt": "a"}\n{"prompt": "b"}\n']


@CASES
@given(content=mutated(ORIGINALS, PIECES) | st.binary(), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_a_damaged_file_loses_no_line(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = write(tmp_path_factory.mktemp("prompts") / f"p{suffix}", content)
    found: list[str] = []
    if not refusal(lambda: found.extend(read_prompts(path).texts)):
        lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").decode().split("\n")
        assert len(found) == sum(bool(line.strip()) for line in lines)


def test_a_missing_file_or_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot be read .*; check the path"):
            read_prompts(path)


def test_an_orange_square_is_a_caption_as_well() -> None:
    assert tokenize("an orange  square") == tokenize("a orange square")
    assert catalog().row("a red circle and an orange square") == catalog().row("a red circle and a orange square")
    with pytest.raises(ValueError, match="unknown word 'ant'"):
        tokenize("ant orange square")


def test_the_stream_is_a_pure_function_of_seed_and_step() -> None:
    one, two = stream(), stream()
    forward = [one.at(step) for step in range(5)]
    backward = [two.at(step) for step in reversed(range(5))][::-1]
    torch.manual_seed(123)
    for a, b in zip(forward, backward, strict=True):
        assert a.text == b.text and torch.equal(a.cond["tokens"], b.cond["tokens"])
    assert forward[0].text != forward[1].text and stream(1).at(0).text != forward[0].text


def test_a_larger_batch_begins_with_the_smaller_one() -> None:
    assert stream(batch=32).at(3).text[:16] == stream(batch=16).at(3).text


def test_a_grouped_stream_shows_each_prompt_as_often_as_asked_with_one_group_id() -> None:
    plain = PromptStream(training_captions(), ShapesTextEncoder(), 4, seed=5)
    grouped = PromptStream(training_captions(), ShapesTextEncoder(), 12, seed=5, group=3)
    for step in range(3):
        batch = grouped.at(step)
        assert batch.text[::3] == plain.at(step).text and len(set(batch.text[::3])) > 1
        assert all(batch.text[k] == batch.text[k - k % 3] for k in range(12))
        assert batch.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert batch.index.tolist() == list(range(12)) and batch.cond["tokens"].shape[0] == 12


@pytest.mark.parametrize("group", [5, 0, -3, 24])
def test_a_group_size_that_does_not_divide_the_batch_is_an_error(group: int) -> None:
    with pytest.raises(ValueError, match=f"group size does not divide: {group} images per prompt, batch size 12; give"):
        PromptStream(training_captions(), ShapesTextEncoder(), 12, 0, group)


def test_the_stream_never_yields_a_held_out_caption_and_visits_every_task() -> None:
    table = catalog()
    held_out = {c.text for c, split in zip(table.captions, table.split.tolist(), strict=True) if split > 0}
    assert len(held_out) > 500
    seen = [text for step in range(150) for text in stream(batch=64).at(step).text]
    assert not held_out & set(seen)
    tasks = torch.bincount(table.task[[table.row(text) for text in seen]], minlength=len(TASKS)).double()
    assert ((tasks - len(seen) / 6) ** 2 / (len(seen) / 6)).sum() < 20.5  # chi-square, 5 degrees, p = 0.001


def test_training_captions_are_the_train_split_of_every_task() -> None:
    table, groups = catalog(), training_captions()
    assert len(groups) == len(TASKS) and all(groups)
    for task, group in enumerate(groups):
        rows = [table.row(text) for text in group]
        assert (table.task[rows] == task).all() and (table.split[rows] <= 0).all()


def test_a_batch_numbers_its_samples_and_groups_and_has_a_null_for_each() -> None:
    batch = batch_of(("a ring", "a cross", "a ring"), ShapesTextEncoder())
    assert batch.index.tolist() == batch.group.tolist() == [0, 1, 2] and len(batch) == 3
    assert torch.equal(batch.cond["tokens"][0], batch.cond["tokens"][2])
    assert (batch.uncond["tokens"] == NULL).all() and batch.uncond["tokens"].shape == batch.cond["tokens"].shape


def test_real_latents_are_renders_of_the_caption_that_depend_on_the_sample_and_step_only() -> None:
    class Pictures:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    latents = RenderedLatents(Pictures())
    batch = batch_of(("a red ring", "a blue ring", "a red ring"), ShapesTextEncoder())
    images = latents(batch, SampleRng(0, 4, batch.index))
    alone = batch_of(("a red ring",), ShapesTextEncoder(), torch.tensor([2]))
    assert images.shape[:2] == (3, 3) and torch.equal(images[2:], latents(alone, SampleRng(0, 4, alone.index)))
    assert not torch.equal(images[0], images[2])  # the free attributes differ
    assert not torch.equal(images, latents(batch, SampleRng(0, 5, batch.index)))
