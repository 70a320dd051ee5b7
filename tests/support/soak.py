"""Kill a tiny run at random moments, resume it, and compare the result with the uninterrupted run: ``make soak``.

    python tests/support/soak.py [--kills 200] [--steps 60] [--flat-steps 3000] [--seed N] [--json FILE] [--background]

Each attempt is a child forked from a process that has loaded all modules and has one thread, so it starts at once. It
gets SIGKILL after a random time: during steps, saves, log lines, or while the run is created or resumed. A finished run
is compared bit for bit, and the next one starts. Then one long run shows that memory, file handles and log lines do not
grow. fsync is off: SIGKILL does not lose what the kernel has. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from toy_training import Toy, toy_config, untimed_metrics

from gdmd.config.training import LoopConfig
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import read_metrics

LONGEST_S = 300
"""An attempt that neither ends nor is killed by then hangs."""
THREAD_ENDS_S = 10.0
"""A thread that still exists by then was never joined."""
KNOWN = {"config.yaml", "run.json", "metrics.jsonl", "tb", "grids", "checkpoints"}


@dataclass
class Kills:
    """The findings; fields after ``seconds`` must be empty, or at most the checkpoint interval."""

    kills: int = 0
    runs: int = 0
    kills_before_first_checkpoint: int = 0
    log_growth_per_attempt: float = 0.0  # bytes of the TensorBoard folder, beyond those of the uninterrupted run
    handles: tuple[int, int] = (0, 0)  # of the process that forks, at its start and end
    rss_mib: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    different: list[str] = field(default_factory=list)
    died_by_themselves: list[int] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    most_steps_lost: int = 0

    def ok(self, interval: int) -> bool:
        """Whether nothing differs, died, was left behind or was lost beyond the interval."""
        return not (self.different or self.died_by_themselves or self.leftovers or self.most_steps_lost > interval)


def soak(folder: Path, kills: int, cfg: LoopConfig, seed: int) -> Kills:
    """Kill runs of ``cfg`` until there were ``kills`` kills; every finished run is compared with a whole one."""
    warm_up(folder / "warm")
    began, draws, seen = time.monotonic(), random.Random(seed), Kills()
    whole = folder / "whole"
    assert attempt(lambda: Toy(whole, cfg).train()) == 0, "the run fails without any kill"
    longest = (time.monotonic() - began) / 3  # so that some attempts get past the next checkpoint
    seen.handles, seen.rss_mib = (handles(), 0), (rss_mib(), 0.0)
    while seen.kills < kills:
        run = folder / f"run_{seen.runs:04d}"
        killed = seen.kills
        while seen.kills < kills:
            end = attempt(lambda run=run: Toy(run, cfg).train(), draws.uniform(0, longest))
            if end == 0:
                break
            _look(seen, run, end)
        if seen.kills == kills:  # the last run is not killed
            end = attempt(lambda run=run: Toy(run, cfg).train())
            seen.died_by_themselves += [end] if end else []
        seen.runs += 1
        seen.different += [f"{run.name}: {name}" for name in differences(whole, run)]
        seen.leftovers += leftovers(run)
        attempts = seen.kills - killed + 1
        seen.log_growth_per_attempt = max(
            seen.log_growth_per_attempt, (size(run / "tb") - size(whole / "tb")) / attempts
        )
    seen.handles, seen.rss_mib = (seen.handles[0], handles()), (seen.rss_mib[0], rss_mib())
    seen.seconds = time.monotonic() - began
    return seen


def warm_up(folder: Path) -> None:
    """Import what a run imports late, by a run of two steps and its resuming; forking needs a single thread."""
    for steps in (1, 2):
        Toy(folder, toy_config(steps, lr_schedule="constant")).train()
    until = time.monotonic() + THREAD_ENDS_S
    while len(threads := os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
        time.sleep(0.01)  # a joined thread leaves /proc a moment later
    assert len(threads) == 1, f"{len(threads)} threads: a forked child would inherit their locks"


def attempt(work: Callable[[], Any], limit: float | None = None, longest: float = LONGEST_S) -> int:
    """Do ``work`` in a forked child, killed after ``limit`` seconds; returns its exit code, or minus the signal.

    Without a limit the child is expected to end; AssertionError when it hangs for ``longest`` seconds.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.fsync = lambda handle: None
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    handle = os.pidfd_open(child)
    try:
        ended = select.select([handle], [], [], longest if limit is None else limit)[0]
        if not ended:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)
    assert ended or limit is not None, f"an attempt did not end within {longest} s"
    return code


def _look(seen: Kills, run: Path, end: int) -> None:
    """Count a kill, and the steps that the next attempt repeats."""
    if end != -signal.SIGKILL:
        seen.died_by_themselves.append(end)
    seen.kills += 1
    saved = max(checkpoint.steps(run / "checkpoints"), default=0)
    rows = read_metrics(run)
    reached = int(rows[-1]["step"]) if rows else 0
    seen.kills_before_first_checkpoint += saved == 0
    seen.most_steps_lost = max(seen.most_steps_lost, reached - saved)


def differences(whole: Path, other: Path) -> list[str]:
    """Tensors of the last checkpoint that are not equal bit for bit, its counters, and rows of metrics."""
    a, b = (checkpoint.load_newest(run / "checkpoints") for run in (whole, other))
    if a is None or b is None:
        return ["a run has no checkpoint"]
    first, second = _named(a), _named(b)
    found = sorted(first.keys() ^ second.keys())
    found += [name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])]
    found += ["counters"] if (a.step, a.state) != (b.step, b.state) else []
    return found + (["metrics.jsonl"] if untimed_metrics(whole) != untimed_metrics(other) else [])


def _named(saved: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": value for part, named in saved.tensors.items() for name, value in named.items()}


def leftovers(run: Path) -> list[str]:
    """Files that a finished run should not have: parts of a save, damaged checkpoints."""
    strange = [path.name for path in run.iterdir() if path.name not in KNOWN]
    return strange + [path.name for path in (run / "checkpoints").iterdir() if not path.name[5:].isdigit()]


@dataclass
class Flat:
    """One long run: open handles, resident memory and bytes per log line, after a fifth of it and at its end."""

    steps: int = 0
    handles: list[int] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    bytes_per_row: list[float] = field(default_factory=list)

    def ok(self) -> bool:
        """Whether the number of handles did not grow, memory grew by less than 8 MiB, and log lines by less than 5 %."""
        grown = self.rss_mib[1] - self.rss_mib[0]
        rows = self.bytes_per_row[1] / self.bytes_per_row[0]
        return self.handles[1] <= self.handles[0] and grown < 8 and abs(rows - 1) < 0.05


def flat(folder: Path, steps: int, background: bool) -> Flat:
    """Train ``steps`` steps in one attempt and measure it twice."""
    run, report = folder / "long", folder / "flat.json"
    seen = Flat(steps)

    def look(step: int) -> None:
        if step not in (steps // 5, steps - 1):
            return
        seen.handles.append(handles())
        seen.rss_mib.append(rss_mib())
        seen.bytes_per_row.append((run / "metrics.jsonl").stat().st_size / step)
        report.write_text(json.dumps(asdict(seen)))

    cfg = toy_config(steps, checkpoint_every=25, checkpoint_async=background)
    assert attempt(lambda: Toy(run, cfg, look).train(), longest=LONGEST_S + steps) == 0, "the long run failed"
    return Flat(**json.loads(report.read_text()))


def handles() -> int:
    """Open file handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Run both parts, print and write their findings; exit code 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flat-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time, printed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--background", action="store_true", help="save in a thread; a kill may cost two intervals")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    torch.set_num_threads(1)  # no thread pool before a fork
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        cfg = toy_config(options.steps, checkpoint_async=options.background)
        killed = soak(Path(folder), options.kills, cfg, seed)
        print(json.dumps(asdict(killed), indent=2), flush=True)
        long = flat(Path(folder), options.flat_steps, options.background)
        print(json.dumps(asdict(long), indent=2))
    ok = killed.ok(cfg.checkpoint_every * (2 if options.background else 1)) and long.ok()
    if options.json:
        options.json.write_text(json.dumps({"seed": seed, "kills": asdict(killed), "flat": asdict(long), "ok": ok}))
    print(
        "soak: every killed run equals the uninterrupted one; handles, memory and logs are flat"
        if ok
        else "soak: FAILED"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
