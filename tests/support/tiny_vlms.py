"""Tiny vision-language models with random weights, and HPSv3 and GenEval 2 made of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_tokenizers import qwen3_vl
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from gdmd.rewards import geneval2, hpsv3
from gdmd.rewards.geneval2 import GenEval2
from gdmd.rewards.hpsv3 import HPSv3, preference_head, with_reward_token
from gdmd.rewards.vlm import ChatTokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def chat_words(*texts: str) -> transformers.Qwen2Tokenizer:
    """Qwen's tokenizer with the words of the texts as tokens; every other text is read letter by letter."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    vocab |= {piece: len(vocab) + number for number, piece in enumerate(SPECIAL)}
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    words.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    return words


def hpsv3_config(tokens: int, image: int) -> dict[str, Any]:
    """``hpsv3.CONFIG`` with small sizes, this many tokens and this placeholder."""
    config = copy.deepcopy(hpsv3.CONFIG) | {"image_token_id": image}
    config["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": tokens,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    config["vision_config"] |= {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    return config


def hpsv3_words() -> transformers.Qwen2Tokenizer:
    """A tokenizer in which HPSv3's instruction has one token per word."""
    return chat_words(hpsv3._INSTRUCTION)


def hpsv3_parts(seed: int = 5) -> tuple[Any, ChatTokenizer, nn.Module]:
    """A random backbone of the published layout, its tokenizer, and a head."""
    torch.manual_seed(seed)
    words = hpsv3_words()
    image = words.convert_tokens_to_ids("<|image_pad|>")
    config = transformers.Qwen2VLConfig(**hpsv3_config(len(words) + 1, image))
    return wide(transformers.Qwen2VLModel(config)), with_reward_token(words, len(words) + 1), preference_head(32)


def tiny_hpsv3(**options: Any) -> HPSv3:
    net, words, head = hpsv3_parts()
    return HPSv3.from_modules(net, words, head, **{"dtype": "fp32"} | options)


def geneval2_parts(seed: int = 6) -> tuple[Any, transformers.Qwen2Tokenizer]:
    """A random Qwen3-VL and its tokenizer."""
    torch.manual_seed(seed)
    words = chat_words(geneval2.message("How many dogs are in the image? yes Yes one"))
    config = qwen3_vl(words)
    config.image_token_id = words.convert_tokens_to_ids("<|image_pad|>")
    return wide(transformers.Qwen3VLForConditionalGeneration(config)), words


def tiny_geneval2(**options: Any) -> GenEval2:
    net, words = geneval2_parts()
    return GenEval2.from_modules(net, ChatTokenizer(words), **{"dtype": "fp32"} | options)


def save_geneval2(folder: Path) -> Path:
    """The folder of a tiny Qwen3-VL, as ``from_pretrained`` reads it."""
    net, words = geneval2_parts()
    net.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def wide(net: nn.Module) -> Any:
    """Matrices large enough that scores differ between images by more than rounding."""
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return net.eval()
