"""Random draws that belong to samples: a draw is a pure function of (seed, step, sample, purpose, i).

Counter-based (Philox4x32-10, Salmon et al., SC 2011) in plain integer tensor arithmetic. So a draw depends on no
rank, batch size, micro-batch, order of calls or device, and a resumed run needs no generator state.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit values held in int64.

    The product may overflow into the sign bit, which keeps all 64 bits; the mask removes the sign bits of the shift.
    """
    whole = b * a
    return (whole >> 32) & _MASK, whole & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counters (int64 tensors holding 32-bit values, broadcastable) -> four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _mul_hi_lo(_MUL[0], c0)
        high1, low1 = _mul_hi_lo(_MUL[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class SampleRng:
    """Draws for the samples ``index`` ([B] int64) of one step.

    ``purpose`` names what a draw is for ("noise", "renoise_t", ...); ``i`` is its number in a group or a rollout.
    host: ``index`` on the CPU, if ``index`` is on an accelerator.
    scope: a prefix of every purpose, so that the same code draws other numbers.
    """

    seed: int
    step: int
    index: Tensor  # [B] int64
    host: Tensor | None = None  # [B] int64
    scope: str = ""

    def _words(self, purpose: str, i: int, count: int) -> tuple[Tensor, ...]:
        block = torch.arange(-(-count // 4), device=self.index.device)  # [N/4]
        place = torch.full_like(block, self.step & _MASK)
        salt = torch.full_like(block, (zlib.crc32((self.scope + purpose).encode()) + 0x9E3779B1 * i) & _MASK)
        who = self.index[:, None]
        return philox((block[None], who & _MASK, place[None], salt[None]), (self.seed & _MASK, self.seed >> 32))

    def uniform(self, purpose: str, i: int = 0, count: int = 1, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B] (count 1) or [B, count], fp32, in the open interval (low, high)."""
        words = torch.stack(self._words(purpose, i, count), -1).flatten(1)[:, :count]
        unit = ((words >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with 24, + 0.5 would round up to 1 in fp32
        drawn = low + (high - low) * unit
        return drawn[:, 0] if count == 1 else drawn

    def normal(self, purpose: str, shape: tuple[int, ...], i: int = 0) -> Tensor:
        """Standard normal [B, *shape], fp32 (Box-Muller on 24-bit uniforms)."""
        count = math.prod(shape)
        w0, w1, w2, w3 = self._words(purpose, i, count)
        radius = torch.stack([w0, w2], -1)
        angle = torch.stack([w1, w3], -1)
        length = torch.sqrt(-2 * torch.log(((radius >> 8).float() + 0.5) * 2.0**-24))
        turn = (angle >> 8).float() * (2 * math.pi * 2.0**-24)
        drawn = torch.stack([length * torch.cos(turn), length * torch.sin(turn)], -1)
        return drawn.flatten(1)[:, :count].reshape(-1, *shape)

    def integer(self, purpose: str, high: int | Tensor, i: int = 0) -> Tensor:
        """[B] int64, uniform on 0 ... high - 1 (the bias of the 32-bit multiply is below high / 2^32).

        high: one number, or one per sample ([B] int64).
        """
        word = self._words(purpose, i, 1)[0][:, 0]
        return (word * high) >> 32

    def at(self, step: int) -> SampleRng:
        """The same samples at another step."""
        return replace(self, step=step)

    def scoped(self, name: str) -> SampleRng:
        """Independent draws for the same samples and purposes."""
        return replace(self, scope=f"{self.scope}{name}/")

    def on_host(self) -> SampleRng:
        """The same draws on the CPU, for those that Python reads; no synchronization if ``host`` is given."""
        return replace(self, index=self.index.cpu() if self.host is None else self.host, host=None)
