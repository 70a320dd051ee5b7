"""``gdmd plan --fit``: settings with which a recipe fits a GPU, those that cost least first.

The batch, the image size, the rank of the adapters and the trained roles stay: they change what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gdmd.config.extras import install
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeConfig
from gdmd.config.run import RunConfig
from gdmd.plan.cost_model import GIB, Gpu
from gdmd.plan.estimate import TrainingPlan, on_student_device, plan

MARGIN = 0.05
"""Share of the GPU's memory that a plan leaves free: activations are estimates."""
SMALLEST = 0.02 * GIB
"""Bytes that a change must save."""
SAME_CALLS = ("model.embeddings", "model.forward_chunk", "model.offload", "rewards.", "loop.optimizer")
"""Prefixes of the settings that change no measured call, so that nothing is measured again."""
TINY_DECODERS = {"sd15": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux": "taef1", "z_image": "taef1"}
"""The published AutoencoderTiny for a family's latents, by madebyollin."""


@dataclass(frozen=True)
class Change:
    """Settings that reduce memory, separated by spaces, their cost, and the bytes that they saved."""

    settings: str
    cost: str
    saved: float = 0.0

    @property
    def fields(self) -> list[str]:
        """The names of the settings."""
        return [setting.partition("=")[0] for setting in self.settings.split()]


def overrides(kept: Sequence[Change]) -> list[str]:
    """All settings, as arguments of a command."""
    return [setting for change in kept for setting in change.settings.split()]


def fit(
    read: Callable[[Sequence[str]], RunConfig],
    gpu: Gpu,
    efficiency: float,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[TrainingPlan, list[Change]]:
    """The plan with the changes it needs to fit, or all that help.

    ``read``: the recipe with more overrides. ``say`` gets a message before every change that is tried.
    """
    estimate, kept, tried = plan(read([]), gpu, efficiency), list[Change](), set[str]()
    while not fits(estimate):
        change = next((one for one in changes(estimate) if one.settings not in tried), None)
        if change is None:
            break
        tried.add(change.settings)
        say(f"{estimate.total / GIB:.1f} GiB; trying {change.settings}")
        cfg = read(overrides([*kept, change]))
        costs = estimate.costs if change.settings.startswith(SAME_CALLS) else None
        smaller = plan(cfg, gpu, efficiency, costs)
        saved = estimate.total - smaller.total
        if saved >= SMALLEST:
            replaced = [one for one in kept if one.fields == change.fields]
            saved += sum(one.saved for one in replaced)
            kept = [*(one for one in kept if one not in replaced), Change(change.settings, change.cost, saved)]
            estimate = smaller
    for change in reversed(kept[:-1]):  # what a later change made unnecessary
        rest = [one for one in kept if one is not change]
        if estimate.total + change.saved <= _limit(gpu):
            costs = estimate.costs if change.settings.startswith(SAME_CALLS) else None
            larger = plan(read(overrides(rest)), gpu, efficiency, costs)
            estimate, kept = (larger, rest) if fits(larger) else (estimate, kept)
    return estimate, kept


def fits(estimate: TrainingPlan) -> bool:
    """Whether the estimate leaves the margin free."""
    return estimate.total <= _limit(estimate.gpu)


def _limit(gpu: Gpu) -> float:
    return (1 - MARGIN) * gpu.gib * GIB


def changes(estimate: TrainingPlan) -> Iterator[Change]:
    """What can reduce the peak, in the order of its cost: nothing, time, then exactness."""
    model, loop = estimate.cfg.model, estimate.cfg.loop
    peaks = estimate.cost.peaks(estimate.batch)
    worst = max(peaks, key=lambda name: peaks[name])
    training = estimate.cost.total(estimate.batch) >= estimate.embedding  # else embedding the prompts is the peak
    real = model if isinstance(model, DiffusersModel) else None
    if real is not None and estimate.cost.static["text encoders"]:
        yield Change("model.embeddings=embeddings", "none: the prompts are embedded once, before training")
    in_parts = worst.startswith("update") or (worst.startswith("decoding") and estimate.cost.decoding_with_grad > 0)
    if training and in_parts and estimate.costs.micro > 1:
        yield Change("loop.micro_batch=1", "smaller calls, slower on a large GPU")
    if real is not None and training:
        yield from _slower(estimate, real, worst)
    if training and loop.optimizer == "adamw" and loop.sharding == "none":  # 8-bit state cannot be sharded
        yield Change("loop.optimizer=adamw8bit", f"8-bit optimizer state; {install('8bit')}")
    if real is not None and training:
        yield from _less_exact(estimate, real, worst)
    if real is not None and real.full == "none" and not real.teacher_loras and not real.student_lora:
        if real.quantization == "none":
            yield Change(
                "model.quantization=int8", "errors of about 1 % in x0 on the small Shapes pipelines; needs torchao"
            )
    if real is not None and real.full == "none" and not real.teacher_loras and not real.student_lora:
        if real.quantization != "nf4" and real.offload != "base":
            yield Change("model.quantization=nf4", "over ten times the error of int8; needs bitsandbytes")


def _slower(estimate: TrainingPlan, model: DiffusersModel, worst: str) -> Iterator[Change]:
    """Changes that cost time."""
    if worst.startswith("sampling"):
        for rows in (2, 1):
            if not 0 < model.forward_chunk <= rows:
                yield Change(f"model.forward_chunk={rows}", "smaller calls, slower on a large GPU")
    if worst.startswith(("decoding", "validation")) and model.decode_chunk > 1:
        yield Change("model.decode_chunk=1", "one image per call of the VAE")
    holds_graph = worst.startswith("update") or (worst.startswith("decoding") and any(estimate.cost.graph))
    if holds_graph and not model.checkpointing:
        yield Change("model.checkpointing=true", "a third more time: activations are recomputed")
    away = [f"{path}.offload=true" for path, spec in _neural(estimate.cfg) if not spec.offload]
    if away:  # together: a single one still visits the GPU in the largest phase
        yield Change(" ".join(away), "the weights of the rewards are copied to the GPU for every call")
    if model.offload == "none":
        yield Change("model.offload=idle", "text encoders and decoder are copied to the GPU for every use")
    if model.offload != "base" and model.full == "none" and model.quantization != "nf4" and not model.compile:
        yield Change(
            "model.offload=base",
            "text encoders, decoder and the base model's blocks are copied to the GPU for every call",
        )


def _less_exact(estimate: TrainingPlan, model: DiffusersModel, worst: str) -> Iterator[Change]:
    """Changes that move the rewards a little."""
    rounded = [f"{path}.dtype=bf16" for path, spec in _neural(estimate.cfg) if spec.dtype == "fp32"]
    if rounded:
        yield Change(" ".join(rounded), "scores are rounded")
    rewarded = worst.startswith("decoding") and model.scoring_decoder is None
    if (rewarded or worst.startswith("validation")) and not model.decode_tiled:
        yield Change("model.decode_tiled=true", "faint seams in decoded images")
    if rewarded and model.family in TINY_DECODERS:
        cost = "rewards see the images of a tiny decoder; the run reports the difference"
        yield Change(f"model.scoring_decoder=madebyollin/{TINY_DECODERS[model.family]}", cost)


def _neural(cfg: RunConfig) -> Iterator[tuple[str, Any]]:
    """The trained rewards with a network on the student's GPU, with their path in the recipe."""
    for index, spec in enumerate(cfg.rewards if cfg.method.rewarded else ()):
        parts = enumerate(spec.parts) if isinstance(spec, CompositeConfig) else ()
        inside = [(f"rewards.{index}.parts.{place}.reward", part.reward) for place, part in parts]
        for path, one in inside or [(f"rewards.{index}", spec)]:
            if hasattr(one, "offload") and on_student_device(one):
                yield path, one
