"""Host and device without synchronization: host tensors are copied asynchronously, device values are read in one go.

Reading a number from an accelerator waits for all of its queued work. So draws on which Python branches are made on the
host (``SampleRng.on_host``), small tensors are copied asynchronously, and a check of device values is deferred to the
one place of an update where the host must synchronize anyway: before the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes by their names in a configuration."""
MakeError = Callable[[list[int]], Exception]
"""The error of a check, from the positions where it failed."""

_deferred: ContextVar[list[tuple[Tensor, MakeError]] | None] = ContextVar("deferred checks", default=None)


def pick_device(asked: str | None = None) -> str:
    """The device that is asked for, else the GPU if there is one, else the CPU. ValueError for one that torch lacks here."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = asked.partition(":")
    wanted = int(number) if number.isdecimal() else 0
    if kind == "cuda" and wanted >= (found := torch.cuda.device_count()):
        raise ValueError(
            f"device {asked}: torch {torch.__version__} finds {found} CUDA GPUs; name another, or leave it out"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {asked}: torch {torch.__version__} finds no Apple GPU; name another, or leave it out")
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a kind of device
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device {asked!r} cannot be used ({reason}); give cpu, cuda, cuda:N or mps, or leave it out"
        ) from error
    return asked


def to_device_async(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to the device without blocking (pinned memory); a no-op if it is already there.

    A copy to the host blocks: its values could otherwise be read before they have arrived.
    """
    target = torch.device(device)
    if target.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # a copy from pageable memory blocks
    return values.to(target, non_blocking=target.type != "cpu")


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Inside, failed checks of device tensors are collected, and raised by the next ``confirmed`` or on exit."""
    notes: list[tuple[Tensor, MakeError]] = []
    token = _deferred.set(notes)
    try:
        yield
        _read(notes, [])
    finally:
        _deferred.reset(token)


def raise_where(bad: Tensor, error: MakeError) -> None:
    """Raise error(positions) if ``bad`` [B] (bool) is true anywhere: at once, or later inside ``deferred_checks``."""
    notes = _deferred.get()
    if notes is not None and bad.device.type != "cpu":
        notes.append((bad.detach(), error))
    else:
        _read([(bad, error)], [])


def confirmed(fine: Tensor) -> bool:
    """The value of ``fine`` (0-d bool) after all deferred checks: one read for all. Raises the first check that failed."""
    notes = _deferred.get()
    return _read([] if notes is None else notes, [fine])[0]


def _read(notes: list[tuple[Tensor, MakeError]], others: list[Tensor]) -> list[bool]:
    """The values of ``others`` if no check failed. Empties ``notes``."""
    taken = notes[:]
    notes.clear()
    asked = [bad.any() for bad, _ in taken] + others
    if not asked:
        return []
    answers: list[bool] = torch.stack([to_device_async(one, asked[-1].device) for one in asked]).tolist()
    for failed, (bad, error) in zip(answers, taken, strict=False):
        if failed:
            raise error(torch.nonzero(bad)[:, 0].tolist())
    return answers[len(taken) :]
