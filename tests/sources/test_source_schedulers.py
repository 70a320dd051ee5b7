"""Scheduler, shift and guidance of a pipeline as an image source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers

from gdmd.config.image_source import read_source
from gdmd.sources.open import open_source

SOLVER = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def test_qwen_sources_default_guidance(saved: Callable[..., Path]) -> None:
    word = f"{saved('qwen_image')},dtype=fp32,device=cpu,steps=2,height=32,width=32"
    calls: dict[str, list[int]] = {}
    for more in ("", ",guidance=1", ",guidance=4"):
        source: Any = open_source(read_source(word + more))
        calls[more] = []
        source.pipe.transformer.register_forward_hook(lambda *_, seen=calls[more]: seen.append(1))
        source.pipe(prompt=["a"], max_sequence_length=64, **source.arguments)
        calls[more].append(source.info.identity["guidance"])
    assert calls == {"": [1, 1, 1, 1, 4.0], ",guidance=1": [1, 1, 1.0], ",guidance=4": [1, 1, 1, 1, 4.0]}


@pytest.mark.parametrize(
    ("name", "changes", "settings", "message"),
    [
        ("sd3", {"scheduler": diffusers.EulerDiscreteScheduler()}, "", "flow model.*models with a beta schedule"),
        ("sdxl", {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "", "cannot use its FlowMatchEuler"),
        ("sd3", {}, ",scheduler=euler", "scheduler=euler is not for this pipeline.*flow models.*flow_euler"),
        (
            "sdxl",
            {},
            ",scheduler=flow_euler",
            "scheduler=flow_euler is not for this pipeline.*models with a beta schedule",
        ),
        (
            "sdxl",
            {"scheduler": diffusers.EDMEulerScheduler()},
            ",scheduler=ddim",
            "EDMEulerScheduler is for EDM models",
        ),
        ("sd3", {}, ",spacing=trailing", "spacing is set, but a FlowMatchEulerDiscreteScheduler does not read it"),
        (
            "sd3",
            {},
            ",scheduler=flow_dpm,spacing=trailing",
            "spacing is set, but a DPM.* with use_flow_sigmas does not",
        ),
        (
            "sana",
            {"scheduler": SOLVER},
            ",timesteps=999+500",
            "timesteps is set, but a DPM.* with use_flow_sigmas does not",
        ),
        ("flux2_klein", {"parts": {"index": {"is_distilled": True}}}, ",guidance=4", "guidance=4 does nothing"),
        ("flux", {"parts": {"transformer": {"guidance_embeds": False}}}, ",guidance=3", "guidance=3 does nothing"),
        ("qwen_image21", {"parts": {"index": {"sample_sigmas": [1.0, 0.5]}}}, ",steps=4", "steps=4 does nothing.*of 2"),
    ],
)
def test_source_of_another_kind(
    saved: Callable[..., Path], name: str, changes: dict[str, Any], settings: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(read_source(f"{saved(name, **changes)},dtype=fp32,device=cpu{settings}"))


@pytest.mark.parametrize(
    ("settings", "key", "shift"),
    [
        (",scheduler=flow_euler", "shift", 3.0),
        (",scheduler=flow_dpm", "flow_shift", 3.0),
        (",shift=2", "flow_shift", 2.0),
        (",scheduler=flow_euler,shift=2", "shift", 2.0),
    ],
)
def test_sources_shift_with_another_scheduler(
    saved: Callable[..., Path], settings: str, key: str, shift: float
) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    folder = saved("sd3", diffusers.UniPCMultistepScheduler(**flow))
    source: Any = open_source(read_source(f"{folder},dtype=fp32,device=cpu{settings}"))
    assert source.pipe.scheduler.config[key] == shift
