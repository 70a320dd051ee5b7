"""Every call of a network, a decoder or a reward in an iteration, recorded by hooks and made again alone.

A recorded call keeps its arguments, the precision it ran in and what its backward pass was for, so that the same work
can be timed without the method around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.diffusion.rng import SampleRng
from gdmd.methods.base import Distillation
from gdmd.methods.pass_counter import answered
from gdmd.methods.scorer import Scorer
from gdmd.types import Codec, Method, PromptBatch, Reward

DENOISERS = ("student", "fake", "teacher", "old")


@dataclass(frozen=True)
class Watched:
    """A network whose calls are recorded. ``who`` names the caller's role now; ``ready(who)`` puts it on again.

    ``around``: how the call that is being made is surrounded, to be made again in the same way.
    """

    net: nn.Module
    who: Callable[[], str]
    ready: Callable[[str], None] = lambda who: None
    around: Callable[[], Callable[[], AbstractContextManager[None]]] = lambda: nullcontext


@dataclass(frozen=True)
class Call:
    """One recorded call: who, on how many samples, with a backward pass or not, for a reward or not."""

    who: str
    samples: int
    backward: bool
    scoring: bool
    again: Callable[[], object]


@contextmanager
def recorded(method: Method, watched: Sequence[Watched]) -> Iterator[list[Call]]:
    """Inside, calls of the networks, and of what the method scores and renders with, are appended to the list."""
    calls: list[Call] = []
    own = vars(method)  # Protocols say nothing of a scorer: plain DMD has none
    before = {name: value for name, value in own.items() if isinstance(value, Scorer)}
    real = method.real_latents if isinstance(method, Distillation) else None
    handles = [one.net.register_forward_hook(_net_hook(calls, one), with_kwargs=True) for one in watched]
    own.update({name: _recording(scorer, calls) for name, scorer in before.items()})
    if isinstance(method, Distillation) and real is not None:
        method.real_latents = _RecordedLatents(real, calls)
    try:
        yield calls
    finally:
        own.update(before)
        if isinstance(method, Distillation):
            method.real_latents = real
        for handle in handles:
            handle.remove()


def replay(calls: Sequence[Call], *, scoring: bool) -> None:
    """Make the calls again, those for rewards or all the others."""
    for call in calls:
        if call.scoring == scoring:
            call.again()


def _net_hook(calls: list[Call], watched: Watched) -> Callable[..., None]:
    def hook(net: nn.Module, given: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        tensors, samples = answered(answer)
        who, backward, device = watched.who(), tensors[0].requires_grad, tensors[0].device.type
        around = watched.around()
        leaves = [_leaf(value) for value in given]
        named_leaves = {key: _leaf(value) for key, value in named.items()}
        inputs = [v for v in (*leaves, *named_leaves.values()) if isinstance(v, Tensor) and v.requires_grad]
        wanted = inputs + [weights for weights in net.parameters() if weights.requires_grad]
        precision = torch.get_autocast_dtype(device)
        narrow = torch.is_autocast_enabled(device)

        def again() -> None:
            watched.ready(who)
            with (
                torch.set_grad_enabled(backward),
                torch.autocast(device, precision, enabled=narrow, cache_enabled=False),
                around(),
            ):
                velocity, _ = answered(net(*leaves, **named_leaves))
            if backward:
                torch.autograd.grad(velocity, wanted, [torch.ones_like(one) for one in velocity], allow_unused=True)

        calls.append(Call(who, samples, backward, False, again))

    return hook


def _leaf(value: Any) -> Any:
    """The value without its history; it asks for a gradient where it did."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _recording(scorer: Scorer, calls: list[Call]) -> Scorer:
    return Scorer(_RecordedCodec(scorer.codec, calls), [_RecordedReward(reward, calls) for reward in scorer.rewards])


def _scored(calls: list[Call], who: str, function: Callable[..., Tensor], images: Tensor, *others: Any) -> Tensor:
    """Record function(images, *others) as a call for a reward, and make it."""
    backward, leaf = images.requires_grad and torch.is_grad_enabled(), _leaf(images)

    def again() -> None:
        with torch.set_grad_enabled(backward):
            value = function(leaf, *others)
        if backward:
            torch.autograd.grad(value, leaf, torch.ones_like(value))

    calls.append(Call(who, len(images), backward, True, again))
    return function(images, *others)


@dataclass(frozen=True)
class _RecordedCodec:
    codec: Codec
    calls: list[Call]

    def decode(self, latents: Tensor) -> Tensor:
        return _scored(self.calls, "decoder", self.codec.decode, latents)

    def encode(self, images: Tensor) -> Tensor:
        return self.codec.encode(images)


class _RecordedReward:
    def __init__(self, reward: Reward, calls: list[Call]) -> None:
        self.name, self.differentiable = reward.name, reward.differentiable
        self._reward, self._calls = reward, calls

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        return _scored(self._calls, self.name, self._reward.score, images, prompts)


@dataclass(frozen=True)
class _RecordedLatents:
    """Renders and their encoding, real data of a GAN: neither a pass nor a score."""

    real: Callable[[PromptBatch, SampleRng], Tensor]
    calls: list[Call]

    def __call__(self, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        self.calls.append(Call("real pictures", len(prompts), False, False, lambda: self.real(prompts, rng)))
        return self.real(prompts, rng)
