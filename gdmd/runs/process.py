"""For processes that write to a folder: a lock on it, signals that stop work at a safe point, and their CPU cores."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gdmd.io import RunError, writing

STUCK_SECONDS = 60
"""Seconds from a stop signal until one of several ranks prints its stack, if it has not exited by then."""


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


RUN_LOCK = ".lock"
"""The file in a run folder that is locked by the process that trains the run."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold an existing run folder: a second process would mix its rows and checkpoints with those of the first.

    RunError if another process holds it. Nothing is checked on Windows or on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with writing("the run folder", folder):
        handle = (folder / RUN_LOCK).open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{folder} is being trained by another process. Wait until it ends, or choose another folder with --run."
            ) from error
        except OSError:  # such as Lustre mounted without flock
            pass
        yield


@contextmanager
def folder_lock(file: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock ``file``. If another process holds it: RunError(``busy``), or wait for it where that is empty."""
    import fcntl  # not on Windows, where single runs work without it

    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise RunError(busy) from error
        yield


@contextmanager
def stop_signals(ranks: int = 1) -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM, so that work can stop at a safe point; a second signal acts as usual.

    Among several ranks further signals are recorded too, since a scheduler and torchrun may both pass on the same
    one; a rank that does not end within STUCK_SECONDS prints its stack.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if ranks == 1:
            restore()
        elif len(received) == 1:
            faulthandler.dump_traceback_later(STUCK_SECONDS, file=sys.__stderr__ or sys.stderr)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield received
    finally:
        restore()
        if ranks > 1 and received:
            faulthandler.cancel_dump_traceback_later()


def stop_with_parent(parent: int) -> None:
    """Send SIGTERM to this process, which saves a checkpoint, once its ``parent`` process has exited.

    The parent's id is an argument: if it has already exited, ``os.getppid()`` is that of another process.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
