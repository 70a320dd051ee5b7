"""Prompts from Python objects: lists, rows, datasets, tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdmd.data.prompts import prompts_from, read_prompts


class Dataset:
    """The part of ``datasets.Dataset`` that is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class IterableDataset:
    column_names = ("prompt",)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{"prompt": "a"}])


class IndexedDataset:
    """As users of torch write one."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, k: int) -> dict[str, str]:
        return {"prompt": "a"}


class DataFrame:
    """The part of ``pandas.DataFrame`` that is used."""

    columns = ("prompt", "n")

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{"prompt": "a ring", "n": 1}, {"prompt": "a cross", "n": 2}]


ROWS = [{"caption": "a ring", "n": 1}, {"caption": " ", "n": 2}, {"caption": "a cross ", "n": 3}]


@pytest.mark.parametrize("given", [ROWS, tuple(ROWS), Dataset(ROWS)])
def test_rows(given: Any) -> None:
    found = prompts_from(given)
    assert found.texts == ("a ring", "a cross") and found.blank == 1 and found.column == "caption"
    assert found.meta == ({"prompt": "a ring", "n": 1}, {"prompt": "a cross", "n": 3})
    assert found.note() == "train_dataset: 2 prompts; read from 'caption'; 1 blank line skipped"


class Missing:
    """pandas.NA: neither equal to anything nor true or false."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self) -> str:
        return "<NA>"


def test_teacher_prompts() -> None:
    """Teacher prompts are not metadata for the rewards, but change the fingerprint; missing cells count as empty."""
    rows = [{"prompt": "a ring", "n": 1, "teacher_prompt": "a red ring"}]
    rows += [
        {"prompt": "a cross", "n": 2, "teacher_prompt": none} for none in (None, float("nan"), np.nan, Missing(), " ")
    ]
    found = prompts_from(rows)
    assert found.meta is not None and found.rows is not None
    assert found.meta[0] == {"prompt": "a ring", "n": 1} and found.rows[0]["teacher_prompt"] == "a red ring"
    assert found.note() == "train_dataset: 6 prompts; 4 repeat an earlier prompt; 1 has a teacher prompt"
    assert prompts_from(rows[:1]).fingerprint() != prompts_from([{"prompt": "a ring", "n": 1}]).fingerprint()
    unused = prompts_from(
        [{"prompt": "a ring", "teacher_prompt": "a ring"}, {"prompt": "a cross", "teacher_prompt": ""}]
    )
    assert unused.note() == (
        "train_dataset: 2 prompts; no teacher_prompt differs from its prompt, so the teacher reads the prompts"
    )


def test_teacher_prompt_that_is_not_a_string_or_too_long() -> None:
    for wrong, message in (
        (3, "train_dataset, index 1: 'teacher_prompt' must be a string, got 3; leave it empty where the teacher"),
        (["a ring"], "index 1: 'teacher_prompt' must be a string, got .\"a ring\"."),
        ("a" * 4001, "index 1, teacher_prompt: 4001 characters; at most 4000"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts_from([{"prompt": "a ring"}, {"prompt": "a cross", "teacher_prompt": wrong}])


def test_strings_files_and_tables(tmp_path: Path) -> None:
    texts = prompts_from(["a ring", "", "a cross"])
    assert texts.texts == ("a ring", "a cross") and texts.meta is None and texts.blank == 1
    (tmp_path / "p.txt").write_text("a ring\na cross\n")
    file = read_prompts(tmp_path / "p.txt")
    assert prompts_from(tmp_path / "p.txt") == file and texts.fingerprint() == file.fingerprint()
    assert prompts_from(DataFrame()).meta == ({"prompt": "a ring", "n": 1}, {"prompt": "a cross", "n": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", 3], "train_dataset, index 1: .*got 3"),
        (["a", "b\0"], r"train_dataset, index 1: the character U\+0000"),
        ([{"prompt": "a"}, {"prompt": None}], "train_dataset, index 1: 'prompt' must be a string, got null"),
        ([{"words": "a"}], 'no column is named prompt, caption or text; .*rename it to "prompt"'),
        ([], "train_dataset: has no prompts"),
        (["", " "], "train_dataset: has no prompts"),
        (["a", {"prompt": "b"}], 'train_dataset, index 0: expected {"prompt": "..."}, got "a"'),
        (iter(["a"]), "got list_iterator, which has no length.*give list"),
        (IterableDataset(), "got IterableDataset, which has no length.*without streaming"),
        (IndexedDataset(), "got IndexedDataset, which cannot be iterated; give .*for k in range"),
        ({"train": Dataset(ROWS)}, "got a dict with the keys 'train'; give one split"),
        ("gone.txt", "prompt file gone.txt: cannot be read"),
        (3, "got int, which has no length"),
        ({"a", "b"}, r"got a set, whose order changes between processes.*give sorted\(...\)"),
    ],
)
def test_errors(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts_from(given)


def test_fingerprints_of_images_and_arrays() -> None:
    """Images, arrays and tensors are hashed by content; of any other object only its type counts."""

    def rows(shade: int, thing: object) -> Any:
        image = Image.new("RGB", (2, 2), (shade, 0, 0))
        return [{"prompt": "a", "image": image, "array": np.full(3, shade), "tensor": torch.ones(2), "thing": thing}]

    one, same, other = (prompts_from(rows(shade, object())) for shade in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert isinstance((one.meta or ({},))[0]["image"], Image.Image)


def test_fingerprints_of_sets_and_numbered_columns() -> None:
    """The order of a set of strings changes between processes; the columns of a table may be numbers."""
    values = [f"tag {k}" for k in range(50)]
    one, same = (prompts_from([{"prompt": "a", "tags": set(order), 0: 1}]) for order in (values, values[::-1]))
    listed = prompts_from([{"prompt": "a", "tags": frozenset(values), "0": 1}])
    assert one.fingerprint() == same.fingerprint() == listed.fingerprint()
    assert one.meta == ({"prompt": "a", "tags": set(values), "0": 1},)
