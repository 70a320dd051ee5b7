"""The scoring networks of the Shapes world: two different dual encoders and a preference model tuned from the first.

All keep positions: image features are a grid that is read out with positions, not averaged. No batch statistics, so a
score does not depend on the other samples of its batch. fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd.diffusion.device import to_device_async
from gdmd.shapes.grammar import CAPTION_TOKENS, WORDS
from gdmd.shapes.render import BACKGROUND

Kind = Literal["shapes_clip", "shapes_clip_heldout", "shapes_pref"]
KINDS: tuple[Kind, ...] = ("shapes_clip", "shapes_clip_heldout", "shapes_pref")
GRID = 4  # cells per side of the image towers' feature grid: one cell is about one object
FEATURES = 128
FIRST_SCALE = 10.0  # initial inverse temperature of the contrastive loss (learned)


def centered(images: Tensor) -> Tensor:
    """Images with the background at 0 and values of about 1 on objects, so that colors dominate."""
    background = to_device_async(torch.tensor(BACKGROUND), images.device)[:, None, None]
    return (2.5 * (images - background)).contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """One pre-norm transformer block, [B, L, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_mix, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm_mix(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # [B, heads, L, width / heads] each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.merge(mixed)
        x = x + self.mlp(self.norm_mlp(x))
        return x


class Stem(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] -> GRID * GRID tokens with learned positions, [B, 16, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 32, 6, 2, 2),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(64, width, 2, 2),
        )
        self.place = nn.Parameter(0.1 * torch.randn(GRID * GRID, width))

    def forward(self, images: Tensor) -> Tensor:
        cells = self.convs(centered(images))
        tokens: Tensor = cells.flatten(2).mT + self.place
        return tokens


class Words(nn.Module):
    """Tokens [B, 8] -> embeddings with learned positions, [B, 8, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS), width)
        self.place = nn.Parameter(0.1 * torch.randn(CAPTION_TOKENS, width))
        nn.init.normal_(self.table.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.table(tokens) + self.place
        return embedded


class PatchTower(nn.Module):
    """Convolutional stem, transformer over the 4 x 4 grid, all cells read out by one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        width = 96
        self.stem = Stem(width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4), nn.LayerNorm(width))
        self.read = nn.Linear(GRID * GRID * width, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.read(self.blocks(self.stem(images)).flatten(1))
        return features  # [B, FEATURES]


class SentenceTower(nn.Module):
    """Transformer over the words, all positions read out by one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.words = Words(width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4), nn.LayerNorm(width))
        self.read = nn.Linear(CAPTION_TOKENS * width, FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.read(self.blocks(self.words(tokens)).flatten(1))
        return features  # [B, FEATURES]


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return x + change


class ConvTower(nn.Module):
    """A small residual network whose last 4 x 4 grid is flattened, which keeps positions; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, 2, 1),
            Residual(48),
            nn.SiLU(),
            nn.Conv2d(48, 80, 3, 2, 1),
            Residual(80),
        )
        self.read = nn.Sequential(nn.Linear(80 * GRID * GRID, 192), nn.SiLU(), nn.Linear(192, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        grid = self.body(centered(images))
        features: Tensor = self.read(grid.flatten(1))
        return features  # [B, FEATURES]


class BagTower(nn.Module):
    """Word embeddings with positions, concatenated and read by an MLP; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words(24)
        hidden = 256
        self.read = nn.Sequential(
            nn.Linear(CAPTION_TOKENS * 24, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, FEATURES),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.read(self.words(tokens).flatten(1))
        return features  # [B, FEATURES]


class DualEncoder(nn.Module):
    """score(image, caption) = cosine of the two towers' features, in [-1, 1] (CLIP, arXiv 2103.00020)."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE).log())

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> unit vectors [B, D]."""
        return F.normalize(self.image(images), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """[B, 8] -> unit vectors [B, D]."""
        return F.normalize(self.text(tokens), dim=-1)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Scores of images against text features [B, D] (computed once per caption), [B]."""
        return (self.image_features(images) * text).sum(-1)


class Preference(nn.Module):
    """r(image, caption) = exp(log_scale) * cosine of two towers + quality of the image's features, [B].

    A fine-tuned dual encoder, as HPSv2 (arXiv 2306.09341) and PickScore (arXiv 2305.01569) are; the quality term sees no
    caption. After training ``origin`` is set to the mean r of true renders, and ``unit`` to the difference of r that
    the training labels assign to one wrong attribute. ``forward`` gives 1 + (r - origin) / unit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.match = DualEncoder(PatchTower(), SentenceTower())
        self.quality = nn.Sequential(nn.Linear(FEATURES, 64), nn.SiLU(), nn.Linear(64, 1))
        self.register_buffer("origin", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))

    def text_features(self, tokens: Tensor) -> Tensor:
        """[B, 8] -> unit vectors [B, D]."""
        return self.match.text_features(tokens)

    def raw(self, images: Tensor, text: Tensor) -> Tensor:
        """The Bradley-Terry score before calibration, against text features [B, D]: [B]."""
        seen = self.match.image(images)
        cosine = (F.normalize(seen, dim=-1) * text).sum(-1)
        score: Tensor = self.match.log_scale.exp() * cosine + self.quality(seen)[:, 0]
        return score

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Scores of images against text features [B, D], [B]."""
        origin, unit = self.get_buffer("origin"), self.get_buffer("unit")
        return 1 + (self.raw(images, text) - origin) / unit


def build_net(kind: Kind, seed: int = 0) -> DualEncoder | Preference:
    """The untrained network of a kind; its weights depend on ``seed`` only. ValueError for an unknown kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match kind:
            case "shapes_clip":
                return DualEncoder(PatchTower(), SentenceTower())
            case "shapes_clip_heldout":
                return DualEncoder(ConvTower(), BagTower())
            case "shapes_pref":
                return Preference()
    raise ValueError(f"unknown scorer {kind!r}; the Shapes scorers are {', '.join(KINDS)}")
