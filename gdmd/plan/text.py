"""A plan as text for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from gdmd.config.model import DiffusersModel
from gdmd.plan.cost_model import GIB, LINK_EFFICIENCY, RESERVE, ScalingRow
from gdmd.plan.estimate import TrainingPlan
from gdmd.plan.fit import MARGIN, Change, changes, fits, overrides

SMALL = 1e9
"""FLOP of a forward pass below which the speed estimate does not hold."""


def described(plan: TrainingPlan, rows: Sequence[ScalingRow]) -> str:
    """Memory, work and speed, whether it fits and what to change, and the table of several GPUs."""
    parts = [_head(plan), _memory(plan), _work(plan), _verdict(plan)]
    if rows:
        parts.append(_table(plan, rows))
    return "\n\n".join("\n".join(part) for part in parts)


def _head(plan: TrainingPlan) -> Iterable[str]:
    yield f"{plan.cfg.name}: {plan.cfg.method.kind}, {_batch(plan)}"
    yield f"from {plan.source}; no weights were loaded"
    yield ""
    yield "weights (millions)"
    yield "  " + ", ".join(f"{name} {count / 1e6:,.2f}" for name, count in plan.weights.items() if count)


def _batch(plan: TrainingPlan) -> str:
    loop, model = plan.cfg.loop, plan.cfg.model
    size = f"{model.largest.height} x {model.largest.width}, " if isinstance(model, DiffusersModel) else ""
    if isinstance(model, DiffusersModel) and model.sizes:
        size = f"the largest of {len(model.sizes)} sizes, {size}"
    return f"{size}batch {loop.batch_size} in micro-batches of {loop.micro_batch or loop.batch_size}"


def _memory(plan: TrainingPlan) -> Iterable[str]:
    phases = plan.cost.peaks(plan.batch)
    small = sum(plan.cost.static.values()) + max(phases.values()) < GIB
    unit, name_of_unit = (2**20, "MiB") if small else (GIB, "GiB")
    sizes = {name: float(size) for name, size in plan.cost.static.items() if size}
    sizes |= {"gradients": plan.cost.gradients, "tensors of the batch": plan.batch * plan.cost.per_sample}
    sizes |= {f"activations, {name}": size for name, size in phases.items()}
    yield f"memory ({name_of_unit})"
    for name, size in sizes.items():
        yield _line(name, size / unit)
    if plan.costs.with_checkpointing is not None:
        on, off = plan.costs.with_checkpointing / unit, plan.costs.without / unit
        yield f"    a micro-batch with activation checkpointing {on:.2f}, without {off:.2f}"
    worst = _line("peak", plan.cost.total(plan.batch) / unit)
    yield f"{worst}  (all roles, the largest phase, {RESERVE:.0f} GiB reserve)"
    if plan.embedding:
        yield _line("before training: embedding the prompts", plan.embedding / unit)
    if plan.text_bytes:
        yield f"  text cache on disk: {plan.text_bytes / 2**20:.2f} MiB per prompt"
    if plan.uncounted:
        yield f"  not counted, size unknown: {', '.join(plan.uncounted)}"


def _line(name: str, size: float) -> str:
    return f"  {name:48}{size:9.2f}"


def _work(plan: TrainingPlan) -> Iterable[str]:
    updates = plan.counts.updates
    flop = {name: value * plan.batch / updates["student"] / 1e12 for name, value in plan.cost.flop.items()}
    yield "work of one student update"
    yield f"  fake updates per student update {updates['fake'] / updates['student']:.2f}"
    yield f"  forward passes per sample {plan.passes:.2f} F (a backward counts 2, or 1 through frozen weights)"
    yield f"  F = {plan.costs.forward['teacher'] / 1e12:.4g} TFLOP"
    yield f"  {sum(flop.values()):,.4g} TFLOP: " + ", ".join(f"{k} {v:,.4g}" for k, v in flop.items())
    if not plan.gpu.tflops:
        return  # a number of GB
    each = plan.seconds / updates["student"]
    yield f"  on {plan.gpu.name} (estimate: {plan.efficiency:.0%} of {plan.gpu.tflops:g} TFLOP/s dense bf16): " + (
        f"{each:.3g} s, {plan.batch / plan.seconds:.3g} images/s, all {plan.cfg.loop.steps} iterations "
        f"{plan.seconds * plan.cfg.loop.steps / 3600:.3g} h"
    )
    if sent := plan.cost.transfers.bytes(plan.batch):
        yield (
            f"  of these {plan.cost.copying(plan.batch, plan.gpu) / updates['student']:.3g} s to copy "
            f"{sent / updates['student'] / 1e9:,.3g} GB of offloaded weights ({LINK_EFFICIENCY:.0%} of {plan.gpu.host:g} "
            "GB/s, PCIe x16)"
        )
    if plan.costs.forward["teacher"] < SMALL:
        yield "  networks this small are bound by kernel launches: expect the training to be many times slower"


def _verdict(plan: TrainingPlan) -> Iterable[str]:
    verdict = "it fits" if plan.fits else "it does NOT fit"
    yield f"{verdict}: {plan.total / GIB:.1f} of {plan.gpu.gib:g} GiB of {plan.gpu.name}"
    if not plan.fits:
        yield from (f"  try {change.settings} ({change.cost})" for change in changes(plan))
        yield f"  or {OTHER_TASK}; --fit tries these changes in this order"


OTHER_TASK = "a smaller loop.batch_size, image or model.lora_rank, model.full=none, or a GPU with more memory"
"""What is left when no other setting helps: it changes what is learned."""


def fitted(plan: TrainingPlan, kept: Sequence[Change], arguments: Sequence[str]) -> str:
    """The changes of --fit, and the command that trains with them."""
    lines = [f"{change.settings:40} saves {change.saved / GIB:6.2f} GiB; cost: {change.cost}" for change in kept]
    limit = f"{(1 - MARGIN) * plan.gpu.gib:.1f} GiB, {1 - MARGIN:.0%} of {plan.gpu.name}"
    if not fits(plan):
        lines.append(f"nothing more helps: {plan.total / GIB:.1f} GiB does not fit in {limit}. Use {OTHER_TASK}")
    else:
        lines.append(f"fits in {limit}:" if kept else f"fits in {limit} as it is:")
        lines.append("  " + train_command(arguments, kept))
    return "\n".join(lines)


def train_command(arguments: Sequence[str], kept: Sequence[Change]) -> str:
    """``gdmd train`` with the arguments of ``gdmd plan`` and the changes."""
    return shlex.join(["gdmd", "train", *arguments, *overrides(kept)])


def _table(plan: TrainingPlan, rows: Sequence[ScalingRow]) -> Iterable[str]:
    yield f"N GPUs of one node at {plan.gpu.link:g} GB/s (an estimate, without overlap of communication and computation)"
    yield "the batch is divided; it grows if there are more GPUs than samples. Traffic: GB sent per GPU and iteration"
    ddp, fsdp = "DDP GiB  traffic  images/s  scaling", "FSDP GiB  traffic  images/s  scaling"
    yield f"{'GPUs':>5}{'batch':>7}  | {ddp}  | {fsdp}"
    for row in rows:
        yield (
            f"{row.gpus:5d}{row.batch:7d}  |{row.ddp_gib:8.1f}{row.ddp_traffic:9.2f}{row.ddp_images_s:10.4g}"
            f"{row.ddp_efficiency:9.3f}  |{row.fsdp_gib:9.1f}{row.fsdp_traffic:9.2f}{row.fsdp_images_s:10.4g}"
            f"{row.fsdp_efficiency:9.3f}"
        )
