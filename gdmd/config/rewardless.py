"""The same method without its rewards: what the gradient of a reward term is measured against."""

from __future__ import annotations

from typing import Any

from gdmd.config.method import GdmdConfig, MethodConfig
from gdmd.config.rivals import DmdrConfig
from gdmd.config.rivals_rl import RewardedDmdConfig


def without_rewards(cfg: MethodConfig) -> MethodConfig | None:
    """The configuration with every reward weight at 0, which is plain DMD on the same draws; None without rewards.

    DMDR keeps its schedules of t and of the blended teacher: they are no reward.
    """
    if not cfg.rewarded:
        return None
    plain: MethodConfig = type(cfg).model_validate(cfg.model_dump() | _weights(cfg))
    assert not plain.rewarded, f"method {cfg.kind} has a reward weight that is not listed here"
    return plain


def _weights(cfg: MethodConfig) -> dict[str, Any]:
    """The fields of a rewarded method that weigh its rewards, at 0."""
    match cfg:
        case GdmdConfig():
            return {"gamma": 0.0, "control": "none"}
        case DmdrConfig():
            return {"rl_weight": 0.0, "tilt": 0.0}
        case RewardedDmdConfig():
            return {"rl_weight": 0.0}
        case _:
            return {}
