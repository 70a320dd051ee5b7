"""Scheduler, shift, timesteps and eta of a pipeline as a source of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gdmd.config.image_source import SourceConfig
from gdmd.models.families.flow import FlowFamily
from gdmd.models.loading import family_of_pipeline
from gdmd.models.schedulers import KINDS, FlowSettings, check_kind, kind_of, read_flow, shift_key

CLASSES = {
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
"""Value of ``scheduler`` -> class in diffusers."""
SOLVER_PIPELINES = ("StableDiffusion3Pipeline", "SanaPipeline")
"""Pipelines that leave the shift to a solver; the others pass one of their own."""
SCHEDULERS_BY_KIND = {"flow": "flow_euler", "vp": "ddim, euler, euler_ancestral, lcm or tcd"}


def set_scheduler(pipe: Any, cfg: SourceConfig) -> None:
    """Give ``pipe`` the scheduler, spacing and shift of ``cfg``. ValueError for what the scheduler does not read."""
    pipe.scheduler = _scheduler(pipe, cfg)
    if cfg.spacing:
        config = pipe.scheduler.config
        _check(cfg, "spacing", _named(pipe.scheduler), "timestep_spacing" in config and not _at_flow_sigmas(config))


def _scheduler(pipe: Any, cfg: SourceConfig) -> Any:
    import diffusers

    own = pipe.scheduler
    if cfg.scheduler == "flow_dpm":
        return _flow_solver(pipe, cfg)
    _check_model(own, cfg)
    kind: Any = getattr(diffusers, CLASSES[cfg.scheduler]) if cfg.scheduler else type(own)
    if cfg.scheduler == "flow_euler" and not isinstance(own, kind):
        return kind(**_flow(cfg, pipe).euler())
    return kind.from_config(own.config, **_changes(cfg, own, kind))


def _changes(cfg: SourceConfig, own: Any, kind: Any) -> dict[str, Any]:
    """The changes of spacing and shift, under this class's names. ValueError for a shift that it does not read."""
    reads = inspect.signature(kind.__init__).parameters
    wanted: dict[str, Any] = {}
    if cfg.spacing and "timestep_spacing" in reads:
        wanted["timestep_spacing"] = cfg.spacing
    if cfg.shift is not None:
        key = shift_key(kind) if cfg.scheduler == "flow_euler" or kind_of(own) == "flow" else None
        if key is None:
            raise ValueError(
                f"source {cfg.where!r}: shift = {cfg.shift} is for flow models, and {kind.__name__} has none; leave it "
                "out, or use scheduler=flow_euler or flow_dpm"
            )
        fixed = {"use_dynamic_shifting": False, "shift_terminal": None}
        wanted |= {key: cfg.shift} | {name: value for name, value in fixed.items() if name in reads}
    return wanted


def _check_model(own: Any, cfg: SourceConfig) -> None:
    """ValueError for a scheduler of another kind of model than the pipeline's."""
    if cfg.scheduler is None or (cfg.scheduler.startswith("flow_") and cfg.shift is not None):
        return
    wanted, found = "flow" if cfg.scheduler.startswith("flow_") else "vp", kind_of(own)
    if wanted != found:
        raise ValueError(
            f"source {cfg.where!r}: scheduler={cfg.scheduler} is not for this pipeline, whose {type(own).__name__} is for "
            f"{KINDS[found]}; leave it out, or use {SCHEDULERS_BY_KIND.get(found, 'a scheduler of its kind')}"
        )


def _flow(cfg: SourceConfig, pipe: Any) -> FlowSettings:
    """The requested constant shift, or the times of the pipeline with its own scheduler."""
    family = family_of_pipeline(pipe)
    read = family.read_settings if family is not None and issubclass(family, FlowFamily) else read_flow
    return FlowSettings(shift=cfg.shift) if cfg.shift is not None else read(pipe.scheduler, f"source {cfg.where!r}")


def check_scheduler(pipe: Any, cfg: SourceConfig) -> None:
    """ValueError for a known pipeline whose scheduler is for another kind of model: it would generate noise."""
    family, found = family_of_pipeline(pipe), kind_of(pipe.scheduler)
    if family is None or found == "unknown":
        return
    name = type(pipe.scheduler).__name__
    solves_flow = found == "flow" and shift_key(type(pipe.scheduler)) == "flow_shift"
    if issubclass(family, FlowFamily):
        check_kind(pipe.scheduler, "flow", f"source {cfg.where!r}")
    elif found == "flow" and not solves_flow:
        raise ValueError(
            f"source {cfg.where!r}: a {type(pipe).__name__} cannot use its {name}; give one with scheduler=ddim or euler"
        )


def _flow_solver(pipe: Any, cfg: SourceConfig) -> Any:
    """Second-order DPM-Solver++ for flows, as in Sana's pipeline."""
    import diffusers

    if type(pipe).__name__ not in SOLVER_PIPELINES:
        raise ValueError(
            f"source {cfg.where!r}: scheduler flow_dpm works in {' and '.join(SOLVER_PIPELINES)}, this is a "
            f"{type(pipe).__name__}; use flow_euler"
        )
    _check_model(pipe.scheduler, cfg)
    times = _flow(cfg, pipe)
    if times.dynamic:
        raise ValueError(f"source {cfg.where!r}: flow_dpm has no dynamic shift, which this pipeline has; give shift=")
    kind: Any = diffusers.DPMSolverMultistepScheduler
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=times.shift)


def step_arguments(pipe: Any, cfg: SourceConfig) -> Mapping[str, Any]:
    """The call's arguments for cfg.timesteps and cfg.eta. ValueError if pipeline or scheduler does not read them."""
    call = inspect.signature(pipe.__call__).parameters
    found: dict[str, Any] = {}
    if (own := pipe.config.get("sample_sigmas")) and cfg.steps not in (None, len(own)):
        raise ValueError(
            f"source {cfg.where!r}: steps={cfg.steps} does nothing for this {type(pipe).__name__}, which is always sampled "
            f"at its own times of {len(own)} steps; leave it out"
        )
    if cfg.timesteps:
        if cfg.steps not in (None, len(cfg.timesteps)):
            raise ValueError(
                f"source {cfg.where!r}: steps = {cfg.steps}, but timesteps has {len(cfg.timesteps)} values"
            )
        _check(cfg, "timesteps", type(pipe).__name__, "timesteps" in call)
        reads = _reads(pipe.scheduler.set_timesteps, "timesteps") and not _at_flow_sigmas(pipe.scheduler.config)
        _check(cfg, "timesteps", _named(pipe.scheduler), reads)
        found |= {"timesteps": list(cfg.timesteps), "num_inference_steps": len(cfg.timesteps)}
    if cfg.eta is not None:
        _check(cfg, "eta", type(pipe).__name__, "eta" in call)
        _check(cfg, "eta", type(pipe.scheduler).__name__, _reads(pipe.scheduler.step, "eta"))
        found["eta"] = cfg.eta
    return found


def _at_flow_sigmas(config: Mapping[str, Any]) -> bool:
    """Whether a solver takes its times from the number of steps and the shift alone."""
    return bool(config.get("use_flow_sigmas"))


def _named(scheduler: Any) -> str:
    return f"{type(scheduler).__name__}{' with use_flow_sigmas' if _at_flow_sigmas(scheduler.config) else ''}"


def _reads(method: Any, name: str) -> bool:
    return name in inspect.signature(method).parameters


def _check(cfg: SourceConfig, key: str, kind: str, reads: bool) -> None:
    if not reads:
        raise ValueError(f"source {cfg.where!r}: {key} is set, but a {kind} does not read it; leave it out")
