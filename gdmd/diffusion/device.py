"""Host and device without waiting: what Python knows is sent ahead, what only the device knows is read in one go.

An accelerator works behind the host, and every number read from it empties its queue. So draws that Python decides by
are made on the host (``SampleRng.on_host``), small tensors are sent asynchronously, and a check whose answer lies on
the device waits until the one place of an update where the host must look anyway: before the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Refusal = Callable[[list[int]], Exception]
"""The error of a check, made from the positions where it failed."""

_noted: ContextVar[list[tuple[Tensor, Refusal]] | None] = ContextVar("checks to be read later", default=None)


def to_device_async(values: Tensor, device: torch.device | str) -> Tensor:
    """``values`` of the host on the device, copied in the order of its work; the host goes on. Itself if it is there."""
    place = torch.device(device)
    if place.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # a copy from pageable memory waits
    return values.to(place, non_blocking=True)


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Inside, ``refuse_where`` only takes note of what lies on a device; ``confirmed`` reads it, at the latest the end."""
    notes: list[tuple[Tensor, Refusal]] = []
    token = _noted.set(notes)
    try:
        yield
        _read(notes, [])
    finally:
        _noted.reset(token)


def raise_where(bad: Tensor, refusal: Refusal) -> None:
    """Raise refusal(positions) if ``bad`` [B] (bool) is true anywhere: at once, or inside ``checks_read_later`` later."""
    notes = _noted.get()
    if notes is not None and bad.device.type != "cpu":
        notes.append((bad.detach(), refusal))
    else:
        _read([(bad, refusal)], [])


def confirmed(fine: Tensor) -> bool:
    """The value of ``fine`` (0-d bool), after all checks that were noted on the way: one read for all of them.

    Errors: the refusal of the first check that failed.
    """
    notes = _noted.get()
    return _read([] if notes is None else notes, [fine])[0]


def _read(notes: list[tuple[Tensor, Refusal]], others: list[Tensor]) -> list[bool]:
    """The values of ``others``, if no note has failed. The notes are taken off the list."""
    taken = notes[:]
    notes.clear()
    asked = [bad.any() for bad, _ in taken] + others
    if not asked:
        return []
    answers: list[bool] = torch.stack([one.to(asked[-1].device, non_blocking=True) for one in asked]).tolist()
    for failed, (bad, refusal) in zip(answers, taken, strict=False):
        if failed:
            raise refusal(torch.nonzero(bad)[:, 0].tolist())
    return answers[len(taken) :]
