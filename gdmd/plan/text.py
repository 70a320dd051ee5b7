"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gdmd.config.model import DiffusersModel
from gdmd.plan.cost_model import GIB, RESERVE, ScalingRow
from gdmd.plan.estimate import TrainingPlan

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
    size = f"{model.height} x {model.width}, " if isinstance(model, DiffusersModel) else ""
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
    each = plan.seconds / updates["student"]
    yield f"  on {plan.gpu.name} (estimate: {plan.efficiency:.0%} of {plan.gpu.tflops:g} TFLOP/s dense bf16): " + (
        f"{each:.3g} s, {plan.batch / plan.seconds:.3g} images/s, all {plan.cfg.loop.steps} iterations "
        f"{plan.seconds * plan.cfg.loop.steps / 3600:.3g} h"
    )
    if plan.costs.forward["teacher"] < SMALL:
        yield "  networks this small are bound by kernel launches: expect it to be many times slower"


def _verdict(plan: TrainingPlan) -> Iterable[str]:
    verdict = "it fits" if plan.fits else "it does NOT fit"
    yield f"{verdict}: {plan.total / GIB:.1f} of {plan.gpu.gib:g} GiB of {plan.gpu.name}"
    if not plan.fits:
        yield from (f"  try {hint}" for hint in hints(plan))


def hints(plan: TrainingPlan) -> list[str]:
    """Options that reduce memory, for the largest phase and the largest roles."""
    model = plan.cfg.model
    if not isinstance(model, DiffusersModel):
        return ["loop.batch_size smaller"]
    peaks = plan.cost.peaks(plan.batch)
    worst = max(peaks, key=lambda name: peaks[name])
    found = []
    if plan.embedding > plan.gpu.gib * GIB:
        found.append("model.t5=false, or embed the prompts on a larger GPU and copy the folder model.embeddings")
    if worst.startswith("sampling") and model.forward_chunk != 1:
        found.append("a smaller model.forward_chunk: rows per call of rollouts and scores")
    if plan.batch > plan.cfg.method.prompt_group:
        found.append("a smaller loop.batch_size")
    if worst.startswith("update"):
        found.append("loop.micro_batch=1" if plan.costs.micro > 1 else "a smaller model.height and model.width")
        found += [] if model.checkpointing else ["model.checkpointing=true"]
    if worst.startswith("decoding"):
        found.append("model.decode_tiled=true, or a model.scoring_decoder")
    if model.full != "none":
        found.append("model.full=none: adapters on one shared base model")
    if plan.cost.static["rewards"] > GIB:
        found.append("rewards in bf16, with offload: true, or on another device (rewards.0.dtype=bf16)")
    if plan.cost.static["text encoders"]:
        found.append("model.embeddings=FOLDER: the text encoders are then unloaded")
    return found or ["a GPU with more memory: the frozen base model is most of it"]


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
