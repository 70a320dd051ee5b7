"""Tiny CLIP models and tokenizers, in folders like those that are published."""

from __future__ import annotations

from pathlib import Path

import transformers

WORDS = 50


def words_of_clip(folder: Path) -> None:
    """A CLIP tokenizer of 13 letters, with a config that says what it is where there is none."""
    signs = [chr(code) for code in range(97, 110)]
    vocab = {sign: i for i, sign in enumerate(signs + [sign + "</w>" for sign in signs])}
    vocab |= {"<|startoftext|>": WORDS - 2, "<|endoftext|>": WORDS - 1}
    transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "clip"}')


def clip(folder: Path) -> None:
    """A tiny ``CLIPModel``."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = small | {"vocab_size": WORDS, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
    vision = small | {"patch_size": 56}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
