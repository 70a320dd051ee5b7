"""IGS: scoring latents with a list of reward models through the decoder (arXiv 2604.19009, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.diffusion.schedule import expand
from gdmd.types import Codec, PromptBatch, Reward, score_all


class ScoreStats:
    """Statistics of raw scores since the last read, summed on the device without a synchronization."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # [R], the first score of each reward; NaN before there is one
        self._sums: Tensor | None = None  # [R, 2]: images with a score, sum |score - first|
        self._images = 0

    @torch.no_grad()
    def add(self, scores: Tensor) -> None:
        """Raw scores [R, B]."""
        scored = ~scores.isnan()
        any_score = torch.where(scored, scores, -torch.inf).amax(1)
        any_score = torch.where(scored.any(1), any_score, torch.nan)
        self._first = any_score if self._first is None else torch.where(self._first.isnan(), any_score, self._first)
        distance = torch.where(scored, (scores - self._first[:, None]).abs(), 0.0)
        sums = torch.stack([scored.sum(1).double(), distance.double().sum(1)], 1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._images += scores.shape[1]

    def stats(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Share of unscored images and mean distance from the first score (NaN = none scored) since the last call."""
        if self._sums is None:
            return {}
        count, distance = self._sums.unbind(1)
        unscored, spread = 1 - count / self._images, distance / count
        self._sums, self._images = None, 0
        found: dict[str, Tensor] = {}
        for k, name in enumerate(names):  # read by runs.reward_signal
            found |= {f"scores/{name}/unscored": unscored[k], f"scores/{name}/spread": spread[k]}
        return found


@dataclass(frozen=True)
class Scorer:
    """Latents -> a score per reward. A call passes no gradient through decoder or reward, only ``with_gradient`` does."""

    codec: Codec
    rewards: Sequence[Reward]
    seen: ScoreStats = field(default_factory=ScoreStats, repr=False, compare=False)

    def stats(self) -> Mapping[str, Tensor]:
        """Share of unscored images and spread of each reward since the last call; empty without scores."""
        return self.seen.stats([reward.name for reward in self.rewards])

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: PromptBatch) -> Tensor:
        """latents [B, C, H, W] -> raw scores [R, B], fp32, in each reward's own units; NaN = not scored.

        The decoded image is clipped to [0, 1], as when it is saved.
        """
        return self._raw(self.codec.decode(latents).float().clamp(0, 1), prompts)

    def with_gradient(self, latents: Tensor, prompts: PromptBatch, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """loss(raw scores [R, B]) [B] with gradient to the latents, and to nothing else: the reward back-propagated.

        ``loss`` must treat each sample separately and give a number for an unscored one, whose gradient is 0. The gradient
        is computed here, by one backward pass through rewards and decoder to the latents. The rewards must be
        differentiable: see ``require_differentiable``.
        """
        return self.scored_with_gradient(latents, prompts, loss)[0]

    def scored_with_gradient(
        self, latents: Tensor, prompts: PromptBatch, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``with_gradient``, and the raw scores [R, B] without gradient."""
        value, gradient, scores = self.gradient(latents, prompts, loss)
        return value + (gradient * (latents - latents.detach())).flatten(1).sum(1), scores

    def gradient(
        self, latents: Tensor, prompts: PromptBatch, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """loss [B], d loss / d latents [B, C, H, W] (0 for an unscored sample) and raw scores [R, B], without gradient."""
        with torch.enable_grad():
            own = latents.detach().requires_grad_()
            images = self.codec.decode(own).float().clamp(0, 1)
            scores = self._raw(images, prompts)
            value = loss(scores)
            (gradient,) = torch.autograd.grad(value.sum(), own)
        return value.detach(), torch.where(expand(scores.isnan().any(0), gradient), 0, gradient), scores.detach()

    def gradients(self, latents: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Raw scores [R, B], and d score / d latents of each reward [R, B, C, H, W], NaN for an unscored sample.

        One decoding; one backward pass per reward. The rewards must be differentiable: see ``require_differentiable``.
        """
        with torch.enable_grad():
            own = latents.detach().requires_grad_()
            scores = self._raw(self.codec.decode(own).float().clamp(0, 1), prompts)
            last = len(scores) - 1
            found = [torch.autograd.grad(s.nansum(), own, retain_graph=k < last)[0] for k, s in enumerate(scores)]
        scores, gradients = scores.detach(), torch.stack(found)
        return scores, torch.where(expand(scores.isnan(), gradients), torch.nan, gradients)

    def require_differentiable(self, method: str) -> None:
        """ValueError when ``method`` cannot back-propagate one of the rewards."""
        black_boxes = [reward.name for reward in self.rewards if not reward.differentiable]
        if black_boxes:
            raise ValueError(
                f"method {method} back-propagates its rewards, and {', '.join(black_boxes)} is not differentiable; "
                "give differentiable rewards, or use a method that only reads the score (gdmd, dmd_nft, dmd_grpo)"
            )

    def _raw(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """[R, B], fp32. Remote rewards run in parallel."""
        scores = score_all(self.rewards, images, prompts)
        for reward, one in zip(self.rewards, scores, strict=True):
            if one.shape != (len(images),):
                raise ValueError(
                    f"reward {reward.name!r} returned shape {list(one.shape)} for {len(images)} images; "
                    "a reward returns one number per image"
                )
        raw = torch.stack([one.float() for one in scores])
        self.seen.add(raw.detach())
        return raw


def mean_advantage(reward_target: Tensor, reward_sample: Tensor, scale: Tensor) -> Tensor:
    """mean over rewards k of (R_k(D(x_tar)) - R_k(D(x0))) / Z_k, before the clip.

    reward_target [R, ..., B], reward_sample [R, B], scale [R] -> [..., B]. Z_k = 0 contributes 0; a NaN of any
    reward stays NaN.
    """
    shape = (-1,) + (1,) * (reward_target.ndim - 1)
    z = scale.reshape(shape)
    difference = reward_target - reward_sample.reshape(
        reward_sample.shape[0], *(1,) * (reward_target.ndim - 2), reward_sample.shape[1]
    )
    return torch.where(z > 0, difference / torch.where(z > 0, z, 1), 0 * difference).mean(0)
