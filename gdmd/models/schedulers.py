"""Read what a base model's scheduler says about the model; each diffusers class has different keys.

The same setting has different keys in different classes (``flow_shift`` and ``shift``), so every class is listed here with
the keys that are read. Keys of the sampler rather than the model (order, Karras spacing, clipping) are known and ignored;
any other key that differs from its default is an error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gdmd.diffusion.schedule import VpSchedule
from gdmd.models.timesteps import FlowTimesteps, Spacing, VpTimesteps
from gdmd.types import Native, StudentSampler

Kind = Literal["flow", "vp", "edm", "unknown"]

_SHIFTED = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_SOLVERS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)
"""Solvers for both kinds of model: for flow models with use_flow_sigmas; their shift is called flow_shift."""
_BETAS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
    *("LCMScheduler", "TCDScheduler", *_SOLVERS),
)
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FEW_STEPS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers used only to sample few-step models."""
_PARTLY_NOISY = (
    *("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DPMSolverSDEScheduler", "SASolverScheduler"),
)
"""Schedulers that replace a part of the noise in every step, as SDXL-Turbo's."""

_SPACED = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}
_SAMPLER = {
    *("solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final", "predict_x0"),
    *("disable_corrector", "predictor_order", "corrector_order", "tau_func", "use_lu_lambdas", "lambda_min_clipped"),
    *("interpolation_type", "sigma_min", "sigma_max", "final_sigmas_type", "clip_sample", "clip_sample_range"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "noise_sampler_seed"),
    *("original_inference_steps", "timestep_scaling", "stochastic_sampling", "upscale_mode"),
}
"""Settings of the solver, not of the network."""
_OF_FLOW = {
    *("num_train_timesteps", "shift", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "prediction_type", "use_flow_sigmas"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),  # not used by flow sigmas
    *("timestep_spacing", "steps_offset"),
}
_OF_VP = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "flow_shift", "time_shift_type"),
}
_PREDICTS: Mapping[str, Native] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def kind_of(scheduler: Any) -> Kind:
    """The kind of model a diffusers scheduler belongs to."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in _SHIFTED:
        return "flow"
    if name in _EDM or config.get("timestep_type") == "continuous":  # both read 0.25 log sigma as the network's time
        return "edm"
    if name in _SOLVERS and (config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
        return "flow"
    return "vp" if name in _BETAS else "unknown"


def sampler_of(scheduler: Any) -> StudentSampler | None:
    """The student's sampler that steps as this scheduler does; None for one that replaces a part of the noise."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in FEW_STEPS or config.get("stochastic_sampling"):
        return "renoise"
    return None if name in _PARTLY_NOISY or str(config.get("algorithm_type")).startswith("sde") else "ode"


KINDS: Mapping[Kind, str] = {
    "flow": "flow models",
    "vp": "models with a beta schedule",
    "edm": "EDM models",
    "unknown": "others",
}
"""Names for messages."""


def shift_key(kind: type[Any]) -> str | None:
    """The key of the flow shift in a scheduler class; None if it has none."""
    if kind.__name__ in _SOLVERS:
        return "flow_shift"
    return "shift" if kind.__name__ in _SHIFTED else None


def check_kind(scheduler: Any, wanted: Kind, model: str) -> None:
    """ValueError for a scheduler of another kind of model; ``model`` starts the message."""
    found, name = kind_of(scheduler), type(scheduler).__name__
    if found == wanted:
        return
    of = {"flow": "a flow model", "vp": "a model with a beta schedule"}
    if found == "edm" and wanted == "vp":
        raise ValueError(
            f"{model} is an EDM model (its scheduler: {name}), such as Playground v2.5 or CosXL: its network reads "
            "log sigma. EDM is not supported, because no diffusers scheduler could sample its few-step student. Use a "
            "base model with a beta schedule, such as SDXL"
        )
    prediction = (
        f", prediction_type = {scheduler.config.prediction_type!r}" if "prediction_type" in scheduler.config else ""
    )
    what = f"is for {KINDS[found]}" if found != "unknown" else "is not supported by gdmd"
    take = "FlowMatchEulerDiscreteScheduler" if wanted == "flow" else "DDIMScheduler or EulerDiscreteScheduler"
    take += (
        ", or this one with use_flow_sigmas = true, prediction_type = 'flow_prediction' and its flow_shift"
        if wanted == "flow" and name in _SOLVERS
        else ""
    )
    raise ValueError(
        f"{model} is {of[wanted]}, but its scheduler ({name}{prediction}) {what}. Save the pipeline with the "
        f"scheduler it was trained with: {take}"
    )


def _check_keys(scheduler: Any, known: set[str]) -> None:
    """ValueError for a key of this class that is not in ``known`` and differs from its default."""
    name, config = type(scheduler).__name__, scheduler.config
    for key, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        if key in known or key in ("self", "kwargs") or key not in config:
            continue
        default = parameter.default
        if config[key] != default and not (config[key] is None and default is False):
            raise ValueError(
                f"the pipeline's scheduler ({name}) has {key} = {config[key]!r}, which is not supported; save the "
                f"pipeline with {key} = {default!r}, if the model was trained that way"
            )


@dataclass(frozen=True)
class FlowSettings:
    """A flow model's times: a constant ``shift``, or with ``dynamic`` one that grows with the image.

    ``terminal``: the teacher's last time; ``train_steps``: the network reads t = 1 as this number.
    """

    train_steps: int = 1000
    shift: float = 1.0
    dynamic: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: Literal["exponential", "linear"] = "exponential"
    terminal: float | None = None

    def timesteps(self, tokens: int, mu: float | None = None) -> FlowTimesteps:
        """The times for an image of ``tokens`` patches; ``mu`` replaces the linear formula for some pipelines."""
        if not self.dynamic:
            return FlowTimesteps(self.shift, self.terminal)
        if mu is None:
            rise = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            mu = self.base_shift + (tokens - self.base_tokens) * rise
        return FlowTimesteps(mu if self.kind == "linear" else math.exp(mu), self.terminal)

    def euler(self) -> dict[str, Any]:
        """The config of a FlowMatchEulerDiscreteScheduler with these times."""
        return {
            "num_train_timesteps": self.train_steps,
            "shift": self.shift,
            "use_dynamic_shifting": self.dynamic,
            "base_shift": self.base_shift,
            "max_shift": self.max_shift,
            "base_image_seq_len": self.base_tokens,
            "max_image_seq_len": self.max_tokens,
            "time_shift_type": self.kind,
            "shift_terminal": self.terminal,
        }

    def few_steps(self, sampler: StudentSampler) -> dict[str, Any]:
        """The config of one that samples a student; without terminal, which would stretch its few steps too."""
        return self.euler() | {"shift_terminal": None, "stochastic_sampling": sampler == "renoise"}


def read_flow(scheduler: Any, model: str, max_shift: float = 1.15, max_tokens: int = 4096) -> FlowSettings:
    """The times of a flow pipeline's scheduler. ``max_shift``, ``max_tokens``: the pipeline's if the config has none.

    ValueError for a scheduler of another kind of model, and for unsupported settings.
    """
    check_kind(scheduler, "flow", model)
    name, config = type(scheduler).__name__, scheduler.config
    if name in _SOLVERS and not (config.use_flow_sigmas and config.prediction_type == "flow_prediction"):
        raise ValueError(
            f"{model} is a flow model, but its {name} has prediction_type = {config.prediction_type!r} and "
            f"use_flow_sigmas = {config.use_flow_sigmas}; set 'flow_prediction' and true"
        )
    _check_keys(scheduler, _OF_FLOW | _SAMPLER)
    found = FlowSettings(
        train_steps=int(config.num_train_timesteps),
        shift=float(config[shift_key(type(scheduler))]),
        dynamic=bool(_read(scheduler, "use_dynamic_shifting")),
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", max_shift),
        base_tokens=config.get("base_image_seq_len", 256),
        max_tokens=config.get("max_image_seq_len", max_tokens),
        kind=_read(scheduler, "time_shift_type") or "exponential",
        terminal=_read(scheduler, "shift_terminal") or None,
    )
    _check_flow(found, name)
    return found


def _read(scheduler: Any, key: str) -> Any:
    """A key that the scheduler's class reads. Configs also keep keys of the class they were converted from."""
    return scheduler.config.get(key) if key in inspect.signature(type(scheduler).__init__).parameters else None


def _check_flow(found: FlowSettings, name: str) -> None:
    what = f"the pipeline's scheduler ({name}) has"
    if found.shift <= 0:
        raise ValueError(f"{what} a shift of {found.shift}; it must be above 0")
    if found.terminal is not None and not 0 < found.terminal < 1:
        raise ValueError(f"{what} shift_terminal = {found.terminal}; it must be between 0 and 1")
    if not found.dynamic:
        return
    if found.base_shift is None or found.max_shift is None:
        raise ValueError(f"{what} use_dynamic_shifting without base_shift or max_shift; set both")
    if found.base_tokens >= found.max_tokens:
        raise ValueError(
            f"{what} base_image_seq_len = {found.base_tokens} and max_image_seq_len = {found.max_tokens}; the second "
            "must be larger"
        )


@dataclass(frozen=True)
class VpSettings:
    """A VP model's betas, what its network predicts, and the steps at which its pipeline samples."""

    schedule: VpSchedule
    predicts: Native
    timesteps: VpTimesteps

    def few_steps(self, steps: int, sampler: StudentSampler) -> dict[str, Any]:
        """The config of a scheduler that samples a student of ``steps`` steps.

        An LCMScheduler for ``renoise``. For ``ode`` a DPM-Solver++ of order 1, which is DDIM (arXiv 2211.01095, section 4)
        and, unlike diffusers' DDIMScheduler, takes any timesteps.
        """
        schedule, named = self.schedule, {value: key for key, value in _PREDICTS.items()}
        solver: dict[str, Any] = {
            "renoise": {"original_inference_steps": steps, "timestep_scaling": 10.0, "clip_sample": False},
            "ode": {"solver_order": 1, "timestep_spacing": "trailing"},
        }
        return {
            "num_train_timesteps": schedule.train_steps,
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule,
            "trained_betas": list(schedule.trained_betas) or None,
            "rescale_betas_zero_snr": schedule.zero_snr,
            "prediction_type": named[self.predicts],
            **solver[sampler],
        }


def read_vp(scheduler: Any, model: str) -> VpSettings:
    """The betas and the prediction of a VP pipeline's scheduler.

    ValueError for a scheduler of another kind of model, and for unsupported or impossible settings.
    """
    check_kind(scheduler, "vp", model)
    name, config = type(scheduler).__name__, scheduler.config
    what = f"the pipeline's scheduler ({name}) has"
    _check_keys(scheduler, _OF_VP | _SAMPLER | _SPACED | {"variance_type"})
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(f"{what} variance_type = {config.variance_type!r}, which is not supported")
    predicts = _PREDICTS.get(config.prediction_type)
    if predicts is None:
        raise ValueError(f"{what} prediction_type = {config.prediction_type!r}; supported are {', '.join(_PREDICTS)}")
    schedule = _read_betas(scheduler, predicts, what)
    spacing: Spacing = _read(scheduler, "timestep_spacing") or "linspace"
    if spacing not in get_args(Spacing):
        raise ValueError(f"{what} timestep_spacing = {spacing!r}; supported are {', '.join(get_args(Spacing))}")
    first = _read(scheduler, "set_alpha_to_one") is False or _read(scheduler, "final_sigmas_type") == "sigma_min"
    offset = int(_read(scheduler, "steps_offset") or 0)
    return VpSettings(schedule, predicts, VpTimesteps(schedule.train_steps, spacing, offset, first))


def _read_betas(scheduler: Any, predicts: Native, what: str) -> VpSchedule:
    config, zero = scheduler.config, bool(_read(scheduler, "rescale_betas_zero_snr"))
    if zero and predicts == "eps":
        raise ValueError(
            f"{what} rescale_betas_zero_snr with prediction_type = 'epsilon': the last step is pure noise, and no image "
            "can be computed from a prediction of it. Models with zero terminal SNR predict v: set prediction_type = "
            "'v_prediction' if this one does, else rescale_betas_zero_snr = false"
        )
    betas = config.beta_schedule
    if config.trained_betas is None and betas not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise ValueError(f"{what} beta_schedule = {betas!r}; supported are linear, scaled_linear and squaredcos_cap_v2")
    trained = tuple(float(beta) for beta in config.trained_betas) if config.trained_betas is not None else ()
    steps = int(config.num_train_timesteps)
    if steps < 2 or (trained and len(trained) != steps):
        raise ValueError(
            f"{what} num_train_timesteps = {steps}, and {len(trained)} trained_betas; give 2 steps or more, and one beta "
            "for each"
        )
    schedule = VpSchedule(float(config.beta_start), float(config.beta_end), steps, betas, trained, zero)
    table = schedule.betas()
    if not bool(((table > 0) & (table < 1)).all()):
        raise ValueError(f"{what} betas from {table.min():g} to {table.max():g}; they must be between 0 and 1")
    return schedule
