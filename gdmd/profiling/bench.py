"""What ``gdmd profile`` does: time iterations of a recipe beside their bare calls, count passes, FLOP and host syncs.

Every round makes one outer iteration three times on the same prompts: with its optimizers as in training; without them,
its calls recorded by hooks; and the recorded calls alone. Rounds are short, so that a busy machine slows all three.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gdmd.config.describe import student_updates
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.text_cache import CachedText
from gdmd.diffusion.device import deferred_checks
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.pass_counter import BACKWARD, FROZEN_BACKWARD, Counted
from gdmd.models.full_copy import FullCopy
from gdmd.models.lora import ActiveAdapter
from gdmd.models.roles import DiffusersRoles
from gdmd.profiling.recorded_calls import DENOISERS, Call, Watched, recorded, replay
from gdmd.recipes.build import Components, build, compile_networks
from gdmd.recipes.pass_formulas import Trained, drawn_places, every_place, iteration_passes
from gdmd.training.role_state import RoleState, role_states
from gdmd.types import PromptBatch, Role

Clock = Callable[[], float]
GAN_HEAD = "gan_head"
SYNC_WARNING = "called a synchronizing CUDA operation"
"""What torch warns of in its sync debug mode."""


@dataclass
class Times:
    """Seconds of each round."""

    training: list[float] = field(default_factory=list)  # the iteration with its optimizer steps and EMA
    gradients: list[float] = field(default_factory=list)  # without them
    networks: list[float] = field(default_factory=list)  # the bare calls, those for rewards apart
    scoring: list[float] = field(default_factory=list)

    def without_first(self) -> Times:
        """The first round warms up."""
        return Times(*(own[1:] for own in vars(self).values()))


class Bench:
    """The live objects of one recipe, and what its rounds measured.

    clock: seconds; ``time.process_time`` leaves out what other programs take of a shared processor.
    """

    def __init__(self, cfg: RunConfig, components: Components | None = None, clock: Clock = time.perf_counter) -> None:
        began = time.perf_counter()
        if cfg.loop.threads:
            torch.set_num_threads(cfg.loop.threads)
        self.cfg, self.components = cfg, components or build(cfg)
        compile_networks(cfg, self.components)
        if isinstance(self.components.encoder, CachedText):
            self.components.encoder.prepare([text for group in self.components.stream.groups for text in group])
        self.clock = clock
        nets = [one.net for one in watched(self.components.roles) if one.who() != GAN_HEAD]
        self.method = Counted(
            self.components.method, nets, share_of(self.components.roles), backward_of(self.components.roles)
        )
        self.reading, self.trained_f = reading(self.components.roles), trained_f(cfg)
        self.states: dict[Role, RoleState] = role_states(self.components.roles, cfg.loop)
        self.device = next(iter(self.states["student"].parameters.values())).device
        self.times, self.calls = Times(), list[Call]()
        self.counted, self.expected = list[float](), list[float]()
        self.build_s = time.perf_counter() - began

    def round(self, step: int) -> None:
        """Iteration ``step`` three times: trained, its gradients alone, and its bare calls."""
        prompts = self.components.stream.at(step)
        self.trained(step)
        with recorded(self.components.method, watched(self.components.roles)) as self.calls:
            self.times.gradients.append(timed(lambda: self.gradients(step, prompts), self.clock))
        self.times.networks.append(timed(lambda: replay(self.calls, scoring=False), self.clock))
        self.times.scoring.append(timed(lambda: replay(self.calls, scoring=True), self.clock))

    def trained(self, step: int) -> None:
        """Iteration ``step`` as in training, timed; its passes by hooks and by the method's own count."""
        prompts = self.components.stream.at(step)
        rng = self._rng(step, prompts)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.times.training.append(timed(lambda: self.train(step, prompts), self.clock))
        places = drawn_places(self.cfg.method, rng)
        self.expected.append(iteration_passes(self.cfg.method, step, places, self.reading, self.trained_f))
        self.counted.append(self.method.cost.passes / len(prompts) - sum(self.counted))

    def train(self, step: int, prompts: PromptBatch) -> None:
        """One outer iteration as the training loop makes it, without its log."""
        with deferred_checks():
            for update in self.method.iteration(step, prompts, self._rng(step, prompts)):
                self.states[update.role].apply(update)

    def gradients(self, step: int, prompts: PromptBatch) -> None:
        """The same without optimizer, EMA and finite checks: forward and backward passes only."""
        with deferred_checks():
            for update in self.components.method.iteration(step, prompts, self._rng(step, prompts)):
                update.loss(update.batch).per_sample.mean().backward()
                for parameter in self.states[update.role].parameters.values():
                    parameter.grad = None

    def _rng(self, step: int, prompts: PromptBatch) -> SampleRng:
        return SampleRng(self.cfg.loop.seed, step, prompts.index, prompts.host)

    def flop(self, step: int) -> int:
        """Floating-point operations of iteration ``step``, forward and backward, without the optimizer."""
        prompts = self.components.stream.at(step)
        with FlopCounterMode(display=False) as counter:
            self.gradients(step, prompts)
        return int(counter.get_total_flops())

    def syncs(self, step: int) -> dict[str, int] | None:
        """How often each line of the iteration makes the host wait for the GPU; None where there is no GPU."""
        if self.device.type != "cuda":
            return None
        prompts = self.components.stream.at(step)
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return waits(lambda: self.train(step, prompts))
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def peak(self) -> tuple[float, str]:
        """(MiB, of what): the GPU's memory in a training iteration, or the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20, "tensors on the GPU, one iteration"
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "resident memory of the process"

    def summary(self) -> dict[str, Any]:
        """What the rounds after the first one measured."""
        times, cfg = self.times.without_first(), self.cfg
        updates, batch = student_updates(cfg.method), cfg.loop.batch_size
        middle = {name: statistics.median(own) for name, own in vars(times).items()}
        bare = [a + b for a, b in zip(times.networks, times.scoring, strict=True)]
        places = every_place(cfg.method)
        count = lambda step: iteration_passes(cfg.method, step, places, self.reading, self.trained_f)  # noqa: E731
        mean = statistics.mean(count(step) for step in range(len(self.counted)))
        peak, what = self.peak()
        return {
            **{"recipe": cfg.name, "method": cfg.method.kind, "device": _device_name(self.device)},
            **{"threads": torch.get_num_threads(), "batch_size": batch, "iterations": len(bare)},
            "student_updates_per_iteration": updates,
            "passes_per_update": statistics.mean(self.counted) / updates,
            "own_passes_per_update": statistics.mean(self.expected) / updates,
            "mean_passes_per_update": mean / updates,
            "passes_agree": all(abs(a - b) < 1e-6 for a, b in zip(self.counted, self.expected, strict=True)),
            "iteration_s": middle["training"],
            "without_optimizer_s": middle["gradients"],
            "bare_calls_s": statistics.median(bare),
            "overhead": statistics.median(a / b for a, b in zip(times.gradients, bare, strict=True)),
            "images_per_s": batch / middle["training"],
            "student_updates_per_s": updates / middle["training"],
            "scoring_share": statistics.median(a / b for a, b in zip(times.scoring, times.training, strict=True)),
            **{"peak_memory_mib": peak, "peak_memory_of": what},
            "build_and_first_iteration_s": self.build_s + self.times.training[0],
            "calls": table(self.calls),
        }


def measure(bench: Bench, iterations: int) -> dict[str, Any]:
    """One round to warm up, then ``iterations`` of them; then FLOP and host syncs."""
    for step in range(iterations + 1):
        bench.round(step)
    measured = bench.summary()
    flop, places = bench.flop(iterations), bench.syncs(iterations)
    updates = measured["student_updates_per_iteration"]
    measured |= {"flop_per_update": flop / updates, "flop_per_s": flop / measured["iteration_s"]}
    syncs = None if places is None else sum(places.values())
    return measured | {"host_syncs_per_iteration": syncs, "host_syncs_at": places}


def watched(roles: Any) -> list[Watched]:
    """The networks behind the roles: one each, or a trunk that says which adapter it wears."""
    heads = [] if roles.critic is None else [Watched(roles.critic.head, _always(GAN_HEAD))]
    if isinstance(roles, DiffusersRoles):
        nets = [(name, getattr(roles, name).net) for name in DENOISERS]
        copies = [
            Watched(net.net, _always(name), around=_around(roles, net.net))
            for name, net in nets
            if isinstance(net, FullCopy)
        ]
        return [_trunk(roles), *copies, *heads]
    return [Watched(getattr(roles, name).net, _always(name)) for name in DENOISERS] + heads


def _always(name: str) -> Callable[[], str]:
    return lambda: name


def _around(roles: DiffusersRoles, net: Any) -> Callable[[], Callable[[], AbstractContextManager[None]]]:
    """A call that only reads features is made again as one."""
    return lambda: (lambda: roles.family.feature_mode(net)) if roles.fake.in_feature_mode else nullcontext


def reading(roles: Any) -> float:
    """F of a call for features."""
    return roles.family.feature_cost if isinstance(roles, DiffusersRoles) else 1.0


def share_of(roles: Any) -> Callable[[], float]:
    """F of the call that is being made."""
    return lambda: reading(roles) if isinstance(roles, DiffusersRoles) and roles.fake.in_feature_mode else 1.0


def backward_of(roles: Any) -> Callable[[Any], float]:
    """F of a backward pass through a network, as the hooks see it: the trunk is frozen."""
    trunk = roles.backbone.net if isinstance(roles, DiffusersRoles) else None
    return lambda net: FROZEN_BACKWARD if net is trunk else BACKWARD


def trained_f(cfg: RunConfig) -> Trained:
    """F of a trained call of each role, as the recipe says: adapters on one trunk, or all weights."""
    full = cfg.model.full if isinstance(cfg.model, DiffusersModel) else "both"
    adapted = {role: 1 + FROZEN_BACKWARD for role in ("student", "fake") if full not in (role, "both")}
    return Trained(**adapted)


def _trunk(roles: DiffusersRoles) -> Watched:
    """The one network of several roles: the adapter that it wears says whose call it is."""
    backbone = roles.backbone
    seen: dict[str, ActiveAdapter] = {}

    def who() -> str:
        name = backbone.active.name or "teacher"
        seen[name] = backbone.active
        return name

    return Watched(backbone.net, who, lambda name: backbone.set_adapter(seen[name]), _around(roles, backbone.net))


def timed(work: Callable[[], None], clock: Clock = time.perf_counter) -> float:
    """Seconds, with the accelerator's queue emptied before and after."""
    settle = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    settle()
    start = clock()
    work()
    settle()
    return clock() - start


def waits(work: Callable[[], None]) -> dict[str, int]:
    """torch's warnings of waiting for the GPU, counted by the line that waits."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()
    own = [warning for warning in seen if SYNC_WARNING in str(warning.message)]
    return dict(Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in own))


def table(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Number of calls and samples by caller and kind."""
    counted = Counter((call.who, call.backward) for call in calls)
    samples = Counter(dict.fromkeys(counted, 0))
    for call in calls:
        samples[call.who, call.backward] += call.samples
    return [
        {"who": who, "backward": backward, "calls": number, "samples": samples[who, backward]}
        for (who, backward), number in sorted(counted.items())
    ]


def describe(m: Mapping[str, Any]) -> str:
    """The measurement for people."""
    syncs = m["host_syncs_per_iteration"]
    waiting = "not measured: no GPU" if syncs is None else f"{syncs}"
    agree = "agrees with" if m["passes_agree"] else "DIFFERS from"
    counted = (
        f"{agree} the method's own {m['own_passes_per_update']:.2f} F ({m['mean_passes_per_update']:.2f} F on average)"
    )
    lines = [
        f"recipe {m['recipe']} ({m['method']}), batch {m['batch_size']}, {m['device']}, {m['threads']} thread(s), "
        f"{m['iterations']} iterations of {m['student_updates_per_iteration']} student update(s)",
        f"passes per update     {m['passes_per_update']:9.2f} F    {counted}",
        f"FLOP per update       {m['flop_per_update'] / 1e9:9.2f} G    {m['flop_per_s'] / 1e9:.2f} G a second",
        f"iteration             {1e3 * m['iteration_s']:9.1f} ms   with its optimizer steps",
        f"  without optimizer   {1e3 * m['without_optimizer_s']:9.1f} ms",
        f"  its bare calls      {1e3 * m['bare_calls_s']:9.1f} ms",
        f"overhead              {m['overhead']:9.3f}      without optimizer / bare calls, median of the rounds",
        f"images per second     {m['images_per_s']:9.1f}",
        f"student updates / s   {m['student_updates_per_s']:9.2f}",
        f"scoring               {100 * m['scoring_share']:9.1f} %    of the iteration",
        f"peak memory           {m['peak_memory_mib']:9.0f} MiB  {m['peak_memory_of']}",
        f"build + 1st iteration {m['build_and_first_iteration_s']:9.1f} s",
        f"host syncs            {waiting:>9}      per iteration",
        *(f"  {number:>3} at {place}" for place, number in (m["host_syncs_at"] or {}).items()),
        "last iteration's calls:",
    ]
    for call in m["calls"]:
        kind = "forward + backward" if call["backward"] else "forward"
        lines.append(f"  {call['who']:<20} {kind:<19} {call['calls']:>3} calls  {call['samples']:>6} samples")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
