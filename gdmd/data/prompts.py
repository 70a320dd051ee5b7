"""Prompts by index: the stream of a training run is a pure function of (seed, step), so it needs no saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdmd.data.prompt_files import prompts_in
from gdmd.diffusion.device import sent
from gdmd.diffusion.rng import SampleRng
from gdmd.shapes.grammar import TASKS, catalogue
from gdmd.types import PromptBatch, TextEncoder

SHIPPED = {"text_rendering": "pictures that show a given text, quoted in the prompt: for the OCR reward"}
"""Prompt sets of the package, by the name that a recipe may give in the place of a path."""


def prompt_file(given: str) -> Path:
    """The file of a shipped set, or the path that was given."""
    return Path(__file__).parent / f"{given}.txt" if given in SHIPPED else Path(given)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a txt, jsonl, json or WebDataset tar file, in order. ValueError for anything malformed."""
    return tuple(prompt.text for prompt in prompts_in(path))


def read_meta(path: Path) -> dict[str, Mapping[str, Any]]:
    """The whole JSON object of every prompt that has one, by its text, for rewards that read more than the text.

    A txt file has none. ValueError for a prompt that comes twice with different objects.
    """
    if path.suffix == ".txt":
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for prompt in prompts_in(path):
        if prompt.meta is not None and found.setdefault(prompt.text, prompt.meta) != prompt.meta:
            raise ValueError(
                f"prompt file {path}, {prompt.where}: the prompt {prompt.text[:40]!r} came before with other metadata"
            )
    return found


class PromptStream:
    """Batches of prompts drawn from a list, uniformly over its groups (tasks), then over the members of a group.

    ``group``: samples per prompt. Sample i shows prompt i // group, whose number is its group id; the prompts are the
    first ones of the batch with one sample each. ``meta``: what else is known of every prompt, by its text.
    """

    def __init__(
        self,
        groups: list[list[str]],
        encoder: TextEncoder,
        batch_size: int,
        seed: int,
        group: int = 1,
        meta: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not groups or not all(groups):
            raise ValueError("a prompt stream needs at least one prompt in every group")
        if group < 1 or batch_size % group:
            raise ValueError(
                f"group size does not divide: {group} images per prompt, batch size {batch_size}; "
                "give a batch size that is a multiple of the group size"
            )
        self.groups, self.encoder, self.batch_size, self.seed, self.group = groups, encoder, batch_size, seed, group
        self.meta = meta

    def at(self, step: int, start: int = 0, stop: int | None = None) -> PromptBatch:
        """Samples start ... stop - 1 of the step's batch; only their captions are encoded."""
        index = torch.arange(self.batch_size)
        rng = SampleRng(self.seed, step, index[:: self.group] // self.group)  # on the CPU: read by Python
        which = rng.integer("prompt_group", len(self.groups)).tolist()
        place = rng.uniform("prompt").tolist()
        chosen = [self.groups[g] for g in which]
        drawn = [own[int(p * len(own))] for own, p in zip(chosen, place, strict=True)]
        texts = tuple(text for text in drawn for _ in range(self.group))[start:stop]
        batch = batch_of(texts, self.encoder, index[start:stop], (index // self.group)[start:stop])
        return replace(batch, meta=tuple(self.meta[text] for text in texts)) if self.meta else batch


def batch_of(
    texts: tuple[str, ...],
    encoder: TextEncoder,
    index: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
) -> PromptBatch:
    """A PromptBatch; without ``group`` every sample is its own group."""
    cond = encoder.encode(texts)
    device = next(iter(cond.values())).device
    where = torch.arange(len(texts)) if index is None else index
    own = where if group is None else group
    null = encoder.null(len(texts))
    return PromptBatch(sent(where, device), texts, sent(own, device), cond, null, host=where)


def training_captions() -> list[list[str]]:
    """The training captions of the Shapes language, a list per task."""
    table = catalogue()
    return [[table.captions[row].text for row in table.rows("train", task).tolist()] for task in range(len(TASKS))]
