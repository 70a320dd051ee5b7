"""gdmd: distill text-to-image diffusion models to a few steps, guided by rewards (arXiv 2604.19009).

    from gdmd import DistillationTrainer, TrainingConfig
    from gdmd.rewards import PickScore

    trainer = DistillationTrainer(
        "stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=[PickScore()],
        train_dataset="prompts.txt",
        args=TrainingConfig(output_dir="runs/mine"),
    )
    trainer.train()
    trainer.save_lora("lora")

Importing this package imports no torch; each name loads what it needs on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdmd._version import __version__

if TYPE_CHECKING:
    from gdmd.config.load import ConfigError as ConfigError
    from gdmd.config.methods.dmd import DMDConfig as DMDConfig
    from gdmd.config.methods.dmd2 import DMD2Config as DMD2Config
    from gdmd.config.methods.dmd_reward import DMDGRPOConfig as DMDGRPOConfig
    from gdmd.config.methods.dmd_reward import DMDNFTConfig as DMDNFTConfig
    from gdmd.config.methods.dmd_reward import DMDReFLConfig as DMDReFLConfig
    from gdmd.config.methods.dmdr import DMDRConfig as DMDRConfig
    from gdmd.config.methods.gdmd import GDMDConfig as GDMDConfig
    from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig as TiltedGDMDConfig
    from gdmd.config.run import RunConfig as RunConfig
    from gdmd.config.training_config import TrainingConfig as TrainingConfig
    from gdmd.io import RunError as RunError
    from gdmd.recipes.read import read_recipe as read_recipe
    from gdmd.student import load_student as load_student
    from gdmd.trainer import DistillationTrainer as DistillationTrainer
    from gdmd.training.callbacks import TrainerCallback as TrainerCallback
    from gdmd.training.callbacks import TrainerState as TrainerState

MODULES = {
    "DistillationTrainer": "trainer",
    "TrainingConfig": "config.training_config",
    "TrainerCallback": "training.callbacks",
    "TrainerState": "training.callbacks",
    "load_student": "student",
    "read_recipe": "recipes.read",
    "RunConfig": "config.run",
    "GDMDConfig": "config.methods.gdmd",
    "TiltedGDMDConfig": "config.methods.gdmd_tilted",
    "DMDConfig": "config.methods.dmd",
    "DMD2Config": "config.methods.dmd2",
    "DMDRConfig": "config.methods.dmdr",
    "DMDReFLConfig": "config.methods.dmd_reward",
    "DMDNFTConfig": "config.methods.dmd_reward",
    "DMDGRPOConfig": "config.methods.dmd_reward",
    "ConfigError": "config.load",
    "RunError": "io",
}
"""Each public name and the module that defines it."""
__all__ = ["__version__", *MODULES]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
