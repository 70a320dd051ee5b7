"""The sampler of a pipeline as a source of images: scheduler, shift, time steps and noise, as a model's card asks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gdmd.config.sources import SourceConfig

_SOLVED = ("StableDiffusion3Pipeline", "SanaPipeline")
"""Pipelines that leave a solver's shift to the solver; the others hand it one of their own."""


def set_scheduler(pipe: Any, cfg: SourceConfig) -> None:
    """Give ``pipe`` the scheduler, spacing and shift of ``cfg``. ValueError for a shift where there is none."""
    import diffusers

    match cfg.scheduler:
        case "lcm":
            kind: Any = diffusers.LCMScheduler
        case "tcd":
            kind = diffusers.TCDScheduler
        case "ddim":
            kind = diffusers.DDIMScheduler
        case "euler":
            kind = diffusers.EulerDiscreteScheduler
        case "euler_ancestral":
            kind = diffusers.EulerAncestralDiscreteScheduler
        case "flow_euler":
            kind = diffusers.FlowMatchEulerDiscreteScheduler
        case "flow_dpm":
            pipe.scheduler = _flow_solver(pipe, cfg)
            return
        case None:
            kind = type(pipe.scheduler)
    wanted: dict[str, Any] = {"timestep_spacing": cfg.spacing} if cfg.spacing else {}
    if cfg.shift is not None:
        if kind is not diffusers.FlowMatchEulerDiscreteScheduler:
            raise ValueError(
                f"source {cfg.where!r}: shift = {cfg.shift} is of flow models, and {kind.__name__} has none; leave it "
                "out, or take scheduler=flow_euler or flow_dpm"
            )
        wanted |= {"shift": cfg.shift, "use_dynamic_shifting": False, "shift_terminal": None}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **wanted)


def _flow_solver(pipe: Any, cfg: SourceConfig) -> Any:
    """DPM-Solver++ of second order on a flow, as Sana's pipeline has it."""
    import diffusers

    if type(pipe).__name__ not in _SOLVED:
        raise ValueError(
            f"source {cfg.where!r}: scheduler flow_dpm works in {' and '.join(_SOLVED)}, this is a "
            f"{type(pipe).__name__}; use flow_euler"
        )
    own = pipe.scheduler.config
    shift = cfg.shift or own.get("shift") or own.get("flow_shift") or 1.0
    kind: Any = diffusers.DPMSolverMultistepScheduler
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def step_arguments(pipe: Any, cfg: SourceConfig) -> Mapping[str, Any]:
    """What the call needs for cfg.timesteps and cfg.eta. ValueError where pipeline or scheduler would not read them."""
    call = inspect.signature(pipe.__call__).parameters
    found: dict[str, Any] = {}
    if cfg.timesteps:
        if cfg.steps not in (None, len(cfg.timesteps)):
            raise ValueError(f"source {cfg.where!r}: steps = {cfg.steps}, but timesteps has {len(cfg.timesteps)}")
        _check(cfg, "timesteps", type(pipe).__name__, "timesteps" in call)
        _check(cfg, "timesteps", type(pipe.scheduler).__name__, _reads(pipe.scheduler.set_timesteps, "timesteps"))
        found |= {"timesteps": list(cfg.timesteps), "num_inference_steps": len(cfg.timesteps)}
    if cfg.eta is not None:
        _check(cfg, "eta", type(pipe).__name__, "eta" in call)
        _check(cfg, "eta", type(pipe.scheduler).__name__, _reads(pipe.scheduler.step, "eta"))
        found["eta"] = cfg.eta
    return found


def _reads(method: Any, name: str) -> bool:
    return name in inspect.signature(method).parameters


def _check(cfg: SourceConfig, key: str, kind: str, reads: bool) -> None:
    if not reads:
        raise ValueError(f"source {cfg.where!r}: {key} is set, but a {kind} does not read it; leave it out")
