"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gdmd.config.model import DiffusersModel
from gdmd.plan.cost_model import GIB, NETWORK, NODE, RESERVE, Hybrid, Row
from gdmd.plan.estimate import Plan

SMALL = 1e9
"""FLOP of a forward below which the speed model says nothing."""


def described(plan: Plan, rows: Sequence[Row]) -> str:
    """Lines of text; the last say whether it fits, and what to change."""
    parts = [_head(plan), _memory(plan), _work(plan), _verdict(plan)]
    if rows:
        parts.append(_table(plan, rows))
    return "\n\n".join("\n".join(part) for part in parts)


def _head(plan: Plan) -> Iterable[str]:
    yield f"{plan.cfg.name}: {plan.cfg.method.kind}, {_place(plan)}"
    yield f"from {plan.source}; no weights were loaded"
    yield ""
    yield "weights (millions)"
    yield "  " + ", ".join(f"{name} {count / 1e6:,.2f}" for name, count in plan.weights.items() if count)


def _place(plan: Plan) -> str:
    loop, model = plan.cfg.loop, plan.cfg.model
    size = f"{model.height} x {model.width}, " if isinstance(model, DiffusersModel) else ""
    return f"{size}batch {loop.batch_size} in micro-batches of {loop.micro_batch or loop.batch_size}"


def _memory(plan: Plan) -> Iterable[str]:
    phases = plan.parts.peaks(plan.batch)
    small = sum(plan.parts.static.values()) + max(phases.values()) < GIB
    unit, name_of_unit = (2**20, "MiB") if small else (GIB, "GiB")
    sizes = {name: float(size) for name, size in plan.parts.static.items() if size}
    sizes |= {"gradients": plan.parts.gradients, "tensors of the batch": plan.batch * plan.parts.per_sample}
    sizes |= {f"activations, {name}": size for name, size in phases.items()}
    yield f"memory ({name_of_unit})"
    for name, size in sizes.items():
        yield _line(name, size / unit)
    if plan.costs.with_checkpointing is not None:
        on, off = plan.costs.with_checkpointing / unit, plan.costs.without / unit
        yield f"    a micro-batch with activation checkpointing {on:.2f}, without {off:.2f}"
    worst = _line("the worst moment", plan.parts.total(plan.batch) / unit)
    yield f"{worst}  (all roles, the largest phase, {RESERVE:.0f} GiB reserve)"
    if plan.embedding:
        yield _line("before: embedding the prompts", plan.embedding / unit)
    if plan.text_bytes:
        yield f"  text cache on disk: {plan.text_bytes / 2**20:.2f} MiB per prompt"
    if plan.uncounted:
        yield f"  not counted, size unknown here: {', '.join(plan.uncounted)}"


def _line(name: str, size: float) -> str:
    return f"  {name:48}{size:9.2f}"


def _work(plan: Plan) -> Iterable[str]:
    updates = plan.tally.updates
    flop = {name: value * plan.batch / updates["student"] / 1e12 for name, value in plan.parts.flop.items()}
    yield "work of one student update"
    yield f"  fake updates per student update {updates['fake'] / updates['student']:.2f}"
    yield f"  passes per sample {plan.passes:.2f} F, F = {plan.costs.forward['teacher'] / 1e12:.4g} TFLOP"
    yield f"  {sum(flop.values()):,.4g} TFLOP: " + ", ".join(f"{k} {v:,.4g}" for k, v in flop.items())
    each = plan.seconds / updates["student"]
    yield f"  on {plan.gpu.name} (model: {plan.efficiency:.0%} of {plan.gpu.tflops:g} TFLOP/s dense bf16): " + (
        f"{each:.3g} s, {plan.batch / plan.seconds:.3g} images/s, all {plan.cfg.loop.steps} iterations "
        f"{plan.seconds * plan.cfg.loop.steps / 3600:.3g} h"
    )
    if plan.costs.forward["teacher"] < SMALL:
        yield "  networks this small are bound by launching kernels: expect it to be many times slower"


def _verdict(plan: Plan) -> Iterable[str]:
    said = "it fits" if plan.fits else "it does NOT fit"
    yield f"{said}: {plan.total / GIB:.1f} of {plan.gpu.gib:g} GiB of {plan.gpu.name}"
    if not plan.fits:
        yield from (f"  try {hint}" for hint in hints(plan))


def hints(plan: Plan) -> list[str]:
    """Fields that would make it smaller, for the phase and the roles that are largest."""
    model = plan.cfg.model
    if not isinstance(model, DiffusersModel):
        return ["loop.batch_size smaller"]
    peaks = plan.parts.peaks(plan.batch)
    worst = max(peaks, key=lambda name: peaks[name])
    found = []
    if plan.embedding > plan.gpu.gib * GIB:
        found.append("model.t5=false, or embed the prompts on a larger GPU: the folder model.embeddings can be copied")
    if worst.startswith("sampling") and model.forward_chunk != 1:
        found.append("a smaller model.forward_chunk: roll-out and scores are made in parts of so many rows")
    if plan.batch > plan.cfg.method.prompt_group:
        found.append("a smaller loop.batch_size")
    if worst.startswith("update"):
        found.append("loop.micro_batch=1" if plan.costs.micro > 1 else "a smaller model.height and model.width")
        found += [] if model.checkpointing else ["model.checkpointing=true"]
    if worst.startswith("decoding"):
        found.append("model.decode_tiled=true, or a model.scoring_decoder")
    if model.full != "none":
        found.append("model.full=none: adapters on one trunk")
    if plan.parts.static["rewards"] > GIB:
        found.append("rewards in bf16, with offload: true, or on another device (rewards.0.dtype=bf16)")
    if plan.parts.static["text encoders"]:
        found.append("model.embeddings=FOLDER: the text encoders are then unloaded")
    return found or ["a GPU with more memory: the frozen trunk is most of it"]


def _table(plan: Plan, rows: Sequence[Row]) -> Iterable[str]:
    yield (
        f"N GPUs (a model; no time is measured): {NODE} per node at {plan.gpu.link:g} GB/s, nodes at {NETWORK:g} "
        "GB/s per GPU, no overlap"
    )
    yield "the batch is divided; beyond one sample per GPU it grows with them. Traffic: sent per GPU and iteration"
    ddp, fsdp = "DDP GiB       GB  images/s  scaling", "FSDP GiB       GB  images/s  scaling"
    yield f"{'GPUs':>5}{'batch':>7}  | {ddp}  | {fsdp}"
    for row in rows:
        yield (
            f"{row.gpus:5d}{row.batch:7d}  |{row.ddp_gib:8.1f}{row.ddp_traffic:9.2f}{row.ddp_images_s:10.4g}"
            f"{row.ddp_efficiency:9.3f}  |{row.fsdp_gib:9.1f}{row.fsdp_traffic:9.2f}{row.fsdp_images_s:10.4g}"
            f"{row.fsdp_efficiency:9.3f}"
        )
    yield from _hybrid_table([(row, row.hybrid) for row in rows if row.hybrid is not None])


def _hybrid_table(rows: Sequence[tuple[Row, Hybrid]]) -> Iterable[str]:
    if not rows:
        return
    yield ""
    yield "loop.sharding=hybrid: shards inside a node, replicas across nodes"
    yield f"{'GPUs':>5}{'batch':>7}  |     GiB  GB inside  GB between  images/s  scaling"
    for row, own in rows:
        yield (
            f"{row.gpus:5d}{row.batch:7d}  |{own.gib:8.1f}{own.inside:11.2f}{own.between:12.2f}"
            f"{own.images_s:10.4g}{own.efficiency:9.3f}"
        )
