"""How long, how fast and how safely a method is trained: everything the loop owns and no algorithm knows.

One step is one outer iteration of the method. Learning-rate warm-up and the EMA count student updates.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount, Positive, Probability

Decay = Annotated[Probability, Field(lt=1)]
"""A fraction kept per update, in [0, 1): at 1 an average would never move."""


class LoopConfig(Config):
    """The ``loop`` section of a recipe."""

    steps: Count = Field(200, description="Outer iterations in all, of a resumed run too.")
    start_from: str = Field(
        "",
        description="Folder of another run to start from: its student (EMA) and fake score; optimizers, schedule and "
        'EMA start fresh. Use another seed than that run. "" = start from the teacher.',
    )
    batch_size: Count = Field(32, description="Samples (prompt, noise) of one outer iteration.")
    micro_batch: NonNegativeCount = Field(
        0,
        description="Samples per backward pass, to save memory; 0 = the whole batch. Must divide batch_size: "
        "equal parts keep the mean over samples exact.",
    )
    seed: NonNegativeCount = Field(0, description="Every random draw is keyed by (seed, step, sample, purpose).")
    lr_student: Positive = Field(
        3e-5, description="Learning rate of the student. LoRA of rank 32-64: 3e-5 (arXiv 2605.26108); full SDXL 5e-7."
    )
    lr_fake: Positive = Field(
        3e-5,
        description="Learning rate of the fake score; the papers use the student's (arXiv 2405.14867, 2605.26108).",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw8bit (arXiv 2110.02861): 8-bit moments, a quarter of the memory; weights stay fp32. "
        "Needs pip install -e '.[8bit]'.",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="AdamW moments, both roles (arXiv 2605.26108, 2511.13649)."
    )
    weight_decay: NonNegative = Field(
        0.0, description="AdamW's decoupled decay, both roles; 0 as in arXiv 2605.26108 (arXiv 2511.13649: 0.01)."
    )
    clip: NonNegative = Field(
        1.0, description="Largest global gradient norm of one update (arXiv 2605.26108, 2511.13649); 0 = no clipping."
    )
    warmup: NonNegativeCount = Field(
        0, description="Student updates over which both learning rates rise linearly to their value; 0 = at once."
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Course of both learning rates over the steps; cosine and linear end at 0."
    )
    ema: Decay = Field(
        0.99, description="Decay of the student's EMA per student update (arXiv 2605.26108); 0 = no EMA."
    )
    ema_warmup: bool = Field(
        False,
        description="Decay min(ema, (1 + n) / (10 + n)) at update n: short runs forget the initial weights sooner.",
    )
    checkpoint_every: Count = Field(
        100, description="Steps between checkpoints: at most this many are lost on SIGKILL."
    )
    keep_checkpoints: NonNegativeCount = Field(
        2, description="Newest checkpoints kept; two, so that one good one is left when the last is damaged. 0 = all."
    )
    checkpoint_async: bool = Field(
        False,
        description="Copy the state to host memory and write it in a background thread; on SIGKILL the steps made "
        "meanwhile may be lost, too. false: the loop waits for the write, without the copy.",
    )
    best_metric: str = Field(
        "",
        description="Key of metrics.jsonl that selects a best checkpoint, kept next to the newest, such as reward/target; "
        'its mean over the last checkpoint_every steps counts. "" = none.',
    )
    best_direction: Literal["max", "min"] = Field("max", description="Whether more or less of best_metric is better.")
    log_every: Count = Field(10, description="Steps per line of metrics.jsonl; a line holds means over these steps.")
    grid_every: NonNegativeCount = Field(100, description="Steps between sample grids (EMA weights); 0 = none.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: student, fake, teacher and old policy compute in bf16 (autocast); their weights, losses, all x0 "
        "arithmetic, decoder and rewards stay as they are.",
    )
    threads: NonNegativeCount = Field(
        0, description="CPU threads of torch; 0 leaves its choice. Bitwise repetition needs the same number."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: stop with an error, or skip that update and count."
    )
    sharding: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="Several ranks only. none: every rank holds all weights, gradients are averaged (adapters, small "
        "nets); full: FSDP2 shards full weights over all ranks; hybrid: inside a machine, replicas across machines.",
    )
    rank_timeout: Positive = Field(
        600.0,
        description="Seconds that ranks wait for each other before the run ends (the timeout of torch's process "
        "groups); longer than one iteration and than saving a checkpoint.",
    )
    skip_limit: Count = Field(
        10, description="Updates of one run that may be skipped in all (on_nonfinite = skip) before it stops after all."
    )

    @model_validator(mode="after")
    def _equal_micro_batches(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size}: the parts would be "
                f"unequal and the mean over samples wrong. Use 0 (whole batch) or a divisor of {self.batch_size}."
            )
        return self

    @model_validator(mode="after")
    def _whole_moments(self) -> Self:
        if self.optimizer == "adamw8bit" and self.sharding != "none":
            raise ValueError(
                f"optimizer = adamw8bit and sharding = {self.sharding}: blocks of 8-bit moments cannot be "
                "sharded. Use sharding = none, or optimizer = adamw (its state is sharded)."
            )
        return self
