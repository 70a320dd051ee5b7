"""The rank of this process, from the environment variables that torchrun sets. No torch here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

RANK_LOST = 4
"""Exit code of a run that ended because a rank hung or was lost."""


@dataclass(frozen=True)
class RankInfo:
    """rank of size processes; local_rank of local_size on this machine. One process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes."""
        return self.rank == 0


def rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """The rank of this process. ValueError when only some of torchrun's variables are set."""
    given = os.environ if environment is None else environment
    size = _number(given, "WORLD_SIZE", 1)
    if size == 1:
        return RankInfo()
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if lacking:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(lacking)} is not set: start several processes with torchrun or "
            "gdmd train --gpus N, or unset WORLD_SIZE"
        )
    found = RankInfo(
        _number(given, "RANK", 0), size, _number(given, "LOCAL_RANK", 0), _number(given, "LOCAL_WORLD_SIZE", 1)
    )
    if not 0 <= found.rank < size or not 0 <= found.local_rank < found.local_size:
        raise ValueError(
            f"RANK {found.rank} of {size}, LOCAL_RANK {found.local_rank} of {found.local_size} contradict each other"
        )
    return found


def restart_count() -> int:
    """How often torchrun has restarted the ranks after one of them failed (--max-restarts)."""
    return _number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)


def module_arguments(module: str) -> list[str]:
    """Arguments of ``python`` that run a module with the import path of this process.

    ``-m`` alone puts the current folder first, where a user's file such as random.py would hide Python's own.
    """
    return [*([] if sys.path[0] in ("", os.getcwd()) else ["-P"]), "-m", module]


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"the environment variable {name} is {text!r}: torchrun sets a number; unset it for one process"
        )
    return int(text)
