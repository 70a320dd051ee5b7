"""What a run sets but is too short to reach: a later stage, the full learning rate, a settled EMA."""

from __future__ import annotations

from collections.abc import Iterator

from gdmd.config.describe import counted, student_updates
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.run import RunConfig

TRIAL = 100
"""Student updates below which a run is a trial: its EMA is not judged."""
MOSTLY = 0.5
"""Share of the initial weights in the EMA above which the run is reported."""


def too_short(cfg: RunConfig) -> Iterator[str]:
    """One sentence for each, for the log."""
    method, loop = cfg.method, cfg.loop
    updates = loop.steps * student_updates(method)
    whole = f"the run makes {counted(updates, 'student update')} (loop.steps = {loop.steps})"
    if isinstance(method, DMDRConfig) and method.rl_weight > 0 and method.cold_start >= updates:
        yield (
            f"method.cold_start = {method.cold_start}, but {whole}: stage 2 is not reached, and the {method.strategy} loss "
            "never acts; lower method.cold_start and method.anneal, or train longer"
        )
    if isinstance(method, DMDRConfig) and method.anneal > updates:
        yield (
            f"method.anneal = {method.anneal}, but {whole}: DynaDG and DynaRS are not annealed to the end; lower "
            "method.anneal, or train longer"
        )
    if loop.warmup > updates:
        yield (
            f"loop.warmup = {loop.warmup}, but {whole}: the learning rates rise to {updates / loop.warmup:.0%} of "
            "loop.lr_student and loop.lr_fake only; lower loop.warmup, or train longer"
        )
    kept = loop.ema**updates
    if updates >= TRIAL and not loop.ema_warmup and kept > MOSTLY:
        yield (
            f"loop.ema = {loop.ema:g}, but {whole}: the average that is validated and exported will hold {kept:.0%} of the "
            "initial weights; lower loop.ema, or set loop.ema_warmup=true"
        )
