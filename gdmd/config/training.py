"""The training loop's options: length, batch, optimizer, EMA, checkpoints, logging, precision and several GPUs.

One step is one outer iteration of the method. Learning-rate warm-up and the EMA count student updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount, Positive, Probability

Decay = Annotated[Probability, Field(lt=1)]
"""Fraction kept per update, in [0, 1): with 1 an average would never change."""


class LoopConfig(Config):
    """The ``loop`` section of a recipe."""

    steps: Count = Field(
        200, description="Total number of outer iterations; a resumed run continues up to this number."
    )
    start_from: str = Field(
        "",
        description="Folder of a finished run to start from: its EMA student and its fake score; or shapes:dmd, the shipped "
        "DMD student of the Shapes teacher; or a file of `gdmd pretrain student`. Optimizers, schedule and EMA start fresh; "
        'use a different seed than that run. Default "": start from the teacher.',
    )
    batch_size: Count = Field(
        32, description="Samples, each a prompt and a noise, per outer iteration, over all ranks."
    )
    micro_batch: NonNegativeCount = Field(
        0,
        description="Samples per backward pass, to save memory; 0 = the whole batch. Must divide batch_size, which "
        "keeps the mean over samples exact.",
    )
    seed: NonNegativeCount = Field(
        0, description="Seed of all random draws; each is keyed by (seed, step, sample, purpose)."
    )
    lr_student: Positive = Field(
        3e-5,
        description="Learning rate of the student. LoRA of rank 32-64: 3e-5 for SD3, and 1e-6 for a FLUX.2 student that "
        "starts as the distilled model (arXiv 2605.26108); all SDXL weights: 5e-7. Small networks need more: on the small "
        "Shapes pipelines a LoRA does not move in 200 updates at 1e-5 and learns at 1e-3, full weights at 3e-4. If the rate "
        "is too low, training warns that the student hardly moves.",
    )
    lr_fake: Positive = Field(
        3e-5,
        description="Learning rate of the fake score: the student's (arXiv 2405.14867), 0.4 or 0.5 of it (DMDR's SD3 "
        "scripts), a third (the code of arXiv 2605.26108), a fifth (LightX2V). LoRA students of the small Shapes "
        "pipelines use three times the student's; one to three times made no clear difference; a third scored "
        "lower on SD3, ten times on SDXL (docs/LOG.md, entry 36).",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw8bit (arXiv 2110.02861) keeps the optimizer state in 8 bits, a quarter of the memory; "
        "weights stay fp32. Needs pip install -e '.[8bit]'.",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="AdamW's betas, for both roles (arXiv 2605.26108, 2511.13649)."
    )
    weight_decay: NonNegative = Field(
        0.0,
        description="AdamW's decoupled weight decay, for both roles; 0 as in arXiv 2605.26108 (arXiv 2511.13649: "
        "0.01).",
    )
    clip: NonNegative = Field(
        1.0, description="Maximum global gradient norm of an update (1: arXiv 2605.26108, 2511.13649); 0 = no clipping."
    )
    warmup: NonNegativeCount = Field(
        0, description="Student updates over which both learning rates rise linearly to their value; 0 = no warm-up."
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Schedule of both learning rates over the steps; cosine and linear end at 0."
    )
    ema: Decay = Field(
        0.99,
        description="Decay of the student's EMA per student update (0.99: arXiv 2605.26108); 0 = no EMA, which cost 0.07 "
        "ShapesEval on the small SD3 and SDXL pipelines (docs/LOG.md, entry 36).",
    )
    ema_warmup: bool = Field(
        False,
        description="Use the decay min(ema, (1 + n) / (10 + n)) at update n, so that a short run forgets the initial "
        "weights sooner.",
    )
    checkpoint_every: Count = Field(
        100, description="Steps between checkpoints; at most this many are lost on SIGKILL."
    )
    keep_checkpoints: NonNegativeCount = Field(
        2, description="Number of newest checkpoints to keep: 2, so that one is intact if the last is damaged. 0 = all."
    )
    checkpoint_async: bool = Field(
        False,
        description="Copy the state to host memory and write it while training continues; steps made during the write "
        "may be lost on SIGKILL, too. false: training waits until the checkpoint is written.",
    )
    best_metric: str = Field(
        "",
        description="Key of metrics.jsonl, such as reward/target, by which the best checkpoint is also kept; it is "
        "averaged over the last checkpoint_every steps. validation/LABEL: the score at the step of the checkpoint, so only "
        'validated checkpoints are compared. Default "": no best checkpoint.',
    )
    best_direction: Literal["max", "min"] = Field("max", description="Whether a high or a low best_metric is better.")
    log_every: Count = Field(
        10, description="Steps per line of metrics.jsonl; a line holds the means over these steps."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "swanlab"], ...] = Field(
        ("tensorboard",),
        description="Experiment trackers that get the rows of metrics.jsonl and the validation images; all but TensorBoard "
        "need pip install -e '.[NAME]'. [] or none: no tracker.",
    )
    push_checkpoints: str = Field(
        "",
        description="Hub repository ORG/NAME that gets each new checkpoint in place of the last one, uploaded in the "
        "background; a new repository is private. A failed upload is reported and the next checkpoint uploaded instead; "
        'the last one is tried again at the end. Default "": checkpoints stay on this machine.',
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: student, fake score, teacher and old policy run under bf16 autocast; weights, losses, x0 "
        "arithmetic, decoder and rewards keep their precision.",
    )
    threads: NonNegativeCount = Field(
        0, description="CPU threads of torch; 0 = torch's default. Bit-exact repetition needs the same number."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="On a loss or gradient that is not finite: stop with an error, or skip the update and count it.",
    )
    sharding: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="Several ranks only. none: every rank holds all weights and gradients are averaged (for adapters "
        "and small networks); full: FSDP2 shards the weights over all ranks; hybrid: shards within a machine, replicas "
        "across machines.",
    )
    rank_timeout: Positive = Field(
        600.0,
        description="Seconds that ranks wait for each other before the run ends (the timeout of torch's process "
        "groups); longer than one iteration, than saving a checkpoint, and than drawing and scoring the validation images, "
        "at step 0 also the teacher's, which rank 0 does alone.",
    )
    skip_limit: Count = Field(
        10, description="With on_nonfinite = skip: number of skipped updates in one run after which it stops."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, given: Any) -> Any:
        listed = [given] if isinstance(given, str) else given
        return [] if listed in (["none"], ("none",)) else listed  # as transformers and TRL write it

    @model_validator(mode="before")
    @classmethod
    def _removed(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "grid_every" in given:
            raise ValueError("grid_every was removed: set validation.every instead; validation also scores the images")
        return given

    def _mistakes(self) -> Iterator[str]:
        if self.micro_batch and self.batch_size % self.micro_batch:
            yield (
                f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size} into equal parts; use 0 "
                f"(whole batch) or a divisor of {self.batch_size}"
            )
        if self.optimizer == "adamw8bit" and self.sharding != "none":
            yield (
                f"optimizer = adamw8bit and sharding = {self.sharding}: 8-bit optimizer state cannot "
                "be sharded. Use sharding = none, or optimizer = adamw (its state is sharded)."
            )
