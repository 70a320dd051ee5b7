"""The cost of a training, counted by hooks on the networks: forward passes, student updates, seconds.

One pass is one forward of one denoiser (student, fake, teacher or old policy) on one sample; a backward counts two more, or
one through a frozen network, of which only the adapters are trained.
A call for features, which ends early, counts as the share of a forward that it computes. Decoder and rewards are not
counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.diffusion.rng import SampleRng
from gdmd.types import Method, PromptBatch, Update

BACKWARD = 2
"""A backward pass costs about two forwards: gradients of the inputs and of the weights."""
FROZEN_BACKWARD = 1
"""Through a frozen network: gradients of the inputs; those of the adapters are small."""
_KEYS = ("cost.passes", "cost.updates", "cost.seconds")


@dataclass
class Cost:
    """Sums since the start of a training. seconds: inside iterations, without logs, images and checkpoints."""

    passes: float = 0
    updates: int = 0  # student updates
    seconds: float = 0.0


@dataclass
class CountedMethod:
    """A method whose cost is counted; its updates are unchanged.

    ``share``: cost of the current call in forwards; ``backward``: what a backward pass of a network adds to a forward. The
    sums are saved with the method's state, so that they survive a restart.
    """

    method: Method
    networks: Iterable[nn.Module] = ()
    share: Callable[[], float] = lambda: 1
    backward: Callable[[nn.Module], float] = lambda net: BACKWARD
    cost: Cost = field(default_factory=Cost)
    _counting: bool = False

    def __post_init__(self) -> None:
        for net in {id(net): net for net in self.networks}.values():
            self.watch(net)

    def watch(self, net: nn.Module) -> None:
        """Count the calls of one more network."""
        net.register_forward_hook(self._on_forward)

    def _on_forward(self, net: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._counting:
            tensors, samples = output_samples(output)
            self.cost.passes += samples * (1 + self.backward(net) * tensors[0].requires_grad) * self.share()

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """The method's own updates; everything until the last one is applied is counted."""
        start = time.perf_counter()
        self._counting = True
        try:
            for update in self.method.iteration(step, prompts, rng):
                self.cost.updates += update.role == "student"
                yield update
        finally:
            self._counting = False
            self.cost.seconds += time.perf_counter() - start

    def stats(self) -> Mapping[str, Tensor]:
        return self.method.stats()

    def state(self) -> Mapping[str, Tensor]:
        """The method's state and the three sums."""
        sums = (self.cost.passes, self.cost.updates, self.cost.seconds)
        cost = {key: torch.tensor(value, dtype=torch.float64) for key, value in zip(_KEYS, sums, strict=True)}
        return {**self.method.state(), **cost}

    def load(self, state: Mapping[str, Tensor]) -> None:
        passes, updates, seconds = (state[key] for key in _KEYS)
        self.cost = Cost(float(passes), int(updates), float(seconds))
        self.method.load(without_cost(state))


def without_cost(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved method state without the sums of ``CountedMethod``."""
    return {key: value for key, value in state.items() if key not in _KEYS}


def output_samples(answer: Any) -> tuple[list[Tensor], int]:
    """The tensors in a network's output, and the number of samples.

    answer: a tensor [B, ...], a list with a tensor per sample, or a tuple that starts with one of these.
    """
    if isinstance(answer, tuple):
        answer = answer[0]
    return ([answer], len(answer)) if isinstance(answer, Tensor) else (list(answer), len(answer))
