"""Prompts by index: the stream of a training run is a pure function of (seed, step), so it needs no saved state."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gdmd.diffusion.rng import SampleRng
from gdmd.shapes.grammar import TASKS, catalogue
from gdmd.types import PromptBatch, TextEncoder

LONGEST_PROMPT = 4000
"""Characters. Longer lines are a malformed file (a missing newline), not a prompt."""
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
"""Control characters, half characters and byte order marks: signs of another encoding, or of a binary file."""


SHIPPED = {"text_rendering": "pictures that show a given text, quoted in the prompt: for the OCR reward"}
"""Prompt sets of the package, by the name that a recipe may give in the place of a path."""


def prompt_file(given: str) -> Path:
    """The file of a shipped set, or the path that was given."""
    return Path(__file__).parent / f"{given}.txt" if given in SHIPPED else Path(given)


def read_prompts(path: Path) -> tuple[str, ...]:
    """txt: one prompt a line; jsonl: objects with "prompt". Empty lines are an error, as is any malformed line."""
    read = _json_line if path.suffix == ".jsonl" else _text_line
    return tuple(read(path, number, line) for number, line in enumerate(_lines(path), 1))


def _lines(path: Path) -> list[str]:
    """The lines of a prompt file, at least one, without their ends."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompt file {path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    lines = re.split(
        r"\r\n|\r|\n", text
    )  # splitlines() would also cut at U+2028 and others, which JSON allows in a string
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"prompt file {path}: is empty; it needs at least one prompt")
    return lines


def read_meta(path: Path) -> dict[str, Mapping[str, Any]]:
    """The whole JSON object of every prompt of a jsonl file, by its text, for rewards that read more than the text.

    A txt file has none. ValueError for a prompt that comes twice with different objects.
    """
    if path.suffix != ".jsonl":
        return {}
    texts = read_prompts(path)  # every line is checked there
    found: dict[str, Mapping[str, Any]] = {}
    for number, (text, line) in enumerate(zip(texts, _lines(path), strict=True), 1):
        row = json.loads(line)
        if found.setdefault(text, row) != row:
            raise ValueError(
                f"prompt file {path}, line {number}: the prompt {text[:40]!r} came before with other metadata"
            )
    return found


def _text_line(path: Path, number: int, line: str) -> str:
    if not line.strip():
        raise ValueError(f"prompt file {path}, line {number}: empty line; remove it or write a prompt")
    if len(line) > LONGEST_PROMPT:
        raise ValueError(f"prompt file {path}, line {number}: {len(line)} characters; at most {LONGEST_PROMPT}")
    if found := _NO_TEXT.search(line):
        raise ValueError(
            f"prompt file {path}, line {number}: the character U+{ord(found[0]):04X} is no text; "
            "convert the file to UTF-8 and remove it"
        )
    return line.strip()


def _json_line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"prompt file {path}, line {number}: not JSON ({error.msg} at column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise ValueError(f"prompt file {path}, line {number}: cannot be read as JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'prompt file {path}, line {number}: expected {{"prompt": "..."}}, got {line[:60]!r}')
    return _text_line(path, number, row["prompt"])


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
    return PromptBatch(where.to(device), texts, own.to(device), cond, encoder.null(len(texts)))


def training_captions() -> list[list[str]]:
    """The training captions of the Shapes language, a list per task."""
    table = catalogue()
    return [[table.captions[row].text for row in table.rows("train", task).tolist()] for task in range(len(TASKS))]
