"""The stream of training prompts is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gdmd.data.prompts import PromptStream, batch_of
from gdmd.diffusion.batches import split
from gdmd.diffusion.rng import SampleRng
from gdmd.rewards.callable import columns_of
from gdmd.shapes.grammar import NULL, TASKS, catalog, tokenize, training_captions
from gdmd.shapes.latents import RenderedLatents
from gdmd.shapes.roles import ShapesTextEncoder
from gdmd.types import Cond


def stream(seed: int = 0, batch: int = 16) -> PromptStream:
    return PromptStream(training_captions(), ShapesTextEncoder(), batch, seed)


def test_an_in_a_caption_is_read_as_a() -> None:
    assert tokenize("an orange  square") == tokenize("a orange square")
    assert catalog().row("a red circle and an orange square") == catalog().row("a red circle and a orange square")
    with pytest.raises(ValueError, match="unknown word 'ant'"):
        tokenize("ant orange square")


def test_stream_is_a_function_of_seed_and_step() -> None:
    one, two = stream(), stream()
    forward = [one.at(step) for step in range(5)]
    backward = [two.at(step) for step in reversed(range(5))][::-1]
    torch.manual_seed(123)
    for a, b in zip(forward, backward, strict=True):
        assert a.text == b.text and torch.equal(a.cond["tokens"], b.cond["tokens"])
    assert forward[0].text != forward[1].text and stream(1).at(0).text != forward[0].text


def test_a_step_can_draw_further_batches_of_prompts() -> None:
    """They are functions of (seed, step, number), the same for every slice; a batch without a stream has no others."""
    first = stream().at(3)
    others = [first.another(i) for i in (1, 2)]
    assert len({first.text, *(one.text for one in others), stream().at(4).text}) == 4
    assert others[0].text == stream().at(3, draw=1).text == others[1].another(1).text
    assert stream().at(3, 4, 10).another(2).text == others[1].text[4:10]
    assert torch.equal(others[0].index, first.index)
    alone = batch_of(("a circle",), ShapesTextEncoder())
    assert alone.another(1) is alone


def test_larger_batches_start_with_smaller_ones() -> None:
    assert stream(batch=32).at(3).text[:16] == stream(batch=16).at(3).text


def test_samples_of_a_group_share_their_prompt() -> None:
    plain = PromptStream(training_captions(), ShapesTextEncoder(), 4, seed=5)
    grouped = PromptStream(training_captions(), ShapesTextEncoder(), 12, seed=5, group=3)
    for step in range(3):
        batch = grouped.at(step)
        assert batch.text[::3] == plain.at(step).text and len(set(batch.text[::3])) > 1
        assert all(batch.text[k] == batch.text[k - k % 3] for k in range(12))
        assert batch.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert batch.index.tolist() == list(range(12)) and batch.cond["tokens"].shape[0] == 12


class _NoEncoder:
    def encode(self, texts: Sequence[str]) -> Cond:
        return {"tokens": torch.zeros(len(texts), 1)}

    def null(self, count: int) -> Cond:
        return {"tokens": torch.zeros(count, 1)}


def test_every_prompt_of_a_long_list_can_be_drawn() -> None:
    """A list longer than the 2^23 values of an fp32 draw: all remainders modulo 4 appear, and both ends."""
    many = PromptStream([range(2**25)], _NoEncoder(), 512, seed=0)  # type: ignore[list-item,arg-type]
    drawn = torch.tensor([many.at(step).text for step in range(8)]).flatten()  # type: ignore[arg-type]
    assert (drawn % 4).unique(return_counts=True)[1].min() > 900  # of 1,024 expected
    assert drawn.min() < 2**25 / 500 and drawn.max() > 2**25 * (1 - 1 / 500)


@pytest.mark.parametrize("group", [5, 0, -3, 24])
def test_group_size_must_divide_the_batch(group: int) -> None:
    with pytest.raises(ValueError, match=f"group size does not divide: {group} images per prompt, batch size 12; give"):
        PromptStream(training_captions(), ShapesTextEncoder(), 12, 0, group)


def test_stream_has_all_tasks_and_no_held_out_captions() -> None:
    table = catalog()
    held_out = {c.text for c, split in zip(table.captions, table.split.tolist(), strict=True) if split > 0}
    assert len(held_out) > 500
    seen = [text for step in range(60) for text in stream(batch=64).at(step).text]
    assert not held_out & set(seen)
    tasks = torch.bincount(table.task[[table.row(text) for text in seen]], minlength=len(TASKS)).double()
    assert ((tasks - len(seen) / 6) ** 2 / (len(seen) / 6)).sum() < 20.5  # chi-square, 5 degrees, p = 0.001


def test_training_captions() -> None:
    table, groups = catalog(), training_captions()
    assert len(groups) == len(TASKS) and all(groups)
    for task, group in enumerate(groups):
        rows = [table.row(text) for text in group]
        assert (table.task[rows] == task).all() and (table.split[rows] <= 0).all()


def test_batch_of() -> None:
    batch = batch_of(("a ring", "a cross", "a ring"), ShapesTextEncoder())
    assert batch.index.tolist() == batch.group.tolist() == [0, 1, 2] and len(batch) == 3
    assert torch.equal(batch.cond["tokens"][0], batch.cond["tokens"][2])
    assert (batch.uncond["tokens"] == NULL).all() and batch.uncond["tokens"].shape == batch.cond["tokens"].shape


def test_rendered_latents_depend_on_sample_and_step() -> None:
    class Identity:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    latents = RenderedLatents(Identity())
    batch = batch_of(("a red ring", "a blue ring", "a red ring"), ShapesTextEncoder())
    images = latents(batch, SampleRng(0, 4, batch.index))
    alone = batch_of(("a red ring",), ShapesTextEncoder(), torch.tensor([2]))
    assert images.shape[:2] == (3, 3) and torch.equal(images[2:], latents(alone, SampleRng(0, 4, alone.index)))
    assert not torch.equal(images[0], images[2])  # the free attributes differ
    assert not torch.equal(images, latents(batch, SampleRng(0, 5, batch.index)))


class Counting(ShapesTextEncoder):
    """Remembers what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, ...]] = []

    def encode(self, texts: Sequence[str]) -> Cond:
        self.read.append(tuple(texts))
        return super().encode(texts)


def test_teacher_prompts() -> None:
    """They follow the rows, are not metadata, and change nothing else in a batch. A missing one is the prompt."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a ring", "teacher_prompt": " a red ring ", "id": 1},
        {"prompt": "a cross", "teacher_prompt": "", "id": 2},
        {"prompt": "a ring", "teacher_prompt": "a blue ring", "id": 3},
        {"prompt": "a circle", "id": 4},
    ]
    teacher = {1: "a red ring", 2: "a cross", 3: "a blue ring", 4: "a circle"}
    texts = [row["prompt"] for row in rows]
    stream = PromptStream([texts], ShapesTextEncoder(), 24, seed=0, group=2, rows=[rows])
    assert stream.teacher_prompts == ["a red ring", "a blue ring"]
    batch, part = stream.at(0), stream.at(0, 4, 12)
    assert {row["id"] for row in batch.meta} == {1, 2, 3, 4} and all(set(row) == {"prompt", "id"} for row in batch.meta)
    assert batch.real_cond["tokens"].tolist() == [tokenize(teacher[row["id"]]) for row in batch.meta]
    assert torch.equal(part.real_cond["tokens"], batch.real_cond["tokens"][4:12])
    alone = PromptStream([texts], ShapesTextEncoder(), 24, seed=0, group=2).at(0)
    assert alone.text == batch.text and torch.equal(alone.cond["tokens"], batch.cond["tokens"])


def test_rows_without_teacher_prompts_are_encoded_once() -> None:
    encoder = Counting()
    rows = [{"prompt": "a ring", "teacher_prompt": None}, {"prompt": "a cross", "teacher_prompt": "a cross"}]
    batch = PromptStream([["a ring", "a cross"]], encoder, 8, seed=0, rows=[rows]).at(0)
    assert encoder.read == [batch.text] and batch.real_cond is batch.cond


def test_metadata_follows_the_prompts() -> None:
    """Rows with the same prompt keep their own metadata."""
    rows = [{"prompt": "a ring", "id": 1}, {"prompt": "a cross", "id": 2}, {"prompt": "a ring", "id": 3}]
    texts = [str(row["prompt"]) for row in rows]
    batch = PromptStream([texts], ShapesTextEncoder(), 24, seed=0, group=2, rows=[rows]).at(0)
    assert [row["prompt"] for row in batch.meta] == list(batch.text)
    assert {row["id"] for row in batch.meta} == {1, 2, 3}
    part = PromptStream([texts], ShapesTextEncoder(), 24, seed=0, group=2, rows=[rows]).at(0, 4, 12)
    assert part.meta == batch.meta[4:12]


def test_a_column_that_some_rows_lack_is_in_every_batch() -> None:
    """Without this, a reward function that needs the column fails in the first batch none of whose rows has it."""
    rows = [{"prompt": "a ring", "n": 1}, {"prompt": "a cross"}]
    batch = PromptStream([["a ring", "a cross"]], ShapesTextEncoder(), 8, seed=0, rows=[rows]).at(0)
    assert set(batch.text) == {"a ring", "a cross"}
    for part in split(batch, 1):
        assert columns_of(part) == {"n": [1 if part.text == ("a ring",) else None]}
