"""Where a training begins: at the teacher, at its own newest checkpoint, or at the networks of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gdmd.runs import checkpoint
from gdmd.training.distributed import World
from gdmd.training.ema import load_named
from gdmd.training.state import RoleState
from gdmd.types import Role

HEAD = "gan_head."
"""Of a GAN head, which the other run may not have had: it begins anew."""


def newest(checkpoints: Path, world: World) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of a folder: rank 0 finds it, the others read the same one."""
    found: list[checkpoint.Checkpoint | None] = []

    def find() -> str | None:
        found.append(checkpoint.load_newest(checkpoints))
        return str(found[0].path) if found[0] else None

    path = world.on_first(find)
    return found[0] if found else checkpoint.load(Path(path), verify=False) if path else None


def require_start(run: str) -> None:
    """ValueError unless loop.start_from names a run with a checkpoint."""
    if not run or checkpoint.steps(Path(run) / "checkpoints"):
        return
    what = "has no checkpoint" if Path(run).is_dir() else "is not there"
    raise ValueError(f"loop.start_from: the run folder {run} {what}; give one that `gdmd train` has written")


def begin_from(run: str, states: Mapping[Role, RoleState], world: World) -> str:
    """Student and fake as another run left them, the student averaged where that run has an EMA; returns what to tell.

    Optimisers, counters and the schedule begin anew, and the EMA at these weights. ValueError when the networks differ.
    """
    require_start(run)
    saved = newest(Path(run) / "checkpoints", world)
    assert saved is not None
    averaged = saved.part("ema")
    given: dict[Role, Mapping[str, Tensor]] = {"student": averaged or saved.part("student"), "fake": saved.part("fake")}
    for role, state in states.items():
        own = {name: weights for name, weights in state.parameters.items() if not name.startswith(HEAD)}
        theirs = {name: weights for name, weights in given[role].items() if not name.startswith(HEAD)}
        load_named(own, theirs, f"the {role} of loop.start_from = {run}", world)
        if state.ema is not None:
            _restart(state.ema.shadow, own)
    begun = f"student{' (EMA)' if averaged else ''} and fake begin as in step {saved.step} of {run}"
    return "\n".join([*saved.messages, begun])


@torch.no_grad()
def _restart(shadow: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, average in shadow.items():
        average.copy_(weights[name])
