"""CLIPScore, HPSv2, PickScore, ImageReward and aesthetic on tiny random modules: formula, batch, gradient, faults."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gdmd.rewards.aesthetic import Aesthetic, linear_head
from gdmd.rewards.base import Placement, PretrainedReward
from gdmd.rewards.clean import open_clip_clean
from gdmd.rewards.clip import ClipScore
from gdmd.rewards.hps import Hps
from gdmd.rewards.pickscore import PickScore
from gdmd.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocess, from_pil, to_pil
from gdmd.rewards.weights import PaddedTokenizer
from gdmd.types import PromptBatch

pytest.importorskip("transformers")
TEXTS = ("a red dog", "two cats", "a photo of a bench", "a blue car left of a tree")
WORDS, LENGTH = 64, 9


def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
    """Begin, one number per letter, end (the largest id) and padding with the end, as CLIP's tokenizer does."""
    rows = [[62] + [ord(letter) % 60 for letter in text[: LENGTH - 2]] + [63] for text in texts]
    ids = torch.tensor([row + [63] * (LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def tiny_clip(seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=small | {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "eos_token_id": 63},
        vision_config=small | {"image_size": 224, "patch_size": 56},
        projection_dim=16,
    )
    return CLIPModel(config).eval()


def tiny_imagereward(placement: Placement) -> PretrainedReward:
    from gdmd.rewards.imagereward import TEXT, VISION, ImageReward, ImageRewardTowers

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    towers = ImageRewardTowers(
        VISION | small | {"patch_size": 56}, TEXT | small | {"vocab_size": WORDS, "encoder_hidden_size": 32}
    )
    return ImageReward.from_modules(towers, linear_head(32), tokenize, placement)


def tiny_aesthetic(placement: Placement) -> PretrainedReward:
    torch.manual_seed(4)
    return Aesthetic.from_modules(tiny_clip(), linear_head(16), placement)


MAKERS: dict[str, Callable[[Placement], PretrainedReward]] = {
    "clip": lambda placement: ClipScore.from_modules(tiny_clip(), tokenize, placement),
    "hps": lambda placement: Hps.from_modules(tiny_clip(), tokenize, placement),
    "pickscore": lambda placement: PickScore.from_modules(tiny_clip(), tokenize, placement),
    "imagereward": tiny_imagereward,
    "aesthetic": tiny_aesthetic,
}
KINDS = tuple(MAKERS)


def make(kind: str, **placement: Any) -> PretrainedReward:
    return MAKERS[kind](Placement(**placement))


def batch_of(texts: Sequence[str]) -> PromptBatch:
    index = torch.arange(len(texts))
    return PromptBatch(index, tuple(texts), index, {}, {})


def pictures(count: int = 4, height: int = 61, width: int = 83, seed: int = 0) -> Tensor:
    """Smooth random pictures in [0, 1] with full contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 9, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear")


def tall_noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(("height", "width"), [(512, 512), (512, 768), (301, 413), (64, 96), (225, 227)])
def test_the_two_paths_of_the_crop_differ_by_8_bit_rounding_only(height: int, width: int) -> None:
    picture = to_pil(pictures(1, height, width))[0]
    how = Preprocess()
    std = torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    apart = ((how.pil([picture]) - how.tensor(from_pil([picture]))) * std * 255).abs()
    assert apart.mean() < 0.35 and apart.max() <= 1.5


def test_the_worst_case_for_the_two_paths_stays_within_the_stated_bound() -> None:
    picture = tall_noise(448, 512)  # noise overshoots most
    how = Preprocess()
    apart = (how.pil([picture]) - how.tensor(from_pil([picture]))) * torch.tensor(CLIP_STD).view(1, 3, 1, 1) * 255
    assert apart.abs().mean() < 0.35 and apart.abs().max() <= 1.5


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 411), (411, 300), (100, 224)])
def test_the_reporting_path_is_that_of_transformers_own_clip_processor(height: int, width: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = tall_noise(height, width)
    theirs = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preprocess(corner="floor").pil([picture]), theirs, rtol=0, atol=1e-6)


def test_the_corner_of_an_odd_crop_is_rounded_half_to_even_or_down() -> None:
    wide = tall_noise(224, 227)  # 3 pixels to cut: round(1.5) = 2, 3 // 2 = 1
    own = from_pil([wide])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    for corner, left in (("round", 2), ("floor", 1)):
        want = (own[..., left : left + 224] - mean) / std
        torch.testing.assert_close(Preprocess(corner=corner).pil([wide]), want)  # type: ignore[arg-type]
        torch.testing.assert_close(Preprocess(corner=corner).tensor(own), want)  # type: ignore[arg-type]


def test_the_padding_keeps_the_whole_image_and_fills_with_black_before_normalizing() -> None:
    how = Preprocess(fit="pad")
    image = pictures(1, 112, 224)
    pixels = how.tensor(image)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(pixels[..., 56:168, :], (image - mean) / std)  # longest side is 224: nothing is resized
    torch.testing.assert_close(pixels[..., :56, :], (-mean / std).expand(1, 3, 56, 224))
    assert how.tensor(pictures(1, 301, 77)).shape == (1, 3, 224, 224)
    picture = tall_noise(301, 77)
    assert torch.equal(how.pil([picture]), how.tensor(from_pil([picture])))


def test_8_bit_images_survive_the_way_to_pil_and_back() -> None:
    picture = tall_noise(20, 30)
    assert np.array_equal(np.asarray(to_pil(from_pil([picture]))[0]), np.asarray(picture))


# ---------------------------------------------------------------- formulas in float64


def normalized(vector: Tensor) -> Tensor:
    return vector / vector.square().sum(-1, keepdim=True).sqrt()


def cosines(model: Any, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
    """From the towers and projections, without get_*_features."""
    model = model.double()
    seen = model.vision_model(pixel_values=pixels.double()).pooler_output @ model.visual_projection.weight.T
    states = model.text_model(**tokens).last_hidden_state
    ends = (tokens["input_ids"] == 63).int().argmax(1)
    read = states[torch.arange(len(ends)), ends] @ model.text_projection.weight.T
    return (normalized(seen) * normalized(read)).sum(-1)


@pytest.mark.parametrize(("kind", "scaled"), [("clip", False), ("hps", False), ("pickscore", True)])
@torch.no_grad()
def test_a_dual_encoder_gives_its_formula_computed_in_float64(kind: str, scaled: bool) -> None:
    reward, images = make(kind), pictures()
    scores = reward.score(images, batch_of(TEXTS))
    want = cosines(tiny_clip(), reward.preprocess.tensor(images), tokenize(TEXTS))
    if scaled:
        want = want * np.exp(2.6592)  # the log of 1 / 0.07, CLIP's initial scale
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=2e-5 if scaled else 1e-6)
    assert scaled or scores.abs().max() <= 1


@torch.no_grad()
def test_the_aesthetic_head_is_one_affine_map_of_the_unit_embedding() -> None:
    reward, images = make("aesthetic"), pictures()
    scores = reward.score(images, batch_of(TEXTS))
    model, head = tiny_clip().double(), reward.loaded.head
    pixels = reward.preprocess.tensor(images).double()
    x = normalized(model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T)
    for layer in head.children():  # type: ignore[union-attr]
        x = x @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(scores.double(), x[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(scores, reward.score(images, batch_of(tuple(reversed(TEXTS)))))


@torch.no_grad()
def test_imagereward_standardizes_the_heads_answer_on_the_cls_state() -> None:
    reward, images = make("imagereward"), pictures()
    scores = reward.score(images, batch_of(TEXTS))
    tokens, towers = tokenize(TEXTS), reward.loaded.net.double()
    states = towers.text(
        **tokens,
        encoder_hidden_states=towers.vision(reward.preprocess.tensor(images).double()).last_hidden_state,
        is_decoder=False,
    ).last_hidden_state
    x = states[:, 0]
    for layer in reward.loaded.head.children():  # type: ignore[union-attr]
        x = x @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(scores.double(), (x[:, 0] - 0.16717362830052426) / 1.0333394966054072, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what every reward promises


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_neither_on_its_neighbors_nor_on_their_order_nor_on_the_chunk(kind: str) -> None:
    reward, images = make(kind), pictures()
    together = reward.score(images, batch_of(TEXTS))
    alone = torch.cat([reward.score(images[i : i + 1], batch_of(TEXTS[i : i + 1])) for i in range(4)])
    turned = reward.score(images.flip(0), batch_of(TEXTS[::-1])).flip(0)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(alone, together, **close)
    torch.testing.assert_close(turned, together, **close)
    torch.testing.assert_close(make(kind, chunk=3).score(images, batch_of(TEXTS)), together, **close)
    assert together.dtype == torch.float32 and together.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_image_and_no_weight_and_is_that_of_finite_differences(kind: str) -> None:
    reward, images = make(kind), pictures().requires_grad_()
    scores = reward.score(images, batch_of(TEXTS))
    (slope,) = torch.autograd.grad(scores.sum(), images)
    assert (slope.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad for p in reward.loaded.net.parameters())
    step = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        up, down = (reward.score(images + sign * step, batch_of(TEXTS)).double().sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (slope * step).sum().double(), rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_give_nearly_the_same_scores_in_fp32_and_the_callers_autocast_changes_nothing(kind: str) -> None:
    images = pictures()
    full = make(kind).score(images, batch_of(TEXTS))
    small = make(kind, dtype=torch.bfloat16).score(images, batch_of(TEXTS))
    assert small.dtype == torch.float32
    torch.testing.assert_close(small, full, rtol=0.03, atol=0.03 * max(1.0, float(full.abs().max())))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(kind).score(images, batch_of(TEXTS)), full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_is_an_error_that_names_its_position_and_prompt(kind: str) -> None:
    images = pictures()
    images[2, 0, 30, 40] = float("nan")
    with pytest.raises(
        ValueError, match=rf"{kind} gave a score that is not finite at samples 2 \('a photo of a bench'\)"
    ):
        make(kind).score(images, batch_of(TEXTS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_of_reports_agrees_with_the_path_of_training(kind: str) -> None:
    reward = make(kind)
    saved = to_pil(pictures())
    torch.testing.assert_close(
        reward.score_pil(saved, TEXTS), reward.score(from_pil(saved), batch_of(TEXTS)), rtol=2e-3, atol=2e-3
    )


def test_wrong_shapes_and_counts_are_user_errors() -> None:
    reward = make("clip")
    with pytest.raises(ValueError, match=r"images \[B, 3, H, W\].*got \[4, 1, 61, 83\]"):
        reward.score(pictures()[:, :1], batch_of(TEXTS))
    with pytest.raises(ValueError, match="4 images for 3 prompts"):
        reward.score(pictures(), batch_of(TEXTS[:3]))
    with pytest.raises(ValueError, match="torch.uint8"):
        reward.score((pictures() * 255).byte(), batch_of(TEXTS))


def test_weights_are_loaded_on_first_use_and_an_offloading_reward_gives_them_back_to_the_cpu() -> None:
    asked = []

    class Counting(ClipScore):
        def __init__(self, name: str, load: Any, placement: Placement) -> None:
            super().__init__(name, lambda: asked.append(1) or load(), placement)

    reward = Counting.from_modules(tiny_clip(), tokenize, Placement(offload=True))
    assert not asked
    with torch.no_grad():
        reward.score(pictures(), batch_of(TEXTS))
        reward.score(pictures(), batch_of(TEXTS))
    assert len(asked) == 1 and next(reward.loaded.net.parameters()).device.type == "cpu"


# ---------------------------------------------------------------- loading


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def letters() -> Any:
    """CLIP's tokenizer over single letters; the two special tokens come last, as in the published vocabulary."""
    from transformers import CLIPTokenizer

    signs = [chr(c) for c in range(33, 127)]
    vocab = {sign: i for i, sign in enumerate(signs + [sign + "</w>" for sign in signs])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def test_a_local_folder_is_loaded_without_the_network_and_shared_by_rewards_of_the_same_weights(
    tmp_path: Any, no_network: None
) -> None:
    from transformers import CLIPConfig, CLIPModel

    words = letters()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = small | {"vocab_size": len(words), "eos_token_id": words.eos_token_id}
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"patch_size": 56}, projection_dim=16)).eval()
    net.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    first, second = ClipScore.from_pretrained(str(tmp_path)), ClipScore.from_pretrained(str(tmp_path))
    scores = first.score(pictures(), batch_of(TEXTS))
    assert torch.equal(second.score(pictures(), batch_of(TEXTS)), scores)
    assert first.loaded.net is second.loaded.net
    picked = PickScore.from_pretrained(str(tmp_path))
    torch.testing.assert_close(picked.score(pictures(), batch_of(TEXTS)), net.logit_scale.exp() * scores)
    with pytest.raises(ValueError, match="no folder with weights"):
        ClipScore.from_pretrained(str(tmp_path / "missing"))


def test_a_hub_id_is_pinned_and_weights_that_need_conversion_say_how(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdmd.rewards.weights import CLIP_L, Hub, place_of

    assert place_of(None, None, CLIP_L).revision == CLIP_L.revision and len(CLIP_L.revision or "") == 40
    assert place_of(CLIP_L.name, None, CLIP_L).revision == CLIP_L.revision
    assert place_of("org/name", "v2", Hub("a/b", "c")).revision == "v2"
    assert place_of("org/name", None, Hub("a/b", "c")).revision is None
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    with pytest.raises(ValueError, match="gdmd rewards fetch hps.*gdmd rewards convert hps FILE"):
        Hps.from_pretrained()


# ---------------------------------------------------------------- texts

MERGES = {
    "i n": 512, "r e": 515, "a r": 516, "e r": 517, "i n</w>": 530, "i s</w>": 533, "\u00f0 \u0141": 558, "' s</w>": 568,
    "t o": 580, "i t</w>": 585, "a r</w>": 625, "d o": 639, "f u": 665, "p ar": 699, "a f": 702, "in e</w>": 715,
    "re d</w>": 736, "ar t</w>": 794, "l l</w>": 865, "r y</w>": 913, "fu ll</w>": 1476, "do g</w>": 1929,
    "\u00f0\u0141 \u0132": 2074, "j er": 2310, "b ar</w>": 2411, "to m</w>": 2435, "par is</w>": 3445, "c af": 3471,
    "f ine</w>": 3797, "\u00c3 \u00a9</w>": 4166, "jer ry</w>": 9164, "\u00f0\u0141\u0132 \u00b6</w>": 10631,
    "caf \u00c3\u00a9</w>": 15304,
}  # fmt: skip
"""Of CLIP's published vocabulary, those that the texts below need."""
OPEN_CLIP = {
    "a caf\u00c3\u00a9 &amp; a bar": [320, 15304, 261, 320, 2411],
    "Tom &amp;amp; Jerry": [2435, 261, 9164],
    "a  red\t dog\n": [320, 736, 1929],
    "a \U0001f436 in \u201cParis\u201d": [320, 10631, 530, 257, 3445, 257],
    "cafe\u0301 \uff46\uff55\uff4c\uff4c": [15304, 1476],
    "it&#39;s &lt;b&gt;": [585, 568, 283, 321, 285],
    "\ufb01ne &quot;art&quot;": [3797, 257, 794, 257],
}
"""What open_clip 3.3.0's tokenizer makes of them, without the two marks."""


def clip_words() -> Any:
    """CLIPTokenizer with the published ids of bytes, of MERGES and of the marks."""
    from transformers import CLIPTokenizer

    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = [chr(code) for code in printed] + [chr(256 + k) for k in range(256 - len(printed))]
    vocab = {sign: i for i, sign in enumerate(signs + [sign + "</w>" for sign in signs])}
    vocab |= {pair.replace(" ", ""): i for pair, i in MERGES.items()}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in MERGES], model_max_length=77)


def read_ids(tokenize: PaddedTokenizer, text: str) -> list[int]:
    rows = tokenize([text])
    return rows["input_ids"][0][rows["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("text", OPEN_CLIP)
def test_hps_reads_texts_as_open_clip_does(text: str) -> None:
    ids = read_ids(PaddedTokenizer(clip_words(), 77, open_clip_clean), text)
    assert ids == [49406, *OPEN_CLIP[text], 49407]


def saved_clip(folder: Path, positions: int = 77) -> None:
    from transformers import CLIPConfig, CLIPModel

    words = letters()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = small | {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "max_position_embeddings": positions}
    CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"patch_size": 56})).save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_clip_and_pickscore_read_texts_as_they_are_with_or_without_ftfy(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_clip(tmp_path)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenize = kind.from_pretrained(str(tmp_path)).loaded.tokenize
    assert read_ids(tokenize, "a&amp;b") != read_ids(tokenize, "a&b")
    with pytest.raises(ValueError, match="pip install ftfy"):
        Hps.from_pretrained(str(tmp_path)).loaded.tokenize(["a"])


@pytest.mark.parametrize(("kind", "positions"), [(ClipScore, 77), (PickScore, 40), (Hps, 77)])
def test_a_reward_says_once_which_prompts_it_cannot_read(
    tmp_path: Path, kind: Any, positions: int, caplog: pytest.LogCaptureFixture
) -> None:
    saved_clip(tmp_path, positions)
    reward = kind.from_pretrained(str(tmp_path))
    room = positions - 2
    texts = ["x" * room, "y" * room + "a", "y" * room + "b"]
    for _ in range(2):
        scores = reward.score(pictures(3), batch_of(texts))
    assert scores.isfinite().all()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "2 of 3 prompts are longer" in said and f"reward {reward.name} reads {room} tokens: 2 longer" in said
    assert "2 different prompts are the same" in said


# ---------------------------------------------------------------- golden scores


def test_golden_scores_are_reproduced_and_other_weights_are_found_out() -> None:
    from gdmd.rewards.golden import compare, record

    golden = record(make("hps"), {"weights": "tiny"})
    assert len(golden["entries"]) == 5 and golden["weights"] == "tiny" and golden["entries"][3]["prompt"] == ""
    assert not compare(make("hps"), golden)
    apart = compare(Hps.from_modules(tiny_clip(seed=9), tokenize), golden)
    assert {one.path for one in apart} == {"pil", "tensor"} and apart[0].recorded != apart[0].found
    with pytest.raises(ValueError, match="golden scores of hps, not of clip"):
        compare(make("clip"), golden)
    with pytest.raises(ValueError, match="not a file of golden scores"):
        compare(make("hps"), {"format": "other"})
    golden["entries"][1]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="golden entry 1 is of another image"):
        compare(make("hps"), golden)


def test_the_golden_images_are_the_same_bytes_on_every_machine() -> None:
    import hashlib

    from gdmd.rewards.golden import golden_images

    joined = hashlib.sha256(b"".join(image.tobytes() for image in golden_images())).hexdigest()
    assert joined == "de91cf507f680954c05cdb6bcb1a74d45efe16796d816a40221f45fc4c9c3d83"
