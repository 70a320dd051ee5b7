"""The reward models of the Shapes world: two CLIP-like scorers and a preference model, loaded from small assets.

  shapes_clip           cosine of image and caption features, in [-1, 1]; trains students
  shapes_clip_heldout   the same question put to another architecture; measures students, never trains them
  shapes_pref           1 = a flawless picture of the caption, about 0 = one wrong attribute or equal damage; unbounded
                        below, hardly above 1

All three are differentiable in the images, fp32, and score every sample on its own. A scorer answers with a number or
an error: non-finite scores mean broken images (or weights), and the error names the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gdmd.types import PromptBatch

if TYPE_CHECKING:
    from torch import Tensor

    from gdmd.shapes.scorer_networks import DualEncoder, Kind, Preference
import torch
from torch import Tensor

from gdmd.shapes.check import partial_credit
from gdmd.shapes.grammar import catalog


class _Said:
    """Captions as features of a frozen text tower; each caption is read once per device."""

    def __init__(self, net: DualEncoder | Preference) -> None:
        self.net = net
        self._known: dict[tuple[str, object], Tensor] = {}

    def __call__(self, texts: tuple[str, ...], device: object) -> Tensor:
        """[B, D], no gradient. ValueError for text outside the vocabulary."""
        import torch

        for text in dict.fromkeys(texts):
            if (text, device) not in self._known:
                self._known[text, device] = self._read(text, str(device))
        return torch.stack([self._known[text, device] for text in texts])

    def _read(self, text: str, device: str) -> Tensor:
        # Alone, so that its bits do not depend on the captions beside it: a resumed run meets them in another order.
        import torch

        from gdmd.diffusion.device import to_device_async
        from gdmd.shapes.grammar import tokenize

        with torch.no_grad():
            return self.net.text_features(to_device_async(torch.tensor([tokenize(text)]), device))[0]


class ShapesScorer:
    """A frozen scorer of the Shapes world as a ``Reward``."""

    differentiable = True

    def __init__(self, kind: Kind, net: DualEncoder | Preference) -> None:
        self.name: str = kind
        self.net = net.float().eval().requires_grad_(False)
        self._said = _Said(self.net)

    def to(self, device: str) -> ShapesScorer:
        """Move the network; images are scored on the device they are on, which must be this one."""
        self.net.to(device)
        return self

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> [B], fp32, with gradient to the images.

        ValueError when the images are not those of the 32 x 32 world, or when a score is not finite.
        """
        self._check_images(images)
        if len(images) != len(prompts):
            raise ValueError(
                f"{self.name} got {len(images)} images for {len(prompts)} prompts; give one prompt per image"
            )
        scores = self._score(images.float(), prompts.text)
        self._check_finite(scores)
        return scores

    def _score(self, images: Tensor, texts: tuple[str, ...]) -> Tensor:
        import torch

        with torch.autocast(images.device.type, enabled=False):  # fp32 whatever the caller's precision is
            return self.net(images, self._said(texts, images.device))  # type: ignore[no-any-return]

    def _check_images(self, images: Tensor) -> None:
        from gdmd.shapes.scorer_networks import IMAGE_SIZE

        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"{self.name} scores images of shape [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}; "
                "it was trained on the 32 x 32 world only"
            )

    def _check_finite(self, scores: Tensor) -> None:
        import torch

        from gdmd.diffusion.device import raise_where

        raise_where(
            ~torch.isfinite(scores.detach()),
            lambda bad: ValueError(
                f"{self.name} gave a score that is not finite at samples {bad}; the images there hold NaN or infinity: "
                "look at the decoder and at the student's loss before this step"
            ),
        )


class ShapesClip(ShapesScorer):
    """A dual encoder; score = cosine in [-1, 1]. Also a feature extractor."""

    net: DualEncoder

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> unit vectors [B, 128], fp32, for Fréchet and pairwise distances."""
        import torch

        self._check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.net.image_features(images.float())


class ShapesPref(ShapesScorer):
    """A dual encoder tuned on preference pairs; score = 1 for true renders, about 0 for one wrong attribute."""

    net: Preference


def load_scorer(kind: Kind, tensors: Mapping[str, Tensor]) -> ShapesClip | ShapesPref:
    """A scorer from the tensors of its asset (stored fp16, used fp32). ValueError when they do not fit the kind."""
    from gdmd.shapes.scorer_networks import DualEncoder, build_net

    net = build_net(kind)
    try:
        net.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(
            f"these tensors are not a {kind}: {first[:120]}... Give the asset made for this scorer."
        ) from error
    return ShapesClip(kind, net) if isinstance(net, DualEncoder) else ShapesPref(kind, net)


def from_asset(path: str | Path) -> ShapesClip | ShapesPref:
    """A scorer from its safetensors file; the kind is the beginning of the file name (or the whole of it).

    ValueError for a missing or unreadable file and for an unknown kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from gdmd.shapes.scorer_networks import KINDS

    path = Path(path)
    kind = max((k for k in KINDS if path.name.startswith(k)), key=len, default=None)
    if kind is None:
        raise ValueError(f"asset {path} has no scorer's name; name the file {', '.join(KINDS)}.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"scorer asset {path} cannot be read ({error}); make it again with gdmd pretrain scorers"
        ) from error
    return load_scorer(kind, tensors)


def shipped_scorer(kind: Kind) -> ShapesClip | ShapesPref:
    """The scorer that ships with the package."""
    return from_asset(Path(__file__).parents[1] / "assets" / f"{kind}.safetensors")


def image_features(images: Tensor, scorer: ShapesClip | None = None) -> Tensor:
    """images [B, 3, 32, 32] in [0, 1] -> unit vectors [B, 128] of ``scorer``, by default the shipped held-out one."""
    scorer = scorer or _heldout()
    return scorer.image_features(images)


_shipped: dict[str, ShapesClip] = {}


def _heldout() -> ShapesClip:
    if "heldout" not in _shipped:
        scorer = shipped_scorer("shapes_clip_heldout")
        assert isinstance(scorer, ShapesClip)
        _shipped["heldout"] = scorer
    return _shipped["heldout"]


class PartialCredit:
    """Share of the caption's requirements that the picture satisfies, in [0, 1]. Not differentiable."""

    name = "shapes_partial_credit"
    differentiable = False

    @torch.no_grad()
    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> [B]. ValueError for text that is not a caption of the Shapes language."""
        table = catalog()
        rows = torch.tensor([table.row(text) for text in prompts.text], device=images.device)
        return partial_credit(images, rows).float()
