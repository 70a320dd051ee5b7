"""Overhead of one GDMD outer iteration: its time divided by the time of its bare network calls.

    python benchmarks/step.py [RECIPE] [a.b=c ...] [--repeats 10] [--json]

The iteration runs without optimiser. Hooks record every call of student, fake, teacher, decoder and rewards with its
arguments and whether a gradient was asked for; the same calls are then made alone (forward, and backward where it ran).
The two take turns, so that a busy machine slows both; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdmd.backbones.shapes import DitDenoiser
from gdmd.config.run import RunConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import Lab, build
from gdmd.recipes.read import read_recipe
from gdmd.types import PromptBatch

NETS = ("student", "fake", "teacher", "old")


@dataclass(frozen=True)
class Call:
    """One recorded call: who, on how many samples, with a backward pass or not, and how to make it again."""

    who: str
    samples: int
    backward: bool
    again: Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 0."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cfg = read_recipe(options.recipe, options.overrides)
    measured = measure(build(cfg), cfg, options.repeats)
    print(json.dumps(measured, indent=2) if options.json else describe(measured))
    return 0


def measure(lab: Lab, cfg: RunConfig, repeats: int) -> dict[str, Any]:
    """Times of iterations and of their bare calls on the same batch, interleaved; every iteration has its own step."""
    whole, bare = [], []
    calls: list[Call] = []
    for step in range(repeats + 1):
        prompts = lab.stream.at(step)
        with recorded(lab) as seen:
            run_iteration(lab, cfg, step, prompts)
        calls = seen
        turns: list[tuple[list[float], Callable[[], None]]] = [
            (bare, partial(_replay, tuple(calls))),
            (whole, partial(run_iteration, lab, cfg, step, prompts)),
        ]
        for times, work in turns if step % 2 else turns[::-1]:  # neither always goes first
            times.append(timed(work))
    whole, bare = whole[1:], bare[1:]  # the first round warms up
    return _summary(whole, bare, calls, cfg)


def run_iteration(lab: Lab, cfg: RunConfig, step: int, prompts: PromptBatch) -> None:
    """All updates of one outer iteration with their backward passes, but no optimiser step."""
    rng = SampleRng(cfg.loop.seed, step, prompts.index)
    for update in lab.method.iteration(step, prompts, rng):
        update.loss(update.batch).per_sample.mean().backward()
        for parameter in lab.roles.parameters(update.role).values():
            parameter.grad = None


@contextmanager
def recorded(lab: Lab) -> Iterator[list[Call]]:
    """Inside, every call of a network, the decoder or a reward is appended to the list."""
    calls: list[Call] = []
    nets: Mapping[str, DitDenoiser] = {name: getattr(lab.roles, name) for name in NETS}
    handles = [d.net.register_forward_hook(_net_hook(calls, name, d)) for name, d in nets.items()]
    decode, scores = lab.codec.decode, [reward.score for reward in lab.rewards]
    lab.codec.decode = _wrapped(calls, "decoder", decode)  # type: ignore[method-assign]
    for reward, score in zip(lab.rewards, scores, strict=True):
        reward.score = _wrapped(calls, reward.name, score)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        del lab.codec.decode
        for reward in lab.rewards:
            del reward.score


def _net_hook(calls: list[Call], name: str, denoiser: DitDenoiser) -> Callable[..., None]:
    def hook(net: torch.nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        inputs = tuple(value.detach() for value in given)
        backward = answer.requires_grad

        def again() -> None:
            with torch.set_grad_enabled(backward):
                with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=denoiser.bf16):
                    velocity = net.forward(*inputs)
                if backward:
                    velocity.backward(torch.ones_like(velocity))
                    net.zero_grad(set_to_none=True)

        calls.append(Call(name, len(inputs[0]), backward, again))

    return hook


def _wrapped(calls: list[Call], name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*given: Any) -> Tensor:
        calls.append(Call(name, len(given[0]), False, lambda: _without_gradient(function, given)))
        return function(*given)

    return call


@torch.no_grad()
def _without_gradient(function: Callable[..., Tensor], given: tuple[Any, ...]) -> None:
    function(*given)


def _replay(calls: Sequence[Call]) -> None:
    for call in calls:
        call.again()


def timed(work: Callable[[], None]) -> float:
    """Seconds, with the accelerator's queue emptied before and after."""
    settle = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def passes(calls: Sequence[Call], batch: int) -> float:
    """Network passes of the iteration in units of one forward of one net on the batch; a backward counts two."""
    return sum(call.samples / batch * (3 if call.backward else 1) for call in calls if call.who in NETS)


def expected_passes(cfg: RunConfig) -> float | None:
    """The same from the algorithm: mean roll-out + x0, then fake 3, teacher 2 (1 without guidance), fake 1, student 3."""
    if cfg.method.kind != "gdmd" or cfg.method.student_input != "simulation":
        return None
    teacher = 2 if any(guidance != 1 for guidance in cfg.method.guidances) else 1
    rollout = (len(cfg.method.student_steps) - 1) / 2 + 1
    old = 1 if cfg.method.old_policy == "ema" else 0
    return (rollout + old) / cfg.method.group_size + 3 + teacher + 1 + 3


def _summary(whole: list[float], bare: list[float], calls: Sequence[Call], cfg: RunConfig) -> dict[str, Any]:
    updates = sum(call.who == "student" and call.backward for call in calls)
    counted = Counter((call.who, call.backward) for call in calls)
    samples = Counter(dict.fromkeys(counted, 0))
    for call in calls:
        samples[call.who, call.backward] += call.samples
    ratios = [a / b for a, b in zip(whole, bare, strict=True)]
    return {
        "recipe": cfg.name,
        "batch_size": cfg.loop.batch_size,
        "threads": torch.get_num_threads(),
        "repeats": len(whole),
        "iteration_s": statistics.median(whole),
        "calls_s": statistics.median(bare),
        "ratio": statistics.median(whole) / statistics.median(bare),
        "ratio_of_pairs": statistics.median(ratios),
        "passes_per_student_update": passes(calls, cfg.loop.batch_size) / updates,
        "expected_passes": expected_passes(cfg),
        "student_updates": updates,
        "calls": [
            {"who": who, "backward": backward, "calls": number, "samples": samples[who, backward]}
            for (who, backward), number in sorted(counted.items())
        ],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1024 if sys.platform != "darwin" else 2**20),
    }


def describe(m: Mapping[str, Any]) -> str:
    """The measurement for people."""
    lines = [
        f"recipe {m['recipe']}, batch {m['batch_size']}, {m['threads']} threads, {m['repeats']} repeats",
        f"one outer iteration   {1e3 * m['iteration_s']:9.1f} ms (no optimiser)",
        f"its bare calls        {1e3 * m['calls_s']:9.1f} ms",
        f"ratio                 {m['ratio']:9.3f}    (median of pairs {m['ratio_of_pairs']:.3f})",
        f"passes per student update {m['passes_per_student_update']:.2f} F"
        + (f", by the algorithm {m['expected_passes']:.2f} F on average" if m["expected_passes"] else ""),
        f"peak memory           {m['peak_rss_mib']:9.0f} MiB",
        "last iteration's calls:",
    ]
    for call in m["calls"]:
        kind = "forward + backward" if call["backward"] else "forward"
        lines.append(f"  {call['who']:<20} {kind:<19} {call['calls']:>3} calls  {call['samples']:>6} samples")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="shapes", help="a recipe's name or path (default: shapes)")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 leaves its choice")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
