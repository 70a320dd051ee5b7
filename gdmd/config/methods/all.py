"""The methods of a recipe, and each without its rewards."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDAblationConfig, GDMDConfig
from gdmd.config.methods.gdmd_tilted import ShuffledTiltedGDMDConfig, TiltedGDMDConfig

MethodConfig = Annotated[
    DMDConfig
    | DMD2Config
    | DMDRConfig
    | DMDReFLConfig
    | DMDNFTConfig
    | DMDGRPOConfig
    | GDMDConfig
    | TiltedGDMDConfig
    | GDMDAblationConfig
    | ShuffledTiltedGDMDConfig,
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
        case GDMDAblationConfig():
            plain = GDMDConfig.model_validate(cfg.model_dump(exclude={"kind", "control"}) | {"gamma": 0.0})
        case ShuffledTiltedGDMDConfig():
            plain = TiltedGDMDConfig.model_validate(cfg.model_dump(exclude={"kind"}) | {"gamma": 0.0})
        case GDMDConfig() | TiltedGDMDConfig():
            plain = cfg.model_copy(update={"gamma": 0.0})
        case DMDRConfig():
            plain = cfg.model_copy(update={"rl_weight": 0.0, "tilt": 0.0})
        case _:
            plain = cfg.model_copy(update={"rl_weight": 0.0})
    assert not plain.rewarded, f"method {cfg.kind} has a reward weight that is not listed here"
    return plain
