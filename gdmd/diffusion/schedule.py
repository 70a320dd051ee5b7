"""Noise schedules and the conversions between x0, eps, velocity and VP-v: the one place where they meet.

Convention: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], 0 = data, 1 = noise; everything is computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.types import Native, Prediction, Schedule


def expand(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] (as many ones as ``like`` has trailing dimensions)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


Time = TypeVar("Time", float, Tensor)


def shift_time(t: Time, shift: float) -> Time:
    """Timestep shift of the flow families (SD3, arXiv 2403.03206, eq. 23): t -> s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - t, sigma = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class VpSchedule:
    """Variance preserving (SD1.5, SDXL): T training steps with betas, t = t_T / (T - 1). The default is SDXL's.

    Betas are "linear", "scaled_linear" (linear in their roots) or "squaredcos_cap_v2" (arXiv 2102.09672), or given as
    ``trained_betas``. ``zero_snr`` rescales them so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
    Between two training steps the log-SNR is interpolated linearly, so that alpha^2 + sigma^2 = 1 everywhere. Before a
    last step of pure noise, where the log-SNR is infinite, alpha is. t < 0 is before the first step: clean data.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] = ()
    zero_snr: bool = False
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def betas(self) -> Tensor:
        """The betas before any rescaling. [T], float64"""
        if self.trained_betas:
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        match self.beta_schedule:
            case "linear":
                return torch.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=torch.float64)
            case "scaled_linear":
                low, high = self.beta_start**0.5, self.beta_end**0.5
                return torch.linspace(low, high, self.train_steps, dtype=torch.float64) ** 2
            case "squaredcos_cap_v2":
                u = torch.linspace(0, 1, self.train_steps + 1, dtype=torch.float64)
                bar = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
                return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        raise ValueError(f"unknown beta_schedule {self.beta_schedule!r}")

    def _log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2) at the training steps. [T], float64"""
        log_bar = torch.log1p(-self.betas()).cumsum(0)
        if self.zero_snr:
            root = (log_bar / 2).exp()
            log_bar = 2 * torch.log((root - root[-1]) * root[0] / (root[0] - root[-1]))
        return log_bar - torch.log(-torch.expm1(log_bar))

    def _table(self, device: torch.device) -> Tensor:
        """``_log_snr``, computed once per device."""
        if device not in self._tables:
            with torch.inference_mode(False):  # a table made in inference mode could not be used in training
                self._tables[device] = to_device_async(self._log_snr(), device)
        return self._tables[device]

    def _logit(self, t: Tensor) -> Tensor:
        logit = self._table(t.device)
        place = t.to(torch.float64) * (self.train_steps - 1)
        low = place.floor().clamp(0, self.train_steps - 2)
        mix = place - low
        low_index = low.to(torch.int64)
        between = torch.lerp(logit[low_index], logit[low_index + 1], mix)
        if self.zero_snr:
            falling = torch.sigmoid(logit[-2]) * (1 - mix) ** 2
            between = torch.where(low_index == self.train_steps - 2, torch.logit(falling), between)
        return torch.where(place < 0, torch.inf, between)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self._logit(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self._logit(t)).sqrt().to(t.dtype)


def _coefficients(x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    return expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)


def widen(x: Tensor) -> Tensor:
    """``x`` in at least fp32: half precision is converted, float64 (in tests) stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """eps = (x_t - alpha x0) / sigma. Undefined at t = 0."""
    x0, x_t = widen(x0), widen(x_t)
    alpha, sigma = _coefficients(x_t, t, schedule)
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def from_eps(eps: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """x0 = (x_t - sigma eps) / alpha. Undefined where alpha = 0 (flow at t = 1)."""
    eps, x_t = widen(eps), widen(x_t)
    alpha, sigma = _coefficients(x_t, t, schedule)
    return Prediction((x_t - sigma * eps) / alpha, eps)


def from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """velocity = eps - x0. With x_t = alpha x0 + sigma eps: x0 = (x_t - sigma velocity) / (alpha + sigma)."""
    velocity, x_t = widen(velocity), widen(x_t)
    alpha, sigma = _coefficients(x_t, t, schedule)
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    return Prediction(x0, x0 + velocity)


def from_v_vp(v_vp: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """VP v-prediction (arXiv 2202.00512): v_vp = alpha eps - sigma x0, for schedules with alpha^2 + sigma^2 = 1."""
    v_vp, x_t = widen(v_vp), widen(x_t)
    alpha, sigma = _coefficients(x_t, t, schedule)
    return Prediction(alpha * x_t - sigma * v_vp, sigma * x_t + alpha * v_vp)


def to_v_vp(prediction: Prediction, t: Tensor, schedule: Schedule) -> Tensor:
    """The VP "v" of a prediction, alpha eps - sigma x0."""
    alpha, sigma = _coefficients(prediction.x0, t, schedule)
    return alpha * prediction.eps - sigma * prediction.x0


def from_native(output: Tensor, native: Native, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """The prediction that a network's output at x_t stands for."""
    convert = {"eps": from_eps, "velocity": from_velocity, "v": from_v_vp, "x0": from_x0}[native]
    return convert(output, x_t, t, schedule)


def to_native(prediction: Prediction, native: Native, t: Tensor, schedule: Schedule) -> Tensor:
    """The inverse: the output of a network that predicts ``native``."""
    if native == "v":
        return to_v_vp(prediction, t, schedule)
    return {"eps": prediction.eps, "velocity": prediction.velocity, "x0": prediction.x0}[native]


def renoise(x0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps. x0, eps [B, C, H, W]; t [B]; fp32 or wider."""
    x0 = widen(x0)
    alpha, sigma = _coefficients(x0, t, schedule)
    return alpha * x0 + sigma * widen(eps)
