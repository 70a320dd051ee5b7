"""Malformed inputs must give a value or one of this package's errors, within a time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from gdmd.config.load import ConfigError
from gdmd.io import RunError
from gdmd.runs.checkpoint import DamagedCheckpoint

OWN = (ValueError, ConfigError, RunError, DamagedCheckpoint)
LONGEST_S = 10
_MOST = settings.default.max_examples
CASES = settings(max_examples=25 if _MOST == 100 else _MOST)
"""Few examples in a test run; as many as the profile sets in ``make fuzz``."""


class Hang(BaseException):
    """Not an Exception, so that no handler catches it as a malformed input."""


class Trap:
    """An object that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def refusal(action: Callable[[], Any]) -> str:
    """The error message of ``action``, "" if it succeeds. Other errors and timeouts are raised."""

    def stop(*_: object) -> None:
        raise Hang(f"no answer within {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        action()
    except OWN as error:
        assert type(error) in OWN, f"{type(error).__name__} is an internal error: {error}"
        message = str(error)
        assert len(message) > 15, f"too short: {message!r}"
        message.encode()  # can be printed
        return message
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return ""


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[Any], fragments: st.SearchStrategy[Any]) -> Any:
    """An original (text or bytes) with one to three parts overwritten, removed or inserted."""
    content = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        content = content[:start] + draw(fragments) + content[start + draw(st.integers(0, 40)) :]
    return content
