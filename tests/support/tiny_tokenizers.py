"""Tokenizers and text encoders of the real classes, built without a download."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a photo of two red apples", "a blue ring", "three dogs")


def clip_words() -> CLIPTokenizer:
    """Characters only: every byte, alone and at the end of a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(table)}, merges=[], model_max_length=77)


def t5_words() -> T5Tokenizer:
    """A Unigram model trained on the words of the tests."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    unigram.train_from_iterator(WORDS, trainer)
    pieces = json.loads(unigram.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=0, model_max_length=77)


def qwen_words(*more: str) -> Qwen2Tokenizer:
    """Characters only, and ``more`` as single tokens."""
    special = ["<|im_start|>", "<|im_end|>", *more]
    table = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *special]
    words = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(table)}, merges=[], additional_special_tokens=special
    )
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return words


def qwen3_vl(words: Qwen2Tokenizer) -> Qwen3VLConfig:
    """A config with 16 numbers per token after each of two layers."""
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    shared = {"hidden_size": 16, "intermediate_size": 16}
    text = {**shared, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**shared, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config={**text, "rope_parameters": rope, "vocab_size": len(words)}, vision_config=vision)


def clip(words: CLIPTokenizer, kind: type = CLIPTextModelWithProjection, width: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


def t5(words: T5Tokenizer, width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=width, d_ff=2 * width, d_kv=8, num_heads=4, num_layers=1)
    )
