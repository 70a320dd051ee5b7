"""HPSv3 and GenEval 2: preprocessing equals the processors of transformers, scores equal the published forward passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

transformers = pytest.importorskip("transformers")

import tiny_vlms
from safetensors.torch import save_file
from tiny_images import noise
from tiny_rewards import TASK, clip, prompt_batch, random_images
from tiny_vlms import geneval2_parts, hpsv3_config, hpsv3_parts, hpsv3_words, tiny_geneval2, tiny_hpsv3
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from gdmd.config.rewards import CompositeConfig, GenEval2Config
from gdmd.plan.cost_model import REWARDS
from gdmd.recipes.build_rewards import check_prompts
from gdmd.rewards import convert as convert_module
from gdmd.rewards import hpsv3
from gdmd.rewards.base import computed_buffers
from gdmd.rewards.convert import convert, hpsv3_from_qwen
from gdmd.rewards.geneval2 import GenEval2, spellings
from gdmd.rewards.hpsv3 import AREA, HPSv3
from gdmd.rewards.preprocessing import CLIP_STD, AreaPreprocess, from_pil, to_pil
from gdmd.rewards.vlm import image_positions, patches

TEXTS = ("a red dog", "two cats on a bench in the rain")
QUESTIONS = [[["How many dogs?", "two"], ["Is it red?", "Yes"]], [["Are there cats?", "Yes"]]]
HPS3 = AreaPreprocess(28, AREA, AREA)
QWEN3 = AreaPreprocess(32, 256 * 256, 4096 * 4096, (0.5,) * 3, (0.5,) * 3)
SIZES = [(448, 448), (512, 512), (1024, 768), (300, 411), (61, 83), (90, 700), (1344, 28), (455, 441)]


def processor(preprocess: AreaPreprocess) -> Any:
    """transformers' own, with the same settings."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": preprocess.smallest, "longest_edge": preprocess.largest},
        patch_size=preprocess.multiple // 2,
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )


def vision(size: int) -> Any:
    return transformers.Qwen2VLConfig(vision_config={"patch_size": size}).vision_config


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("preprocess", [HPS3, QWEN3])
def test_sizes_equal_smart_resize(preprocess: AreaPreprocess) -> None:
    rng = np.random.default_rng(0)
    for height, width in [*SIZES, *rng.integers(10, 5000, (300, 2)).tolist()]:
        if max(height, width) <= 200 * min(height, width):
            limits = (preprocess.multiple, preprocess.smallest, preprocess.largest)
            assert preprocess.resized(height, width) == smart_resize(height, width, *limits)
    with pytest.raises(ValueError, match="900 x 4 pixels is too narrow"):
        preprocess.resized(4, 900)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preprocess", [HPS3, QWEN3])
def test_patches_equal_the_processor(preprocess: AreaPreprocess, size: tuple[int, int]) -> None:
    """The PIL path is equal for every size."""
    theirs = processor(preprocess)(noise(*size), return_tensors="pt")
    ours = patches(preprocess.pil([noise(*size)]), vision(preprocess.multiple // 2))
    assert theirs["image_grid_thw"].prod() == ours.shape[1]
    torch.testing.assert_close(ours[0], theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("preprocess", "size"), [(HPS3, (448, 448)), (QWEN3, (512, 768))])
def test_tensors_without_a_resize_equal_the_processor(preprocess: AreaPreprocess, size: tuple[int, int]) -> None:
    theirs = processor(preprocess)(noise(*size), return_tensors="pt")["pixel_values"]
    ours = patches(preprocess.tensor(from_pil([noise(*size)])), vision(preprocess.multiple // 2))
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (301, 413), (64, 96), "noise"])
def test_tensors_differ_from_pil_by_8_bit_rounding_only(size: Any) -> None:
    image = noise(500, 512) if size == "noise" else to_pil(random_images(1, *size))[0]
    std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    difference = (HPS3.pil([image]) - HPS3.tensor(from_pil([image]))) * std * 255
    assert difference.abs().mean() < 0.35 and difference.abs().max() <= 1.5


def test_positions_equal_those_of_the_model() -> None:
    net, words = geneval2_parts()
    image = words.convert_tokens_to_ids("<|image_pad|>")
    ids = torch.tensor([[1, 2, *[image] * 6, 3, 4, 5], [7, 7, *[image] * 6, 8, 0, 0]])
    mask = (ids != 0).long()
    types = (ids == image).int()
    grid = torch.tensor([[1, 4, 6]] * 2)
    theirs, _ = net.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask)
    ours = image_positions(ids == image, (2, 3))
    assert torch.equal(ours * mask, theirs * mask)


# ---------------------------------------------------------------- HPSv3


def published_hpsv3(net: Any, words: Any, head: Any, image: Image.Image, text: str) -> Tensor:
    """mu in float64: the backbone from embeddings, positions counted by the text model, alone in its batch."""
    inputs = processor(HPS3)(image, return_tensors="pt")
    placeholder = "<|image_pad|>" * int(inputs["image_grid_thw"].prod() // 4)
    chat = hpsv3.message(text).replace("<|image_pad|>", placeholder)
    ids = words.tokenizer(chat, return_tensors="pt")["input_ids"]
    seen = net.get_image_features(inputs["pixel_values"].double(), inputs["image_grid_thw"]).pooler_output
    embedded = net.get_input_embeddings()(ids)
    embedded[ids == net.config.image_token_id] = torch.cat(list(seen))
    h = net.language_model(inputs_embeds=embedded).last_hidden_state[ids == words.first_token(hpsv3.REWARD)]
    assert len(h) == 1
    for layer in (head[0], head[2]):
        h = (h @ layer.weight.double().T + layer.bias.double()).clamp(min=0)
    return (h @ head[4].weight.double().T + head[4].bias.double())[0, 0]


@torch.no_grad()
def test_hpsv3_equals_the_published_forward_pass() -> None:
    """Images of two shapes, which are padded together, against one image at a time."""
    images = [noise(448, 448), noise(300, 500), noise(1024, 1024)]
    texts = [*TEXTS, "a"]
    scores = tiny_hpsv3().score_pil(images, texts)
    net, words, head = hpsv3_parts()
    net.double()
    expected = [published_hpsv3(net, words, head, image, text) for image, text in zip(images, texts, strict=True)]
    torch.testing.assert_close(scores.double(), torch.stack(expected), rtol=0, atol=2e-5)
    assert scores.std() > 1e-3


def test_hpsv3_reads_the_instruction_the_prompt_and_its_own_token() -> None:
    text = hpsv3.message("a {red} dog")
    end = "Please provide the overall ratings of this image: <|Reward|>\n\nEND\n<|im_end|>"
    assert f"Textual prompt - a {{red}} dog\n\n\n\n{end}" in text
    assert len(hpsv3._INSTRUCTION) == 2507 and text.count("<|image_pad|>") == 1
    reward, image = tiny_hpsv3(), random_images(1)
    plain, named = (reward.score(image, prompt_batch([text])) for text in ("a", "a <|Reward|> b"))
    assert plain != named and named.isfinite()


def published_file(net: Any, head: Any, old_names: bool) -> dict[str, Tensor]:
    """The tensors of HPSv3.safetensors, as transformers below or above 4.52 names them."""
    parts = ("visual.", "model.") if old_names else ("model.visual.", "model.language_model.")
    named = {}
    for key, value in net.state_dict().items():
        part, _, rest = key.partition(".")
        named[parts[part == "language_model"] + rest] = value
    return named | {f"rm_head.{k}": v for k, v in head.state_dict().items()} | {"lm_head.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("old_names", [True, False])
@torch.no_grad()
def test_converted_hpsv3_equals_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_names: bool) -> None:
    net, words, head = hpsv3_parts()
    config = hpsv3_config(len(words.tokenizer), net.config.image_token_id)
    monkeypatch.setattr(convert_module, "CONFIG", config)
    hpsv3_words().save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    save_file(published_file(net, head, old_names), tmp_path / "HPSv3.safetensors")
    folder = convert("hpsv3", tmp_path / "HPSv3.safetensors", tmp_path / "made", str(tmp_path / "words"))
    assert json.loads((folder / "converted.json").read_text())["file"] == "HPSv3.safetensors"
    reward, images, rounded = HPSv3(path=str(folder), dtype="fp32"), random_images(2), tiny_hpsv3()
    for _, _, frequencies in computed_buffers(rounded.loaded.net):
        frequencies.copy_(frequencies.bfloat16())
    expected = rounded.score(images, prompt_batch(TEXTS))
    assert torch.equal(reward.score(images, prompt_batch(TEXTS)), expected)
    assert not torch.equal(tiny_hpsv3().score(images, prompt_batch(TEXTS)), expected)
    other = hpsv3_words()
    other.add_tokens(["<|more|>"])
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights of HPSv3 have [\d,]+ tokens, but the tokenizer with <.Reward.> has"):
        HPSv3(path=str(folder)).loaded  # noqa: B018


def test_files_that_are_not_hpsv3(tmp_path: Path) -> None:
    net, words, head = hpsv3_parts()
    config = hpsv3_config(len(words.tokenizer), net.config.image_token_id)
    good = published_file(net, head, True)
    assert len(hpsv3_from_qwen(good, config)) == len(good) - 1
    with pytest.raises(ValueError, match="unexpected keys.*surprise"):
        hpsv3_from_qwen(good | {"surprise": torch.zeros(1)}, config)
    for broken in ({"rm_head.5.bias": torch.zeros(3)}, {"visual.more": torch.zeros(1)}):
        with pytest.raises(ValueError, match="not HPSv3: 1 tensors are missing, unknown or of another shape"):
            hpsv3_from_qwen(good | broken, config)
    del good["model.norm.weight"]
    with pytest.raises(ValueError, match="such as .'language_model.norm.weight'"):
        hpsv3_from_qwen(good, config)
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cut.safetensors cannot be read"):
        convert("hpsv3", tmp_path / "cut.safetensors", tmp_path / "made")


def test_published_size_of_hpsv3() -> None:
    """736 tensors, as in the released file; the one that is left out predicts tokens."""
    with torch.device("meta"):
        backbone = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**hpsv3.CONFIG)).state_dict()
        head = hpsv3.preference_head(3584).state_dict()
    assert len(backbone) + len(head) + 1 == 736
    assert sum(t.numel() for t in backbone.values()) == REWARDS["hpsv3"].weights


# ---------------------------------------------------------------- GenEval 2


def published_soft_tifa(net: Any, words: Any, image: Image.Image, pairs: list[list[str]]) -> list[float]:
    """Probabilities of the answers, one question at a time, with the positions and the softmax of the model itself."""
    inputs = processor(QWEN3)(image, return_tensors="pt")
    found = []
    for question, answer in pairs:
        placeholder = "<|image_pad|>" * int(inputs["image_grid_thw"].prod() // 4)
        seen = f"<|vision_start|>{placeholder}<|vision_end|>"
        chat = f"<|im_start|>user\n{seen}{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
        ids = words(chat, return_tensors="pt")["input_ids"]
        types = (ids == net.config.image_token_id).int()
        logits = net(
            input_ids=ids,
            mm_token_type_ids=types,
            pixel_values=inputs["pixel_values"].double(),
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0, -1]
        ways = {"two": ["two", "Two", " two", " Two", "2", " 2"], "Yes": ["Yes", "yes", " yes", " Yes"]}[answer]
        tokens = {words.encode(way)[0] for way in ways}
        found.append(float(sum(logits.softmax(-1)[token] for token in tokens)))
    return found


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@torch.no_grad()
def test_geneval2_equals_the_published_evaluation(mean: Any) -> None:
    images = [noise(256, 320), noise(300, 290)]
    meta = [{"vqa_list": own} for own in QUESTIONS]
    scores = tiny_geneval2(mean=mean, chunk=2).score_pil(images, TEXTS, meta)
    net, words = geneval2_parts()
    net.double()
    parts = [published_soft_tifa(net, words, image, own) for image, own in zip(images, QUESTIONS, strict=True)]
    geometric = [math.prod(own) ** (1 / len(own)) for own in parts]
    expected = geometric if mean == "geometric" else [sum(own) / len(own) for own in parts]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4) and min(expected) > 0


@pytest.mark.parametrize("make", [tiny_geneval2, tiny_hpsv3])
def test_frequencies_of_positions_stay_exact(make: Any) -> None:
    """They stay fp32, as in from_pretrained; ``Module.to`` would round them to bf16."""
    exact = [value.clone() for _, _, value in computed_buffers(make().loaded.net)]
    rounded = make(dtype="bf16").loaded.net
    assert len(exact) == 4 and any(not torch.equal(one, one.bfloat16().float()) for one in exact)
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(exact, computed_buffers(rounded), strict=True))
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


def test_spellings_of_an_answer() -> None:
    assert set(spellings("seven")) == {"seven", "Seven", " seven", " Seven", "7", " 7"}
    assert set(spellings("Yes")) == {"yes", "Yes", " yes", " Yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "geneval2 needs questions with every prompt, but 'a red dog' has no list 'vqa_list'"),
        ({"vqa_list": []}, "has no list 'vqa_list'"),
        ({"vqa_list": [["Is it red?"]]}, r"has \['Is it red\?'\]; write \[question, answer\]"),
        ({"vqa_list": [["Is it red?", " "]]}, "with an answer of one word"),
    ],
)
def test_prompts_without_questions_are_an_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_geneval2().score(random_images(1), prompt_batch(["a red dog"], [row]))


def test_training_prompts_without_questions_are_an_error() -> None:
    """The error comes before training, not when such a prompt is drawn."""
    spec = GenEval2Config()
    for specs in ([spec], [CompositeConfig.model_validate({"parts": [{"reward": spec.model_dump()}]})]):
        check_prompts(specs, ["a dog", "two cats"], [TASK, TASK])
        for rows in ([TASK, {}], None):
            with pytest.raises(ValueError, match="has no list 'vqa_list'"):
                check_prompts(specs, ["a dog", "two cats"], rows)


def test_geneval2_from_a_folder(tmp_path: Path) -> None:
    reward = GenEval2(path=str(tiny_vlms.save_geneval2(tmp_path / "vlm")), dtype="fp32")
    images, prompts = random_images(2), prompt_batch(TEXTS, [TASK, TASK])
    torch.testing.assert_close(reward.score(images, prompts), tiny_geneval2().score(images, prompts))
    clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="it is a clip; geneval2 needs a Qwen3-VL"):
        GenEval2(path=str(tmp_path / "clip")).loaded  # noqa: B018
