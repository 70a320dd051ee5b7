"""Converted networks equal independent implementations of the originals, and nothing but tensors is read from a .pt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.rewards.aesthetic import linear_head
from gdmd.rewards.convert import (
    aesthetic_from_layers,
    clip_config,
    clip_from_open_clip,
    convert,
    imagereward_from_blip,
    read_published,
)

transformers = pytest.importorskip("transformers")

import tiny_rewards
from tiny_rewards import WORDS, prompt_batch, words_of_clip

WIDTH, LAYERS, HEADS, LENGTH = 32, 2, 16, 7


class Block(nn.Module):
    """open_clip's residual block, under its names, in torch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 64), "c_proj": nn.Linear(64, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer()
        self.proj = nn.Parameter(torch.randn(WIDTH, 12))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP written from its paper (arXiv 2103.00020, figure 3) under open_clip's names."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = Visual(), Transformer()
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 12))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def text(self, ids: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


class TimmBlock(nn.Module):
    """BLIP's vision block under timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 64), "fc2": nn.Linear(64, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, 4, WIDTH // 4))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attention = (q @ k.mT / (WIDTH // 4) ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((attention @ v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 16, 16)})
        self.blocks = nn.ModuleList(TimmBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def wild(net: nn.Module) -> Any:
    """Randomize all weights, so that swapped tensors cannot hide behind ones and zeros."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.double().eval()


def save_pt(path: Path, content: Any) -> Path:
    saver = getattr(torch, "save")  # noqa: B009 (as a third party saved it; the package itself never pickles)
    saver(content, path)
    return path


@torch.no_grad()
def test_converted_open_clip_equals_the_original() -> None:
    theirs = wild(OpenClip())
    named = clip_from_open_clip(theirs.state_dict())
    config = transformers.CLIPConfig(**clip_config(named))
    ours = transformers.CLIPModel(config).double().eval()
    ours.load_state_dict(named)
    pixels = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    ids = torch.randint(1, WORDS - 1, (3, LENGTH))
    ids[:, 4] = WORDS - 1  # the end of the text is its largest id
    seen, read = ours.get_image_features(pixel_values=pixels), ours.get_text_features(input_ids=ids)
    torch.testing.assert_close(seen.pooler_output, theirs.visual(pixels), rtol=0, atol=1e-10)
    torch.testing.assert_close(read.pooler_output, theirs.text(ids), rtol=0, atol=1e-10)
    assert ours.logit_scale == theirs.logit_scale


def blip_file(towers: Any, head: nn.Module, vit: nn.Module) -> dict[str, Tensor]:
    """What an ImageReward.pt holds, the projections and buffers that scoring does not use included."""
    return {
        **{f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()},
        **{f"blip.text_encoder.{k}": v for k, v in towers.text.state_dict().items()},
        **{f"mlp.layers.{k}": v for k, v in head.state_dict().items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(4)[None],
        "blip.vision_proj.weight": torch.zeros(2, 2),
        "blip.text_proj.bias": torch.zeros(2),
    }


def small_towers() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from gdmd.rewards.imagereward import TEXT, VISION, ImageRewardTowers

    small = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    vision = VISION | small | {"image_size": 64}
    text = TEXT | small | {"vocab_size": WORDS, "encoder_hidden_size": WIDTH}
    return ImageRewardTowers(vision, text), vision, text


@torch.no_grad()
def test_converted_imagereward_equals_the_original() -> None:
    towers, _, _ = small_towers()
    vit, head, towers = wild(TimmVit()), linear_head(WIDTH), wild(towers)
    named = imagereward_from_blip(blip_file(towers, head, vit))
    split = {part: {k[len(part) :]: v for k, v in named.items() if k.startswith(part)} for part in ("mlp.", "text.")}
    other = small_towers()[0].double().eval()
    other.load_state_dict({k: v for k, v in named.items() if not k.startswith("mlp.")})
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(other.vision(pixel_values=pixels).last_hidden_state, vit(pixels), rtol=0, atol=1e-10)
    assert all(torch.equal(split["text."][k], v) for k, v in towers.text.state_dict().items())
    assert all(torch.equal(split["mlp."][k], v) for k, v in head.state_dict().items())


def test_missing_and_unexpected_keys() -> None:
    tensors = OpenClip().state_dict()
    with pytest.raises(ValueError, match="unexpected keys.*surprise"):
        clip_from_open_clip({**tensors, "surprise.weight": torch.zeros(1)})
    del tensors["visual.ln_post.bias"]
    with pytest.raises(ValueError, match=r"have no 'visual.ln_post.bias'"):
        clip_from_open_clip(tensors)
    with pytest.raises(ValueError, match="not D-1024-128-64-16-1"):
        aesthetic_from_layers({"layers.0.weight": torch.zeros(3, 3), "layers.0.bias": torch.zeros(3)})


def test_only_tensors_are_read(tmp_path: Path) -> None:
    good = save_pt(tmp_path / "good.pt", {"state_dict": {"module.a": torch.ones(2)}})
    assert torch.equal(read_published(good)["a"], torch.ones(2))
    with pytest.raises(ValueError, match="could run code; refused"):
        read_published(save_pt(tmp_path / "bad.pt", {"a": Path("x")}))
    with pytest.raises(ValueError, match="not a dictionary of tensors"):
        read_published(save_pt(tmp_path / "odd.pt", {"a": 1}))
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.pt"):
        read_published(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="no such file"):
        read_published(tmp_path / "none.pt")


def test_converted_aesthetic_head_equals_the_original(tmp_path: Path) -> None:
    from gdmd.rewards.aesthetic import Aesthetic

    tiny_rewards.clip(tmp_path / "clip")
    head = linear_head(16)
    source = save_pt(tmp_path / "head.pth", {f"layers.{k}": v for k, v in head.state_dict().items()})
    folder = convert("aesthetic", source, tmp_path / "made")
    reward = Aesthetic(path=str(folder), clip=str(tmp_path / "clip"))
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in reward.loaded.head.state_dict().items())  # type: ignore[union-attr]
    facts = json.loads((folder / "converted.json").read_text())
    assert facts["reward"] == "aesthetic" and len(facts["sha256"]) == 64
    with pytest.raises(ValueError, match="is not empty"):
        convert("aesthetic", source, folder)
    with pytest.raises(ValueError, match="needs no conversion"):
        convert("clip", source, tmp_path / "other")


def test_hps_folder_is_complete(tmp_path: Path) -> None:
    from gdmd.rewards.hps import HPSv2

    (tmp_path / "words").mkdir()
    words_of_clip(tmp_path / "words")
    net = wild(OpenClip()).float()
    tensors = net.state_dict() | {"positional_embedding": torch.randn(77, WIDTH)}
    folder = convert(
        "hps", save_pt(tmp_path / "h.pt", {"state_dict": tensors}), tmp_path / "hps", str(tmp_path / "words")
    )
    reward = HPSv2(path=str(folder))
    assert reward.preprocess.size == 64 and reward.preprocess.fit == "pad"
    scores = reward.score(torch.rand(2, 3, 40, 50), prompt_batch(("abc", "ked")))
    assert scores.shape == (2,) and scores.abs().max() <= 1
