"""Warn about prompts that are longer than text encoders and rewards can read, once per program."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gdmd.recipes.build import Components
from gdmd.rewards.base import PretrainedReward
from gdmd.rewards.composite import Composite
from gdmd.types import Reward

log = logging.getLogger(__name__)


def warn_long_prompts(
    components: Components, texts: Sequence[str], teacher: Sequence[str] = (), *, say: bool = True
) -> None:
    """Check the text encoders of a real model, and all rewards except for ``teacher`` prompts. ``say``: only rank 0 logs."""
    family: Any = getattr(components.roles, "family", None)
    found = [family.encoder.long_prompts([*texts, *teacher])] if family is not None else []
    found += [reward.long_prompts(texts) for reward in _pretrained(components.rewards)]
    for message in found:
        if say and message:
            log.warning("%s", message)


def warn_long_prompts_of_rewards(rewards: Iterable[Reward], texts: Sequence[str]) -> None:
    """Check the rewards only."""
    for reward in _pretrained(rewards):
        if message := reward.long_prompts(texts):
            log.warning("%s", message)


def _pretrained(rewards: Iterable[Reward]) -> Iterator[PretrainedReward]:
    for reward in rewards:
        if isinstance(reward, Composite):
            yield from _pretrained(part.reward for part in reward.parts)
        elif isinstance(reward, PretrainedReward):
            yield reward
