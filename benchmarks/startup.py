"""Seconds from the command to the first step.

    python benchmarks/startup.py [RECIPE] [key=value ...] [--rounds 3] [--out FILE]

Starts `gdmd train` and looks when the run folder is there (recipe, networks and prompts are loaded), when the first grid
is drawn (the first step begins), and when the first iteration is logged; then the training is ended. Wall-clock, and the
seconds of its processor time, which are all that a busy machine lets one compare. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOOK_S = 0.01
"""Seconds between two looks."""
LONGEST_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", default=["shapes"], metavar="RECIPE key=value")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    own = [*(options.words or ["shapes"]), "loop.threads=1", "loop.log_every=1", "--no-eval"]
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            run = Path(folder) / "run"
            rounds.append(started([sys.executable, "-m", "gdmd", "train", *own, "--run", str(run)], run))
            print(rounds[-1], flush=True)
    middle = {key: [statistics.median(one[key][i] for one in rounds) for i in range(2)] for key in rounds[0]}
    for key, (wall, used) in middle.items():
        print(f"{key:24}{wall:8.1f} s{used:8.1f} s of the processor")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"words": own, "median": middle, "rounds": rounds}, indent=2) + "\n")
    return 0


def started(words: Sequence[str], run: Path) -> dict[str, tuple[float, float]]:
    """Wall-clock and processor seconds when each thing was there; RuntimeError when the program ended before."""
    signs: Mapping[str, Callable[[], bool]] = {
        "loaded": run.is_dir,
        "first step begins": (run / "grids" / "step_000000.png").is_file,
        "first step is logged": lambda: _size(run / "metrics.jsonl") > 0,
    }
    seen: dict[str, tuple[float, float]] = {}
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as program:
        while len(seen) < len(signs):
            wall, used = time.perf_counter() - began, _used(program.pid)
            if program.poll() is not None or wall > LONGEST_S:
                program.kill()
                raise RuntimeError(f"after {wall:.0f} s there was only: {seen}; exit code {program.returncode}")
            seen |= {key: (wall, used) for key, sign in signs.items() if key not in seen and sign()}
            time.sleep(LOOK_S)
        program.kill()
    return seen


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _used(process: int) -> float:
    """Processor seconds of a process that has not been waited for."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    raise SystemExit(main())
