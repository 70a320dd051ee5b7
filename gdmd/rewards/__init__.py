"""Rewards: scorers of images, higher is better. Importing this package imports no torch; each class loads on first use.

from gdmd.rewards import CLIPScore

CLIPScore(dtype="bf16")(images, ["a red cube", "a blue ball"])  # -> one number per image
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdmd.rewards.aesthetic import Aesthetic as Aesthetic
    from gdmd.rewards.clip import CLIPScore as CLIPScore
    from gdmd.rewards.composite import Composite as Composite
    from gdmd.rewards.composite import Part as Part
    from gdmd.rewards.geneval.reward import GenEval as GenEval
    from gdmd.rewards.geneval2 import GenEval2 as GenEval2
    from gdmd.rewards.hps import HPSv2 as HPSv2
    from gdmd.rewards.hpsv3 import HPSv3 as HPSv3
    from gdmd.rewards.imagereward import ImageReward as ImageReward
    from gdmd.rewards.ocr import OCR as OCR
    from gdmd.rewards.pickscore import PickScore as PickScore
    from gdmd.rewards.remote import RemoteReward as RemoteReward

MODULES = {
    "Aesthetic": "aesthetic",
    "CLIPScore": "clip",
    "Composite": "composite",
    "GenEval": "geneval.reward",
    "GenEval2": "geneval2",
    "HPSv2": "hps",
    "HPSv3": "hpsv3",
    "ImageReward": "imagereward",
    "OCR": "ocr",
    "Part": "composite",
    "PickScore": "pickscore",
    "RemoteReward": "remote",
}
"""Each public name and the module that defines it."""
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
