"""The same method without its rewards: what the gradient of a reward term is measured against."""

from __future__ import annotations

from gdmd.config.method import GdmdConfig, MethodConfig
from gdmd.config.rivals import DmdrConfig
from gdmd.config.rivals_rl import RewardedDmdConfig


def without_rewards(cfg: MethodConfig) -> MethodConfig | None:
    """The configuration with every reward weight at 0, which is plain DMD on the same draws; None without rewards.

    DMDR keeps its schedules of t and of the blended teacher: they are no reward.
    """
    if not cfg.rewarded:
        return None
    match cfg:
        case GdmdConfig():
            return cfg.model_copy(update={"gamma": 0.0, "reward_weight": 0.0, "control": "none"})
        case DmdrConfig():
            return cfg.model_copy(update={"rl_weight": 0.0, "tilt": 0.0})
        case RewardedDmdConfig():
            return cfg.model_copy(update={"rl_weight": 0.0})
        case _:
            raise AssertionError(f"method {cfg.kind} is rewarded but names no reward weight here")
