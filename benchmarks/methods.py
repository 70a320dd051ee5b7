"""What one student update of each method costs on the same lab networks, counted and timed in one run.

    python benchmarks/methods.py [--batch 64] [--rounds 5] [--clock cpu] [--only gdmd,dmd] [--out FILE]

Every round makes one outer iteration of every method in turn, with its optimizer steps, so that a busy machine slows all
of them; a method's speed is its ratio to GDMD in the same round. ``--clock cpu`` (one thread) counts the seconds of this
process alone. Passes are in F, one denoiser forward on the batch; a backward counts two.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdmd.config.describe import student_updates
from gdmd.profiling.bench import Bench, mean_passes
from gdmd.recipes.read import read_recipe

REFERENCE = "gdmd"


@dataclass(frozen=True)
class Entry:
    """A row: its title, the recipe it comes from and what is changed in it."""

    title: str
    recipe: str
    overrides: tuple[str, ...] = ()


ENTRIES: Mapping[str, Entry] = {
    "gdmd": Entry("GDMD (4 : 4)", "gdmd_paper"),
    "gdmd_no_reward": Entry("GDMD, gamma 0: DMD at 4 : 4", "gdmd_paper", ("method.gamma=0",)),
    "dmd": Entry("DMD (5 : 1)", "dmd"),
    "dmd2": Entry("DMD2 (5 : 1), GAN off", "dmd2", ("method.gan_weight=0",)),
    "dmd2_gan": Entry("DMD2 (5 : 1), GAN on", "dmd2"),
    "dmdr_tilted": Entry("DMDR (5 : 1), stage 1, tilted", "dmdr"),
    "dmdr_refl": Entry("DMDR (5 : 1), stage 2, ReFL", "dmdr", ("method.cold_start=0", "method.anneal=0")),
    "dmd_nft": Entry("DMD + NFT (5 : 1)", "dmd_nft"),
    "dmd_grpo": Entry("DMD + GRPO (5 : 1)", "dmd_grpo"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; exit code 0."""
    options = _options(arguments)
    wanted = {REFERENCE, *options.only.split(",")} if options.only else set(ENTRIES)
    chosen = {name: entry for name, entry in ENTRIES.items() if name in wanted}
    loop = (f"loop.batch_size={options.batch}", "loop.threads=1")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    benches = {
        name: Bench(read_recipe(entry.recipe, [*entry.overrides, *loop]), clock=clock) for name, entry in chosen.items()
    }
    for step in range(options.rounds + 1):  # the first round warms up
        for bench in benches.values():
            bench.trained(step)
    rows = [row(name, chosen[name], bench, benches[REFERENCE]) for name, bench in benches.items()]
    facts = {"batch": options.batch, "rounds": options.rounds, "clock": options.clock, "threads": 1}
    machine = {"torch": torch.__version__, "device": str(benches[REFERENCE].device), "machine": platform.machine()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**facts, **machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


def row(name: str, entry: Entry, bench: Bench, reference: Bench) -> dict[str, Any]:
    """Passes, FLOP and relative speed of one method; the first round is left out of the times."""
    method = bench.cfg.method
    updates, base = student_updates(method), student_updates(reference.cfg.method)
    times, others = bench.times.training[1:], reference.times.training[1:]
    speeds = [(updates / own) / (base / other) for own, other in zip(times, others, strict=True)]
    last = len(times)
    return {
        **{"name": name, "title": entry.title, "recipe": entry.recipe, "overrides": list(entry.overrides)},
        "student_updates": updates,
        "passes_per_update": statistics.mean(bench.counted) / updates,
        "mean_passes_per_update": mean_passes(bench.cfg, last) / updates,
        "passes_agree": all(abs(a - b) < 1e-6 for a, b in zip(bench.counted, bench.expected, strict=True)),
        "flop_per_update": bench.flop(last) / updates,
        "seconds_per_update": statistics.median(times) / updates,
        "updates_per_second_relative": statistics.median(speeds),
        "lowest_and_highest": [min(speeds), max(speeds)],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| method (fake : student updates) | passes per student update, counted | by the method, on average "
        "| GFLOP per student update | student updates per second, GDMD = 1 (lowest to highest round) |",
        "|---|---|---|---|---|",
    ]
    for own in rows:
        low, high = own["lowest_and_highest"]
        agree = "" if own["passes_agree"] else " (DIFFERS from the method's own count)"
        lines.append(
            f"| {own['title']} | {own['passes_per_update']:.2f} F{agree} | {own['mean_passes_per_update']:.2f} F "
            f"| {own['flop_per_update'] / 1e9:.1f} | {own['updates_per_second_relative']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", default="", help=f"names, separated by commas: {', '.join(ENTRIES)}")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
