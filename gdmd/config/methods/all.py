"""The methods of a recipe, and each without its rewards."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmd_reward import DmdGrpoConfig, DmdNftConfig, DmdReflConfig
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.methods.gdmd import GdmdAblationConfig, GdmdConfig
from gdmd.config.methods.gdmd_tilted import GdmdTiltedConfig, GdmdTiltedShuffledConfig

MethodConfig = Annotated[
    DmdConfig
    | Dmd2Config
    | DmdrConfig
    | DmdReflConfig
    | DmdNftConfig
    | DmdGrpoConfig
    | GdmdConfig
    | GdmdTiltedConfig
    | GdmdAblationConfig
    | GdmdTiltedShuffledConfig,
    Field(discriminator="kind"),
]


def without_rewards(cfg: MethodConfig) -> MethodConfig | None:
    """Plain DMD on the same draws: every reward weight at 0. None for a method without rewards.

    DMDR keeps its schedules of t and of the blended teacher: they are not rewards.
    """
    if not cfg.rewarded:
        return None
    plain: MethodConfig
    match cfg:
        case GdmdAblationConfig():
            plain = GdmdConfig.model_validate(cfg.model_dump(exclude={"kind", "control"}) | {"gamma": 0.0})
        case GdmdTiltedShuffledConfig():
            plain = GdmdTiltedConfig.model_validate(cfg.model_dump(exclude={"kind"}) | {"gamma": 0.0})
        case GdmdConfig() | GdmdTiltedConfig():
            plain = cfg.model_copy(update={"gamma": 0.0})
        case DmdrConfig():
            plain = cfg.model_copy(update={"rl_weight": 0.0, "tilt": 0.0})
        case _:
            plain = cfg.model_copy(update={"rl_weight": 0.0})
    assert not plain.rewarded, f"method {cfg.kind} has a reward weight that is not listed here"
    return plain
