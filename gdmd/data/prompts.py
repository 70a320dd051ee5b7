"""Prompts by index: the stream of a training run is a pure function of (seed, step), so it needs no saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdmd.data.prompt_files import PromptFile, prompts_in, prompts_in_rows, teacher_prompt, without_teacher
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.types import PromptBatch, TextEncoder

SHIPPED = {
    "text_rendering": "images that show a given text, quoted in the prompt: for the OCR reward",
    "validation": "eight prompts for validation: counting, color, position, text, people, style",
}
"""Prompt sets of the package; a recipe can give their names instead of a path."""


def prompt_file(given: str) -> Path:
    """The path of a shipped set, or the given path."""
    return Path(__file__).parent / f"{given}.txt" if given in SHIPPED else Path(given)


def read_prompts(given: str | Path, column: str | None = None) -> PromptFile:
    """The prompts of a file or a shipped set in order; see ``prompt_files``. ValueError for a malformed file."""
    return prompts_in(prompt_file(str(given)), column)


def prompts_from(dataset: Any) -> PromptFile:
    """The prompts of a file, a list of strings or of rows, a ``datasets.Dataset`` or a pandas.DataFrame, in order.

    Of a row, the column prompt is read, else caption or text; its other columns, except teacher_prompt, are metadata
    for the rewards. All rows are read into memory. ValueError for anything else, such as a stream, or a malformed row.
    """
    if isinstance(dataset, str | Path):
        return read_prompts(dataset)
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # a DataFrame
        dataset = dataset.to_dict("records")
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        known = ", ".join(repr(key) for key in list(dataset)[:8])
        raise ValueError(
            f"train_dataset: got a {kind} with the keys {known}; give one split of a DatasetDict, such as "
            "dataset['train'], or a list with one row per prompt"
        )
    if isinstance(dataset, set | frozenset):
        raise ValueError(
            f"train_dataset: got a {kind}, whose order changes between processes, and a run draws its prompts by index to "
            "be resumable; give sorted(...) of it"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"train_dataset: got {kind}, which has no length, and a run draws its prompts by index to be resumable; "
            "give list(...) of it, or load the dataset without streaming"
        )
    if not hasattr(dataset, "__iter__"):  # such as a torch.utils.data.Dataset
        raise ValueError(
            f"train_dataset: got {kind}, which cannot be iterated; give [dataset[k] for k in range(len(dataset))]"
        )
    return prompts_in_rows("train_dataset", list(dataset))


class PromptStream:
    """Batches of prompts drawn from a list, uniformly over its groups (tasks), then over the members of a group.

    ``group``: samples per prompt. Sample i has prompt i // group, which is also its group id; the prompts are the first
    ones of a batch with one sample per prompt. ``rows``: the row of each prompt, laid out as ``groups``: metadata for
    the rewards, and a teacher_prompt, which only the real score reads.
    """

    def __init__(
        self,
        groups: list[list[str]],
        encoder: TextEncoder,
        batch_size: int,
        seed: int,
        group: int = 1,
        rows: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        if not groups or not all(groups):
            raise ValueError("a prompt stream needs at least one prompt in every group")
        if group < 1 or batch_size % group:
            raise ValueError(
                f"group size does not divide: {group} images per prompt, batch size {batch_size}; "
                "give a batch size that is a multiple of the group size"
            )
        self.groups, self.encoder, self.batch_size, self.seed, self.group = groups, encoder, batch_size, seed, group
        self.sizes = torch.tensor([len(texts) for texts in groups])
        self.meta = [[without_teacher(row) for row in own] for own in rows] if rows else None
        self.columns = frozenset(name for own in self.meta or () for row in own for name in row)
        self.teacher = [
            [teacher_prompt(row, text) for row, text in zip(own, texts, strict=True)]
            for own, texts in zip(rows or (), groups, strict=bool(rows))
        ]

    @property
    def teacher_prompts(self) -> list[str]:
        """The texts that only the teacher reads."""
        prompts = {text for group in self.groups for text in group}
        return [text for text in dict.fromkeys(text for own in self.teacher for text in own) if text not in prompts]

    def at(self, step: int, start: int = 0, stop: int | None = None, draw: int = 0) -> PromptBatch:
        """Samples start ... stop - 1 of the step's batch; only their prompts are encoded.

        draw: a number for each batch of one step; ``PromptBatch.another`` asks for 1, 2, ...
        """
        index = torch.arange(self.batch_size)
        rng = SampleRng(self.seed, step, index[:: self.group] // self.group)  # on the CPU: read by Python
        which = rng.integer("prompt_group", len(self.groups), draw)
        position = rng.integer("prompt", self.sizes[which], draw)
        drawn = list(zip(which.tolist(), position.tolist(), strict=True))
        own = [one for one in drawn for _ in range(self.group)][start:stop]
        texts = tuple(self.groups[g][k] for g, k in own)
        batch = batch_of(texts, self.encoder, index[start:stop], (index // self.group)[start:stop])
        batch = replace(batch, others=lambda i: self.at(step, start, stop, i))
        if self.meta is None:
            return batch
        teacher = tuple(self.teacher[g][k] for g, k in own)
        cond = None if teacher == texts else self.encoder.encode(teacher)
        meta = tuple(self.meta[g][k] for g, k in own)
        return replace(batch, meta=meta, columns=self.columns, teacher_cond=cond)


def batch_of(
    texts: tuple[str, ...],
    encoder: TextEncoder,
    index: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> PromptBatch:
    """A PromptBatch; without ``group`` every sample is a separate group."""
    cond = encoder.encode(texts)
    device = next(iter(cond.values())).device
    host = torch.arange(len(texts)) if index is None else index
    groups = host if group is None else group
    null = encoder.null(len(texts))
    return PromptBatch(to_device_async(host, device), texts, to_device_async(groups, device), cond, null, host=host)
