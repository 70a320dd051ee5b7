"""The reward models of the Shapes world: two CLIP-like scorers, a preference model and partial credit.

  shapes_clip           cosine of image and caption features, in [-1, 1]; trains students
  shapes_clip_heldout   the same with another architecture; measures students, never trains them
  shapes_pref           1 = a flawless image of the caption, about 0 = one wrong attribute or equal damage; unbounded
                        below, rarely above 1
  shapes_partial_credit share of the caption's requirements that are met, from the detector; not differentiable

The first three are networks from small assets: differentiable in the images, fp32, every sample scored independently.
A score that is not finite is an error that names the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gdmd.diffusion.device import raise_where, to_device_async
from gdmd.runs.assets import asset_path
from gdmd.shapes.check import partial_credit
from gdmd.shapes.grammar import catalog, tokenize
from gdmd.shapes.render import IMAGE_SIZE
from gdmd.shapes.scorer_networks import KINDS, DualEncoder, Kind, Preference, build_net
from gdmd.types import PromptBatch


class CaptionFeatures:
    """Text features of captions, computed once per caption and device."""

    def __init__(self, net: DualEncoder | Preference) -> None:
        self.net = net
        self._cache: dict[tuple[str, object], Tensor] = {}

    def __call__(self, texts: tuple[str, ...], device: object) -> Tensor:
        """[B, D], no gradient. ValueError for text outside the vocabulary."""

        for text in dict.fromkeys(texts):
            if (text, device) not in self._cache:
                self._cache[text, device] = self._encode(text, str(device))
        return torch.stack([self._cache[text, device] for text in texts])

    def _encode(self, text: str, device: str) -> Tensor:
        # One caption per call, so that its bits do not depend on the others: a resumed run sees them in another order.

        with torch.no_grad():
            return self.net.text_features(to_device_async(torch.tensor([tokenize(text)]), device))[0]


class ShapesScorer:
    """A frozen scorer of the Shapes world as a ``Reward``."""

    differentiable = True

    def __init__(self, kind: Kind, net: DualEncoder | Preference) -> None:
        self.name: str = kind
        self.net = net.float().eval().requires_grad_(False)
        self._text = CaptionFeatures(self.net)

    def to(self, device: str) -> ShapesScorer:
        """Move the network. Images must be on the same device."""
        self.net.to(device)
        return self

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> [B], fp32, with gradient to the images.

        ValueError for images of another size and for a score that is not finite.
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

        with torch.autocast(images.device.type, enabled=False):  # fp32 whatever the caller's precision is
            return self.net(images, self._text(texts, images.device))  # type: ignore[no-any-return]

    def _check_images(self, images: Tensor) -> None:

        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"{self.name} scores images of shape [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}; "
                "it was trained on the 32 x 32 world only"
            )

    def _check_finite(self, scores: Tensor) -> None:

        raise_where(
            ~torch.isfinite(scores.detach()),
            lambda bad: ValueError(
                f"{self.name}: the score is not finite at samples {bad}; these images hold NaN or infinity: "
                "check the decoder and the student's loss before this step"
            ),
        )


class ShapesClip(ShapesScorer):
    """A dual encoder; score = cosine in [-1, 1]. Also extracts image features."""

    net: DualEncoder

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, 32, 32] in [0, 1] -> unit vectors [B, 128], fp32, for Fréchet and pairwise distances."""

        self._check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.net.image_features(images.float())


class ShapesPref(ShapesScorer):
    """A dual encoder tuned on preference pairs; score = 1 for true renders, about 0 for one wrong attribute."""

    net: Preference


def load_scorer(kind: Kind, tensors: Mapping[str, Tensor]) -> ShapesClip | ShapesPref:
    """A scorer from the tensors of its asset (stored in fp16, used in fp32). ValueError if they do not fit the kind."""

    net = build_net(kind)
    try:
        net.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise ValueError(f"these tensors are not a {kind}: {first[:120]}... Give the asset of this scorer.") from error
    return ShapesClip(kind, net) if isinstance(net, DualEncoder) else ShapesPref(kind, net)


def from_asset(path: str | Path) -> ShapesClip | ShapesPref:
    """A scorer from its safetensors file, whose name starts with the kind.

    ValueError for a missing or unreadable file and for an unknown kind.
    """

    path = Path(path)
    kind = max((k for k in KINDS if path.name.startswith(k)), key=len, default=None)
    if kind is None:
        raise ValueError(
            f"the name of asset {path} does not start with a scorer's; rename it to one of: {', '.join(KINDS)}"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"scorer asset {path} cannot be read ({error}); make it again with gdmd pretrain scorers"
        ) from error
    return load_scorer(kind, tensors)


def shipped_scorer(kind: Kind) -> ShapesClip | ShapesPref:
    """The scorer that ships with the package."""
    return from_asset(asset_path(kind))


class PartialCredit:
    """Share of the caption's requirements that the image satisfies, in [0, 1]. Not differentiable."""

    name = "shapes_partial_credit"
    differentiable = False

    @torch.no_grad()
    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> [B]. ValueError for text that is not a caption of the Shapes language."""
        table = catalog()
        rows = torch.tensor([table.row(text) for text in prompts.text], device=images.device)
        return partial_credit(images, rows).float()
