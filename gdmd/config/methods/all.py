"""The methods of a recipe, and each without its rewards."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmd_reward import DmdGrpoConfig, DmdNftConfig, DmdReflConfig, RewardedDmdConfig
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.methods.gdmd import GdmdConfig

MethodConfig = Annotated[
    DmdConfig | Dmd2Config | DmdrConfig | DmdReflConfig | DmdNftConfig | DmdGrpoConfig | GdmdConfig,
    Field(discriminator="kind"),
]


def without_rewards(cfg: MethodConfig) -> MethodConfig | None:
    """Plain DMD on the same draws: every reward weight at 0, and GDMD's options that only scored targets have unset.

    None for a method without rewards. DMDR keeps its schedules of t and of the blended teacher, and GDMD its scored
    guidances: they are not rewards.
    """
    if not cfg.rewarded:
        return None
    plain: MethodConfig = type(cfg).model_validate(cfg.model_dump() | _weights(cfg))
    assert not plain.rewarded, f"method {cfg.kind} has a reward weight that is not listed here"
    return plain


def _weights(cfg: MethodConfig) -> dict[str, Any]:
    """The fields of a rewarded method that read its rewards, without effect."""
    match cfg:
        case GdmdConfig():
            names = ("control", "score_target", "score_baseline", "weighting", "student_target", "reward_gradient")
            return {"gamma": 0.0} | {name: GdmdConfig.model_fields[name].default for name in names}
        case DmdrConfig():
            return {"rl_weight": 0.0, "tilt": 0.0}
        case RewardedDmdConfig():
            return {"rl_weight": 0.0}
        case _:
            return {}
