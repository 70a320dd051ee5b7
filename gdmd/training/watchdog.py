"""Who hangs? Every rank publishes how many collectives it entered; the one that is behind while others wait is named."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from gdmd.training.rank import RankInfo

RANK_LOST = 4
"""Exit code of a run that ended because a rank hung or was lost."""


class Store(Protocol):
    """The part of torch's key-value store that is used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


@contextmanager
def watching(
    rank_info: RankInfo, pulse: Callable[[], int], store: Store, patience: float, standing: Callable[[], str]
) -> Iterator[None]:
    """Inside, a thread publishes ``pulse`` and ends this process when the run hangs, with exit code RANK_LOST.

    Only differences count: while all ranks stand at the same pulse they work, however long that takes. ``standing`` may
    finish what is being saved before it says which checkpoint is the last good one.
    """
    dog = _Watchdog(rank_info, pulse, store, patience, standing)
    dog.publish()
    dog.start()
    try:
        yield
    finally:
        dog.stopping.set()
        dog.join(patience)


class _Watchdog(threading.Thread):
    def __init__(
        self, rank_info: RankInfo, pulse: Callable[[], int], store: Store, patience: float, standing: Callable[[], str]
    ) -> None:
        super().__init__(name="gdmd-watchdog", daemon=True)
        self.rank_info, self.pulse, self.store, self.patience, self.standing = (
            rank_info,
            pulse,
            store,
            patience,
            standing,
        )
        self.stopping = threading.Event()
        self._host = socket.gethostname()

    def publish(self) -> None:
        self.store.set(f"gdmd/pulse/{self.seat.rank}", f"{self.pulse()} {self._host}")

    def run(self) -> None:
        seen, since = -1, time.monotonic()
        while not self.stopping.wait(min(self.patience / 4, 5.0)):
            now = self.pulse()
            if now != seen:
                seen, since = now, time.monotonic()
            waited = time.monotonic() - since
            try:
                self.publish()
                if waited > self.patience:
                    self._compare(waited)
            except RuntimeError as error:  # the store is gone, and with it the launcher or rank 0
                if not self.stopping.wait(1.0):
                    lost = f"rank {self.seat.rank} lost the launcher or rank 0 ({str(error).splitlines()[0][:120]})"
                    self._end(lost, stuck=waited > self.patience)

    def _compare(self, waited: float) -> None:
        pulses = [self.store.get(f"gdmd/pulse/{rank}").decode().split(" ", 1) for rank in range(self.rank_info.size)]
        counts = [int(count) for count, _ in pulses]
        behind = [rank for rank, count in enumerate(counts) if count < max(counts)]
        names = ", ".join(f"rank {rank} (on {pulses[rank][1]})" for rank in behind)
        if behind and self.rank_info.rank not in behind:
            one = "hangs or is" if len(behind) == 1 else "hang or are"
            self._end(f"{names} {one} too slow: the others have waited for {waited:.0f} s (loop.rank_timeout)")
        if self.rank_info.rank in behind and waited > 2 * self.patience:
            self._end(f"rank {self.seat.rank} hung for {waited:.0f} s", stuck=True)

    def _end(self, why: str, *, stuck: bool = False) -> None:
        if stuck:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(f"error: {why}. {self.standing()}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe keeps nobody
                stream.flush()
        os._exit(RANK_LOST)  # the main thread waits inside a collective and cannot be woken
