"""The tokenizers of a pipeline: how many tokens of a caption its encoders read, and limits missing from their files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gdmd.diffusion.prompt_length import Reader

ENCODER = "text_encoder"
"""Prefix of the names of all text encoders."""
TOKENIZERS = ("tokenizer", "processor")
"""Prefixes of the names of all tokenizers; a processor holds one."""
TEMPLATES: dict[str, Callable[[Any, str, int], Reader]] = {}
"""Readers (pipe, encoder's name, max_sequence_length) of pipelines that wrap captions in a template, by pipeline class.

The families register them."""


def readers_of(pipe: Any, max_tokens: int = 0) -> tuple[Reader, ...]:
    """How the encoders of a pipeline read captions; for an unknown pipeline, those with a CLIP or T5 tokenizer.

    max_tokens: max_sequence_length of the call; 0 = the pipeline's default.
    """
    call = inspect.signature(type(pipe).__call__).parameters
    longest = max_tokens or (call["max_sequence_length"].default if "max_sequence_length" in call else None)
    found = []
    for name, tokenizer in pipe.components.items():
        if name.startswith(TOKENIZERS) and tokenizer is not None:
            encoder = name.replace("tokenizer", ENCODER).replace("processor", ENCODER)
            found.append(_reader(pipe, encoder, tokenizer, longest))
    return tuple(reader for reader in found if reader is not None)


def fit_limits(pipe: Any, table_of: Callable[[str], int | None]) -> None:
    """Limit the tokenizers of a pipeline to the number of positions of their encoders.

    Converted checkpoints often lack model_max_length, or have another encoder's. ``table_of``: the number of positions
    of an encoder by name, for a pipeline that was opened without it; None = unknown.
    """
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or not hasattr(tokenizer, "model_max_length"):
            continue
        encoder, given = name.replace("tokenizer", ENCODER), tokenizer.model_max_length
        part = pipe.components.get(encoder)
        table = getattr(part.config, "max_position_embeddings", None) if part is not None else table_of(encoder)
        if table is not None and given > table:
            tokenizer.model_max_length = table
            if name == "tokenizer" and getattr(pipe, "tokenizer_max_length", None) == given:
                pipe.tokenizer_max_length = table  # some pipelines copy it when they are built


def _reader(pipe: Any, name: str, tokenizer: Any, longest: int | None) -> Reader | None:
    kind = type(tokenizer).__name__
    if kind.startswith("CLIP"):
        return Reader(name, tokenizer.model_max_length, partial(token_ids, tokenizer))
    if longest is None:
        return None
    if kind.startswith("T5"):
        return Reader(name, longest, partial(token_ids, tokenizer))
    template = TEMPLATES.get(type(pipe).__name__)
    return None if template is None else template(pipe, name, longest)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """All token ids, without padding or truncation."""
    ids: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def chat_reader(pipe: Any, name: str, longest: int, *, thinking: bool) -> Reader:
    """Captions as user messages in the tokenizer's chat template."""

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        chats = ([{"role": "user", "content": text}] for text in texts)
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        return token_ids(pipe.tokenizer, [pipe.tokenizer.apply_chat_template(chat, **options) for chat in chats])

    return Reader(name, longest, tokens, plain=False)
