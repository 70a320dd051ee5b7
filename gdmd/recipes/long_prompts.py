"""A warning about prompts that text encoders and rewards cannot read to their end, once per program."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gdmd.recipes.build import Components
from gdmd.rewards.base import PretrainedReward
from gdmd.rewards.composite import Composite
from gdmd.types import Reward

log = logging.getLogger(__name__)


def warn_of_lab(components: Components, texts: Sequence[str], *, say: bool = True) -> None:
    """About the text encoders of a real model and all rewards. ``say`` is false on all ranks but the first."""
    family: Any = getattr(components.roles, "family", None)
    found = [family.encoder.long_prompts(texts)] if family is not None else []
    found += [reward.long_prompts(texts) for reward in _published(components.rewards)]
    for message in found:
        if say and message:
            log.warning("%s", message)


def warn_of_rewards(rewards: Iterable[Reward], texts: Sequence[str]) -> None:
    """About the rewards alone."""
    for reward in _published(rewards):
        if message := reward.long_prompts(texts):
            log.warning("%s", message)


def _published(rewards: Iterable[Reward]) -> Iterator[PretrainedReward]:
    for reward in rewards:
        if isinstance(reward, Composite):
            yield from _published(part.reward for part in reward.parts)
        elif isinstance(reward, PretrainedReward):
            yield reward
