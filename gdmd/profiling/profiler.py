"""What ``gdmd profile`` measures: iterations of a recipe, their network calls, FLOP, memory and host syncs.

Every round trains one outer iteration twice: once as in training, for the speed; once with a timer around every network
call, backward pass, scorer call and optimizer step, for the breakdown. On a GPU each timed section waits for the device, so
the breakdown says where the time goes, and the plain iteration how long it takes.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gdmd.config.describe import student_updates
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.text_cache import CachedText
from gdmd.diffusion.device import deferred_checks
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.pass_counter import BACKWARD, FROZEN_BACKWARD, output_samples
from gdmd.models.full_copy import FullCopy
from gdmd.models.roles import DiffusersRoles
from gdmd.recipes.build import Components, build, compile_networks
from gdmd.recipes.call_counts import MODEL_ROLES, count_calls, forward_passes
from gdmd.training.role_state import RoleState, role_states
from gdmd.types import PromptBatch, Role, Update

GAN_HEAD = "gan_head"
BARE_CALLS = ("network calls", "backward passes", "decoder and rewards")
SECTIONS = (*BARE_CALLS, "method", "optimizer")
SYNC_WARNING = "called a synchronizing CUDA operation"
"""The warning of torch's sync debug mode."""


@dataclass(frozen=True)
class NetworkCall:
    """One call of a role's network on ``samples`` samples; ``passes``: its cost in forward passes of one sample."""

    who: str
    backward: bool
    samples: int
    passes: float


class SectionTimer:
    """Seconds by section. A section that starts inside another one stops the outer clock until it ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Inside, time counts for this section."""
        self.start(name)
        yield
        self.stop()

    def start(self, name: str) -> None:
        self._account()
        self._open.append(name)

    def stop(self) -> None:
        self._account()
        self._open.pop()

    def _account(self) -> None:
        now = _now(self.device)
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Profiler:
    """The live objects of one recipe, and what its rounds measured."""

    def __init__(self, cfg: RunConfig, components: Components | None = None, device: str | None = None) -> None:
        began, cfg = time.perf_counter(), cfg.at_largest_size
        if cfg.loop.threads:
            torch.set_num_threads(cfg.loop.threads)
        self.cfg, self.components = cfg, components or build(cfg, device)
        compile_networks(cfg, self.components)
        if isinstance(self.components.encoder, CachedText):
            stream = self.components.stream
            prompts = [text for group in stream.groups for text in group]
            self.components.encoder.prepare([*prompts, *stream.teacher_prompts])
        self.states: dict[Role, RoleState] = role_states(self.components.roles, cfg.loop)
        self.device = next(iter(self.states["student"].parameters.values())).device
        self.iteration_s: list[float] = []
        self.sections: list[dict[str, float]] = []  # seconds by section, per round
        self.calls: list[list[NetworkCall]] = []  # per round
        self.build_s = time.perf_counter() - began

    def round(self, step: int) -> None:
        """Train iteration ``step`` twice: timed as a whole, and with a timer around its parts."""
        prompts = self.components.stream.at(step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = _now(self.device)
        self.train(step, prompts)
        self.iteration_s.append(_now(self.device) - began)
        timer, calls = SectionTimer(self.device), list[NetworkCall]()
        with timed_calls(self.components, timer, calls), timer.section("method"):
            self.train(step, prompts, timer)
        self.sections.append(timer.seconds)
        self.calls.append(calls)

    def train(self, step: int, prompts: PromptBatch, timer: SectionTimer | None = None) -> None:
        """One outer iteration as the training loop runs it, without its log."""
        rng = SampleRng(self.cfg.loop.seed, step, prompts.index, prompts.host)
        with deferred_checks():
            for update in self.components.method.iteration(step, prompts, rng):
                if timer is None:
                    self.states[update.role].apply(update)
                    continue
                with timer.section("optimizer"):  # what is left of ``apply`` without the loss and its backward pass
                    self.states[update.role].apply(_timed_loss(update, timer))

    def flop(self, step: int) -> int:
        """Floating-point operations of iteration ``step``, forward and backward (torch counts no optimizer)."""
        with FlopCounterMode(display=False) as counter:
            self.train(step, self.components.stream.at(step))
        return int(counter.get_total_flops())

    def syncs(self, step: int) -> dict[str, int] | None:
        """How often each line of the iteration makes the host wait for the GPU; None without a GPU."""
        if self.device.type != "cuda":
            return None
        prompts = self.components.stream.at(step)
        torch.cuda.synchronize(self.device)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return sync_warnings(lambda: self.train(step, prompts))
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def peak(self) -> tuple[float, str]:
        """(MiB, of what): the GPU's memory in an iteration, or the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20, "tensors on the GPU, one iteration"
        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "resident memory of the process"

    def summary(self) -> dict[str, Any]:
        """The measurements of all rounds except the first, which warms up."""
        cfg, rounds = self.cfg, self.sections[1:]
        updates, batch = student_updates(cfg.method), cfg.loop.batch_size
        iteration = statistics.median(self.iteration_s[1:])
        bare = [sum(seconds[name] for name in BARE_CALLS) for seconds in rounds]
        passes = [sum(call.passes for call in calls) / batch / updates for calls in self.calls[1:]]
        full = cfg.model.full if isinstance(cfg.model, DiffusersModel) else "both"
        peak, what = self.peak()
        return {
            **{"recipe": cfg.name, "method": cfg.method.kind, "device": _device_name(self.device)},
            **{"threads": torch.get_num_threads(), "batch_size": batch, "iterations": len(rounds)},
            "student_updates_per_iteration": updates,
            "passes_per_update": statistics.mean(passes),
            "expected_passes_per_update": forward_passes(count_calls(cfg), full, _feature_cost(self.components.roles)),
            "iteration_s": iteration,
            "section_s": {name: statistics.median(seconds[name] for seconds in rounds) for name in SECTIONS},
            "overhead": statistics.median((a + b["method"]) / a for a, b in zip(bare, rounds, strict=True)),
            "images_per_s": batch / iteration,
            "student_updates_per_s": updates / iteration,
            "scoring_share": statistics.median(s["decoder and rewards"] / sum(s.values()) for s in rounds),
            **{"peak_memory_mib": peak, "peak_memory_of": what},
            "build_and_first_iteration_s": self.build_s + self.iteration_s[0],
            "calls": call_table(self.calls[-1]),
        }


def measure(profiler: Profiler, iterations: int) -> dict[str, Any]:
    """One round to warm up, then ``iterations`` of them; then FLOP and host syncs."""
    for step in range(iterations + 1):
        profiler.round(step)
    measured = profiler.summary()
    flop, lines = profiler.flop(iterations), profiler.syncs(iterations)
    updates = measured["student_updates_per_iteration"]
    measured |= {"flop_per_update": flop / updates, "flop_per_s": flop / measured["iteration_s"]}
    syncs = None if lines is None else sum(lines.values())
    return measured | {"host_syncs_per_iteration": syncs, "host_syncs_at": lines}


@contextmanager
def timed_calls(components: Components, timer: SectionTimer, calls: list[NetworkCall]) -> Iterator[None]:
    """Inside, network calls, backward passes and scorer calls are timed, and network calls appended to ``calls``."""
    roles, method = components.roles, components.method
    if components.rewards and not hasattr(method, "scorer"):
        raise AttributeError(f"{type(method).__name__} has rewards but no attribute 'scorer', so they cannot be timed")
    backward = torch.autograd.backward

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with timer.section("backward passes"):
            backward(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "backward", timed_backward))
        known = role_networks(roles)

        def watch(net: nn.Module, who: Callable[[], str] = lambda: "teacher") -> None:
            before = net.register_forward_pre_hook(lambda net, inputs: timer.start("network calls"))
            after = net.register_forward_hook(_recording_hook(roles, who, timer, calls))
            stack.callback(before.remove)
            stack.callback(after.remove)

        for net, who in known:
            watch(net, who)
        if isinstance(roles, DiffusersRoles):  # later ones: the mixtures of teacher and fake score
            ids = {id(net) for net, _ in known}
            roles.watch(lambda net: None if id(net) in ids else watch(net))
            stack.callback(roles.watch, lambda net: None)
        for name in ("scorer", "real_latents"):
            if getattr(method, name, None) is not None:
                timed = _Timed(getattr(method, name), timer, "decoder and rewards")
                stack.enter_context(mock.patch.object(method, name, timed))
        yield


def role_networks(roles: Any) -> list[tuple[nn.Module, Callable[[], str]]]:
    """The networks behind the roles, each with a function that names the role of the current call."""
    heads = [] if roles.critic is None else [(roles.critic.head, lambda: GAN_HEAD)]
    nets = [(getattr(roles, name).net, name) for name in MODEL_ROLES]
    if not isinstance(roles, DiffusersRoles):
        return [(net, lambda name=name: name) for net, name in nets] + heads
    copies = [(net.net, lambda name=name: name) for net, name in nets if isinstance(net, FullCopy)]
    backbones = [(net, lambda net=net: roles.role_of_call(net)) for net in roles.backbone_nets()]
    return [*backbones, *copies, *heads]


def _recording_hook(
    roles: Any, who: Callable[[], str], timer: SectionTimer, calls: list[NetworkCall]
) -> Callable[[nn.Module, Any, Any], None]:
    frozen = roles.backbone_nets() if isinstance(roles, DiffusersRoles) else ()

    def hook(net: nn.Module, inputs: Any, output: Any) -> None:
        timer.stop()
        tensors, samples = output_samples(output)
        with_grad, name = tensors[0].requires_grad, who()
        features = isinstance(roles, DiffusersRoles) and roles.fake.in_feature_mode and name != GAN_HEAD
        cost = (1 + (FROZEN_BACKWARD if net in frozen else BACKWARD) * with_grad) * (name != GAN_HEAD)
        cost *= _feature_cost(roles) if features else 1.0
        calls.append(NetworkCall(f"{name}, features" if features else name, with_grad, samples, samples * cost))

    return hook


def _feature_cost(roles: Any) -> float:
    return roles.family.feature_cost if isinstance(roles, DiffusersRoles) else 1.0


class _Timed:
    """An object whose calls and methods are timed as one section."""

    def __init__(self, target: Any, timer: SectionTimer, name: str) -> None:
        self._target, self._timer, self._name = target, timer, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._timer.section(self._name):
            return self._target(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._target, attribute)
        return _Timed(value, self._timer, self._name) if callable(value) else value


def _timed_loss(update: Update, timer: SectionTimer) -> Update:
    """The update with the arithmetic of its loss counted for the method."""

    def loss(batch: Any) -> Any:
        with timer.section("method"):
            return update.loss(batch)

    return dataclasses.replace(update, loss=loss)


def _now(device: torch.device) -> float:
    """Seconds, after the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sync_warnings(work: Callable[[], None]) -> dict[str, int]:
    """torch's warnings of host syncs, counted by the line that waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    syncs = [warning for warning in caught if SYNC_WARNING in str(warning.message)]
    return dict(Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in syncs))


def call_table(calls: list[NetworkCall]) -> list[dict[str, Any]]:
    """Number of calls and samples by role and kind."""
    samples: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for call in calls:
        samples[call.who, call.backward].append(call.samples)
    return [
        {"who": who, "backward": backward, "calls": len(each), "samples": sum(each)}
        for (who, backward), each in sorted(samples.items())
    ]


def describe(m: Mapping[str, Any]) -> str:
    """The measurement as text for the terminal."""
    syncs = m["host_syncs_per_iteration"]
    lines = [
        f"recipe {m['recipe']} ({m['method']}), batch {m['batch_size']}, {m['device']}, {m['threads']} thread(s), "
        f"{m['iterations']} iterations of {m['student_updates_per_iteration']} student update(s)",
        f"passes per update     {m['passes_per_update']:9.2f} F    measured; {m['expected_passes_per_update']:.2f} F on "
        "average over the run (F: one forward pass on the batch)",
        f"FLOP per update       {m['flop_per_update'] / 1e9:9.2f} G    {m['flop_per_s'] / 1e9:.2f} GFLOP/s",
        f"iteration             {1e3 * m['iteration_s']:9.1f} ms",
        *(f"  {name:20}{1e3 * seconds:9.1f} ms" for name, seconds in m["section_s"].items()),
        f"overhead              {m['overhead']:9.3f}      iteration without optimizer / calls, backward passes and scoring",
        f"images per second     {m['images_per_s']:9.1f}",
        f"student updates / s   {m['student_updates_per_s']:9.2f}",
        f"scoring               {100 * m['scoring_share']:9.1f} %    of the iteration",
        f"peak memory           {m['peak_memory_mib']:9.0f} MiB  {m['peak_memory_of']}",
        f"build + 1st iteration {m['build_and_first_iteration_s']:9.1f} s",
        f"host syncs            {'-' if syncs is None else syncs:>9}      "
        + ("no GPU" if syncs is None else "per iteration"),
        *(f"  {number:>3} at {line}" for line, number in (m["host_syncs_at"] or {}).items()),
        "network calls of the last iteration:",
    ]
    for call in m["calls"]:
        kind = "forward + backward" if call["backward"] else "forward"
        lines.append(f"  {call['who']:<20} {kind:<19} {call['calls']:>3} calls  {call['samples']:>6} samples")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
