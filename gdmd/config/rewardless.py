"""The same method without its rewards: what the gradient of a reward term is measured against."""

from __future__ import annotations

from gdmd.config.method import GdmdConfig, MethodConfig


def without_rewards(cfg: MethodConfig) -> MethodConfig | None:
    """The configuration with the reward weight 0, which is plain DMD on the same draws; None if there is no reward."""
    match cfg:
        case GdmdConfig() if cfg.gamma > 0:
            return cfg.model_copy(update={"gamma": 0.0, "control": "none"})
        case _:
            return None
