"""IGS: scoring latents with a list of reward models through the decoder (arXiv 2604.19009, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.diffusion.batches import split
from gdmd.diffusion.schedule import expand
from gdmd.types import Codec, PromptBatch, Reward, score_all


class ScoreStats:
    """Statistics of raw scores since the last read, summed on the device without a synchronization."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # [R], the largest score of a reward's first scored batch; NaN before it
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
        """Since the last call: share of unscored images, mean distance from a first score (NaN = none scored)."""
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
    """Latents -> a score per reward. A call computes no gradient; the others do, ``micro_batch`` samples at a time."""

    codec: Codec
    rewards: Sequence[Reward]
    micro_batch: int = 0  # samples per backward pass through rewards and decoder; 0 = all of them
    seen: ScoreStats = field(default_factory=ScoreStats, repr=False, compare=False)

    def stats(self) -> Mapping[str, Tensor]:
        """Share of unscored images and spread of each reward since the last call; empty without scores."""
        return self.seen.stats([reward.name for reward in self.rewards])

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: PromptBatch) -> Tensor:
        """latents [B, C, H, W] -> raw scores [R, B], fp32, in each reward's own units; NaN = not scored.

        The decoded image is clipped to [0, 1], as when it is saved.
        """
        scores = self._raw(latents, prompts)
        self.seen.add(scores)
        return scores

    def with_gradient(
        self, latents: Tensor, prompts: PromptBatch, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """loss(raw scores [R, B]) [B] with gradient to the latents, and to nothing else; and the scores, without gradient.

        ``loss`` must treat each sample separately and give a number for an unscored one, whose gradient is 0. The gradient
        is computed here, by a backward pass through rewards and decoder to the latents. The rewards must be
        differentiable: see ``require_differentiable``.
        """
        value, gradient, scores = self.gradient(latents, prompts, loss)
        return value + (gradient * (latents - latents.detach())).flatten(1).sum(1), scores

    def gradient(
        self, latents: Tensor, prompts: PromptBatch, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """loss [B], d loss / d latents [B, C, H, W] (0 for an unscored sample) and raw scores [R, B], without gradient."""
        values, gradients, scores = [], [], []
        for part, its_prompts in self._parts(latents, prompts):
            with torch.enable_grad():
                raw = self._raw(part, its_prompts)
                value = loss(raw)
                (gradient,) = torch.autograd.grad(value.sum(), part)
            values.append(value.detach())
            gradients.append(torch.where(expand(raw.isnan().any(0), gradient), 0, gradient))
            scores.append(raw.detach())
        seen = torch.cat(scores, 1)
        self.seen.add(seen)
        return torch.cat(values), torch.cat(gradients), seen

    def gradients(self, latents: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Raw scores [R, B], and d score / d latents of each reward [R, B, C, H, W], NaN for an unscored sample.

        One decoding; one backward pass per reward. The rewards must be differentiable: see ``require_differentiable``.
        """
        gradients, scores = [], []
        for part, its_prompts in self._parts(latents, prompts):
            with torch.enable_grad():
                raw = self._raw(part, its_prompts)
                last = len(raw) - 1
                found = [torch.autograd.grad(s.nansum(), part, retain_graph=k < last)[0] for k, s in enumerate(raw)]
            gradient = torch.stack(found)
            gradients.append(torch.where(expand(raw.isnan(), gradient), torch.nan, gradient))
            scores.append(raw.detach())
        seen = torch.cat(scores, 1)
        self.seen.add(seen)
        return seen, torch.cat(gradients, 1)

    def require_differentiable(self, method: str) -> None:
        """ValueError if ``method`` cannot back-propagate one of the rewards."""
        black_boxes = [reward.name for reward in self.rewards if not reward.differentiable]
        if black_boxes:
            raise ValueError(
                f"method {method} back-propagates its rewards, and {', '.join(black_boxes)} is not differentiable; "
                "give differentiable rewards (a function with a gradient needs differentiable = true), or use a method that "
                "only reads the score (gdmd, dmd_nft, dmd_grpo)"
            )

    def _parts(self, latents: Tensor, prompts: PromptBatch) -> Iterator[tuple[Tensor, PromptBatch]]:
        """Micro-batches of latents, each the leaf of a separate graph, and their prompts."""
        for part, its_prompts in split((latents, prompts), self.micro_batch or len(latents)):
            yield part.detach().requires_grad_(), its_prompts

    def _raw(self, latents: Tensor, prompts: PromptBatch) -> Tensor:
        """[R, B], fp32. Remote rewards run in parallel."""
        images = self.codec.decode(latents).float().clamp(0, 1)
        scores = score_all(self.rewards, images, prompts)
        for reward, one in zip(self.rewards, scores, strict=True):
            if one.shape != (len(images),):
                raise ValueError(
                    f"reward {reward.name!r} returned shape {list(one.shape)} for {len(images)} images; "
                    "a reward returns one number per image"
                )
        return torch.stack([one.float() for one in scores])


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
