"""The OCR reward: text in quotes, edit distance, and readers with tiny networks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from tiny_rewards import prompt_batch
from torch import Tensor

from gdmd.config.load import ConfigError, load_config
from gdmd.config.run import RunConfig
from gdmd.data.prompts import prompt_file, read_prompts
from gdmd.recipes.build_rewards import build_rewards, check_prompts, reward_stats
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.ocr import OCR, OcrReader, edit_distance, normalized, ocr_score, requested_text
from gdmd.rewards.preprocessing import from_pil

RECIPE = "name: x\nloop: {}\nrewards:\n"
WORDS = ("OPEN", "OPEN ALL NIGHT", "SOUP", "SOAP", "go team", "")


@cache
def written(words: str) -> Image.Image:
    """An image that says ``words``, in Pillow's own font."""
    image = Image.new("RGB", (160, 32), "white")
    ImageDraw.Draw(image).text((4, 4), words, fill="black", font=ImageFont.load_default(18))
    return image


def lookup_reader(image: Image.Image) -> str:
    """Finds the text whose image is equal."""
    return next(words for words in WORDS if written(words).tobytes() == image.tobytes())


def scored(prompts: Sequence[str], images: Sequence[str], **settings: Any) -> list[float]:
    pixels = from_pil([written(words) for words in images])
    return OCR.from_modules(lookup_reader, **settings).score(pixels, prompt_batch(prompts)).tolist()


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("prompt", "requested"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “Open” in red", "Open"),
        ("ein Schild mit „Bäckerei“ darauf", "Bäckerei"),
        ("une enseigne «Café»", "Café"),
        ("看板「営業中」", "営業中"),
        ('"24 H" above "PHARMACY"', "24 H PHARMACY"),
        ("a dog's bowl, the dog's name isn't on it", ""),
        ('an inch mark 5" wide', ""),
        ('an empty "" pair', ""),
    ],
)
def test_text_in_quotes(prompt: str, requested: str) -> None:
    assert requested_text(prompt) == requested


def test_compared_texts_are_normalized() -> None:
    assert normalized("  Don’t\nＴＯＵＣＨ – it ") == "don'ttouch-it"
    assert ocr_score('"SOUP OF THE DAY"', "soup of\nthe  day") == 1
    assert ocr_score('"stop"', "stop!") == 0.75


def reference(requested: str, read: str) -> int:
    """Edit distance by its definition."""
    if not requested or not read:
        return len(requested) + len(read)
    return min(
        reference(requested[1:], read) + 1,
        reference(requested, read[1:]) + 1,
        reference(requested[1:], read[1:]) + (requested[0] != read[0]),
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_equals_its_definition(requested: str, read: str) -> None:
    assert edit_distance(requested, read) == reference(requested, read)
    stretches = [read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)]
    assert edit_distance(requested, read, anywhere=True) == min(reference(requested, one) for one in stretches)


@given(st.text(max_size=12), st.text(max_size=40))
def test_score_is_between_0_and_1(words: str, read: str) -> None:
    prompt = f'a sign "{words}"'
    score = ocr_score(prompt, read)
    if not normalized(requested_text(prompt)):
        assert math.isnan(score)
        return
    assert 0 <= score <= ocr_score(prompt, read, "free") <= 1
    assert ocr_score(prompt, requested_text(prompt)) == 1


# ---------------------------------------------------------------- the reward


def test_scores_of_images_with_text() -> None:
    prompts = ('a sign "open"', 'a can of "SOUP"', 'a can of "SOUP"', 'a scarf "GO TEAM"', 'a sign "OPEN"')
    images = ("OPEN", "SOUP", "SOAP", "", "OPEN ALL NIGHT")
    assert scored(prompts, images) == [1, 1, 0.75, 0, 0]
    assert scored(prompts[-1:], images[-1:], other_text="free") == [1]


def test_prompts_without_quotes_are_not_scored() -> None:
    seen: list[Image.Image] = []
    reward = OCR.from_modules(lambda image: seen.append(image) or lookup_reader(image))  # type: ignore[func-returns-value]
    pixels = from_pil([written("OPEN")] * 4)
    scores = reward.score(pixels, prompt_batch(("a dog", 'says "OPEN"', "a dog's sign", '"  "')))
    assert scores.isnan().tolist() == [True, False, True, True] and len(seen) == 1
    assert float(reward_stats([reward])["reward/ocr/unasked"]) == 0.75
    assert "reward/ocr/unasked" in reward_stats([Composite([Part(reward)])])


def test_reader_must_return_a_string() -> None:
    with pytest.raises(ValueError, match="returned a list for an image; it must return a string"):
        OCR.from_modules(lambda image: [image]).score(from_pil([written("OPEN")]), prompt_batch(('"a"',)))  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------- recipes and prompts


def test_shipped_prompts_quote_different_texts() -> None:
    prompts = read_prompts("text_rendering").texts
    requested = [normalized(requested_text(prompt)) for prompt in prompts]
    assert 40 <= len(prompts) <= 60 and all(requested) and len(set(requested)) == len(requested)
    assert prompt_file("some/where.txt") == Path("some/where.txt")


def test_recipe_with_a_custom_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_reader", sys.modules[__name__])
    text = RECIPE + "  - {kind: ocr, reader: 'own_reader:lookup_reader', other_text: free}\n"
    (reward,) = build_rewards(load_config(RunConfig, text).rewards)
    assert isinstance(reward, OCR) and reward.read.args[1] is lookup_reader and reward.config.other_text == "free"
    (lazy,) = build_rewards(load_config(RunConfig, RECIPE + "  - {kind: ocr}\n").rewards)  # nothing is downloaded
    assert isinstance(lazy, OCR) and isinstance(lazy.read, OcrReader)
    for line, message in (
        ("{kind: ocr, reader: 'a:b', path: models/ocr}", "give reader, or path and revision"),
        ("{kind: ocr, offload: true}", "offload"),
        ("{kind: ocr, other_text: maybe}", "other_text"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(RunConfig, RECIPE + f"  - {line}\n")
    with pytest.raises(ValueError, match="not a folder with weights"):
        build_rewards(load_config(RunConfig, RECIPE + "  - {kind: ocr, path: ./missing}\n").rewards)


def test_prompts_that_never_quote_a_text_are_an_error() -> None:
    plain = ("a dog", "a dog's bowl")
    alone = load_config(RunConfig, RECIPE + "  - {kind: ocr}\n").rewards
    part = load_config(RunConfig, RECIPE + "  - {kind: composite, parts: [{reward: {kind: ocr}}]}\n").rewards
    for specs in (alone, part):
        with pytest.raises(ValueError, match="none of the prompts does"):
            check_prompts(specs, plain)
        check_prompts(specs, (*plain, 'a sign "OPEN"'))
    check_prompts(load_config(RunConfig, RECIPE + "  - {kind: clip}\n").rewards, plain)


# ---------------------------------------------------------------- real classes, tiny and random


def tiny_got(folder: Path) -> Path:
    """GOT-OCR 2.0 of some thousand weights with the processor of the published one."""
    pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers
    from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2Processor, Qwen2Tokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    table = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *special]
    words = Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(table)}, merges=[], additional_special_tokens=special
    )
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GotOcr2Config(
        text_config={"model_type": "qwen2", "vocab_size": len(words), "num_key_value_heads": 2, **text},
        vision_config={
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
            "patch_size": 1, "mlp_dim": 16, "global_attn_indexes": [], "window_size": 8, "initializer_range": 0.1,
        },  # 64 x 64 patches, halved twice: 256 image tokens, as the processor expects
        image_token_index=words.convert_tokens_to_ids("<imgpad>"),
    )  # fmt: skip
    GotOcr2ForConditionalGeneration(config).save_pretrained(folder)
    sizes = GotOcr2ImageProcessorPil(size={"height": 64, "width": 64})
    GotOcr2Processor(sizes, words).save_pretrained(folder)
    return folder


def test_model_of_transformers(tmp_path: Path) -> None:
    """Loaded once, frozen, and independent of the rest of the batch."""
    spec = f"  - {{kind: ocr, path: '{tiny_got(tmp_path / 'model')}', tokens: 6}}\n"
    (reward,) = build_rewards(load_config(RunConfig, RECIPE + spec).rewards)
    assert isinstance(reward, OCR) and isinstance(reward.read, OcrReader)
    pixels = from_pil([written(words) for words in WORDS[:3]])
    prompts = prompt_batch(('"OPEN"', "a dog", '"SOUP"'))
    scores = reward.score(pixels, prompts)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(
        reward.score(pixels.flip(0), prompt_batch(prompts.text[::-1])).flip(0), scores, equal_nan=True
    )
    net = reward.read.parts.net
    assert not net.training and not any(one.requires_grad for one in net.parameters())
    assert len(reward.read(written("OPEN"))) <= 6 * 4
    (again,) = build_rewards(load_config(RunConfig, RECIPE + spec).rewards)
    assert isinstance(again, OCR) and isinstance(again.read, OcrReader) and again.read.parts is reward.read.parts


class FixedModel(torch.nn.Module):
    """Generates the given tokens: after the input tokens as a decoder, alone as an encoder-decoder."""

    def __init__(self, tokens: Sequence[int], encoder_decoder: bool) -> None:
        super().__init__()
        self.tokens, self.options = list(tokens), {}
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    def generate(self, **options: Any) -> Tensor:
        self.options = options
        before = [] if self.config.is_encoder_decoder else options["input_ids"][0].tolist()
        return torch.tensor([[*before, *self.tokens]])


class Letters:
    """Tokenizer and processor: a token is a letter's code; 1 = end, 2 = end of a turn."""

    eos_token_id, unk_token_id, pad_token_id = 1, None, 0

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        assert images.mode == "RGB" and return_tensors == "pt"
        return {
            "input_ids": torch.tensor([[ord(letter) for letter in "OCR:"]]),
            "pixel_values": torch.zeros(1, 3, 2, 2),
        }

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(token) for token in ids.tolist() if token > 2)


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_reader_returns_only_the_generated_text(encoder_decoder: bool) -> None:
    net = FixedModel([*map(ord, " SOUP"), 2], encoder_decoder)
    reader = OcrReader.from_modules(net, Letters(), tokens=9)
    assert reader(written("OPEN")) == "SOUP"
    assert net.options["eos_token_id"] == [1, 2] and net.options["max_new_tokens"] == 9
    assert not net.options["do_sample"]
