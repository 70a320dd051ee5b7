"""The tokenizers of a pipeline: how many tokens of a caption its encoders read, and limits that their files leave out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gdmd.diffusion.prompt_length import Reader

ENCODER = "text_encoder"
"""What the names of all text encoders begin with."""
MOST = {
    "StableDiffusion3Pipeline": 512,
    "FluxPipeline": 512,
    "QwenImagePipeline": 1024,
}
"""The largest max_sequence_length that the call of a pipeline takes."""
FIXED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Pipelines whose CLIP encoders always read as many tokens as they have positions."""


def readers_of(pipe: Any, max_tokens: int = 0) -> tuple[Reader, ...]:
    """How the encoders of a pipeline read captions; of an unknown pipeline those with a CLIP or T5 tokenizer.

    max_tokens: max_sequence_length of the call; 0 = the pipeline's default.
    """
    call = inspect.signature(type(pipe).__call__).parameters
    longest = max_tokens or (call["max_sequence_length"].default if "max_sequence_length" in call else None)
    found = []
    for name, tokenizer in pipe.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            found.append(_reader(pipe, name.replace("tokenizer", ENCODER), tokenizer, longest))
    return tuple(reader for reader in found if reader is not None)


def fit_limits(pipe: Any, table_of: Callable[[str], int | None]) -> None:
    """Tokenizers of a pipeline never give more tokens than their encoder has positions for.

    Files of converted checkpoints often lack model_max_length, or have another encoder's. ``table_of``: the number of
    positions of an encoder by its name, where the pipeline was opened without it; None = not known.
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
                pipe.tokenizer_max_length = table  # two pipelines copy it when they are built


def _reader(pipe: Any, name: str, tokenizer: Any, longest: int | None) -> Reader | None:
    kind, pipeline = type(tokenizer).__name__, type(pipe).__name__
    if kind.startswith("CLIP"):
        return Reader(name, tokenizer.model_max_length, partial(_ids, tokenizer))
    if longest is None:
        return None
    if kind.startswith("T5"):
        return Reader(name, longest, partial(_ids, tokenizer))
    special = {
        "ZImagePipeline": _z_image,
        "Flux2Pipeline": _flux2,
        "Flux2KleinPipeline": _klein,
        "QwenImagePipeline": _qwen,
        "SanaPipeline": _sana,
    }
    return special[pipeline](pipe, name, longest) if pipeline in special else None


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """All token ids, no padding, nothing cut off."""
    ids: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _chat(pipe: Any, name: str, longest: int, *, thinking: bool) -> Reader:
    def tokens(texts: Sequence[str]) -> list[list[int]]:
        asked = ([{"role": "user", "content": text}] for text in texts)
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        return _ids(pipe.tokenizer, [pipe.tokenizer.apply_chat_template(one, **options) for one in asked])

    return Reader(name, longest, tokens, plain=False)


def _z_image(pipe: Any, name: str, longest: int) -> Reader:
    return _chat(pipe, name, longest, thinking=True)


def _klein(pipe: Any, name: str, longest: int) -> Reader:
    return _chat(pipe, name, longest, thinking=False)


def _flux2(pipe: Any, name: str, longest: int) -> Reader:
    """After a long system message, which counts."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        messages = format_input(list(texts), pipe.system_message)
        options = {"add_generation_prompt": False, "tokenize": True, "return_dict": True, "truncation": False}
        ids: list[list[int]] = pipe.tokenizer.apply_chat_template(messages, padding=False, **options)["input_ids"]
        return ids

    return Reader(name, longest, tokens, plain=False)


def _qwen(pipe: Any, name: str, longest: int) -> Reader:
    """The first tokens of the template are dropped and do not count; the pipeline cuts the rest twice."""
    dropped, most = pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return _ids(pipe.tokenizer, [pipe.prompt_template_encode.format(text) for text in texts])

    return Reader(name, dropped + min(longest, most), tokens, plain=False)


def _sana(pipe: Any, name: str, longest: int) -> Reader:
    """After an instruction, of which only two tokens count."""
    lines = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(lines)

    def tokens(texts: Sequence[str]) -> list[list[int]]:
        return _ids(pipe.tokenizer, [instruction + text.lower().strip() for text in texts])

    return Reader(name, len(pipe.tokenizer.encode(instruction)) + longest - 2, tokens, plain=False)
