"""How long a checkpoint holds the training up, written in the loop and beside it (loop.checkpoint_async).

    python benchmarks/checkpoints.py [--rounds 5] [--mib 512] [--folder DIR] [--out FILE]

Two states: everything of the recipe `shapes` (weights, EMA, old policy, moments), and tensors of ``--mib`` MiB. Every round
saves each state both ways, and meanwhile makes forward and backward passes of the student, whose speed it compares
with passes made while nobody writes. Only ratios of one run are to be trusted; the folder is on the disk that is asked.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import Components, build
from gdmd.recipes.read import read_recipe
from gdmd.training.distributed import SINGLE_PROCESS
from gdmd.training.role_state import role_states
from gdmd.training.saver import Saver

State = Mapping[str, Mapping[str, Tensor]]
MIB = 2**20
TENSORS = 64
"""Of the large state."""
ALONE_S = 1.0
"""Seconds for which the speed without a writer is measured in every round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; exit code 0."""
    options = _options(arguments)
    torch.set_num_threads(1)
    cfg = read_recipe("shapes", [f"loop.batch_size={options.batch}", "loop.threads=1"])
    components = build(cfg, "cpu")
    states = {"shapes": shapes_state(cfg, components), f"{options.mib} MiB": large_state(options.mib)}
    work = student_pass(components)
    work()
    rows = {name: measure(state, work, options.rounds, options.folder) for name, state in states.items()}
    facts = {"rounds": options.rounds, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(rows))
    return 0


def shapes_state(cfg: RunConfig, components: Components) -> State:
    """All parts of a checkpoint of this recipe after its first iteration."""
    states = role_states(components.roles, cfg.loop)
    prompts = components.stream.at(0)
    for update in components.method.iteration(0, prompts, SampleRng(0, 0, prompts.index)):
        states[update.role].apply(update)
    parts: dict[str, Mapping[str, Tensor]] = {"old": components.roles.old_state(), "method": components.method.state()}
    for state in states.values():
        parts |= state.tensors()
    return parts


def large_state(mib: int) -> State:
    """Random fp32 tensors of this size in all, four parts of them."""
    parts, numbers = ("student", "ema", "optim_student", "fake"), mib * MIB // 4 // TENSORS
    each = TENSORS // len(parts)
    return {part: {str(place): torch.rand(numbers) for place in range(each)} for part in parts}


def student_pass(components: Components) -> Callable[[], None]:
    """A forward and a backward pass of the student on four samples."""
    x_t, t = torch.randn(4, *components.latent_shape), torch.full((4,), 0.5)
    text = components.encoder.null(4)

    def work() -> None:
        torch.autograd.backward(components.roles.student(x_t, t, text).x0.square().mean())

    return work


def measure(state: State, work: Callable[[], None], rounds: int, folder: Path | None) -> dict[str, Any]:
    """Medians over rounds. held_s: how long save() keeps the caller; written_s: until the checkpoint is complete."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoints-") as place:
        savers = {on: Saver(Path(place) / str(on), config(on), SINGLE_PROCESS) for on in (False, True)}
        for step in range(1, rounds + 2):
            seen = {key: value for on, own in savers.items() for key, value in one(own, step, state, work, on).items()}
            if step > 1:  # the first one makes the folders and fills the caches
                found = {key: [*found.get(key, []), value] for key, value in seen.items()}
    medians = {key: statistics.median(values) for key, values in found.items()}
    size = sum(tensor.nbytes for named in state.values() for tensor in named.values())
    return {
        "mib": size / MIB,
        **medians,
        "held_ratio": _median_ratio(found["async_held_s"], found["sync_held_s"]),
        "speed_while_writing": _median_ratio(found["async_passes_per_s"], found["alone_passes_per_s"]),
        "lost_ratio": _median_ratio(found["async_lost_s"], found["sync_held_s"]),
        "held_lowest_and_highest": {
            key: [min(found[key]), max(found[key])] for key in ("sync_held_s", "async_held_s", "async_lost_s")
        },
    }


def config(beside: bool) -> LoopConfig:
    """One checkpoint is kept."""
    return LoopConfig(checkpoint_async=beside, keep_checkpoints=1)


def one(own: Saver, step: int, state: State, work: Callable[[], None], beside: bool) -> dict[str, float]:
    """Save once. async_lost_s: seconds held, and those by which the passes made meanwhile came later."""
    began = time.perf_counter()
    own.save(step, state, {})
    held = time.perf_counter() - began
    if not beside:
        return {"sync_held_s": held}
    passes = 0
    while own.writing:
        work()
        passes += 1
    written = time.perf_counter() - began
    own.wait()
    alone = _speed(work)
    slower = max(written - held, 1e-9)
    return {
        "async_held_s": held,
        "async_written_s": written,
        "async_passes_per_s": passes / slower,
        "alone_passes_per_s": alone,
        "async_lost_s": held + slower - passes / alone,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """For people."""
    lines = [
        f"{'state':12}{'MiB':>8}{'held, in the loop':>20}{'beside':>10}{'ratio':>8}{'speed meanwhile':>17}{'lost':>8}"
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:12}{row['mib']:8.1f}{row['sync_held_s'] * 1e3:17,.0f} ms{row['async_held_s'] * 1e3:7,.0f} ms"
            f"{row['held_ratio']:8.3f}{row['speed_while_writing']:17.2f}{row['lost_ratio']:8.2f}"
        )
    return "\n".join([*lines, "lost: time held and lost to slower passes, as a part of the time held in the loop"])


def _speed(work: Callable[[], None]) -> float:
    began, passes = time.perf_counter(), 0
    while time.perf_counter() - began < ALONE_S:
        work()
        passes += 1
    return passes / (time.perf_counter() - began)


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="of the one iteration that makes the state of shapes")
    parser.add_argument(
        "--folder", type=Path, help="where to write, on the disk in question; default: the temporary one"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
