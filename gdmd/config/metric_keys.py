"""The keys of metrics.jsonl that a recipe logs, so that a misspelled loop.best_metric is refused before training."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import ShuffledTiltedGDMDConfig, TiltedGDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeConfig, OcrConfig, RemoteConfig
from gdmd.config.run import RewardConfig, RunConfig
from gdmd.config.validation import DIVERSITY, PREFIX, TEACHER, at_size

_ROLES = ("student", "fake")
_ALWAYS = (
    *(f"{place}/{role}" for place in ("loss", "grad_norm", "lr", "updates", "skipped") for role in _ROLES),
    *("speed/images_per_s", "latent/mean", "latent/std", "gap/real", "gap/grad"),
    *(f"fake_loss/t{k}" for k in range(3)),
)
_COLLECTED = ("reward/sample", "reward/unscored", "advantage/size", "advantage/share_zero")
_TARGETS = (
    *("reward/target", "reward/unscored", "latent/scored_std", "weight/mean"),
    *("gain/construction", "gain/realized"),
)
_OPTIMALITY = (
    *("reward/sample", "reward/gain"),
    *(f"weight/{name}" for name in ("r_mean", "r_std", "share_below_half", "share_clipped")),
    *(f"histogram/r_{k}" for k in range(10)),
)


def check_best_metric(cfg: RunConfig) -> None:
    """ValueError for a loop.best_metric that training never logs, with the most similar key that it logs."""
    wanted, known = cfg.loop.best_metric, [key for key in metric_keys(cfg) if not key.startswith(TEACHER)]
    if wanted.startswith(PREFIX) and wanted in known:
        _check_validated(cfg)
    if not wanted or wanted in known:
        return
    near = difflib.get_close_matches(wanted, known, 1)
    mean = next((key for key in ("reward/target", "reward/sample") if key in known), "loss/student")
    advice = f"did you mean {near[0]}?" if near else f"take {mean}, or a key of metrics.jsonl of a similar run"
    if wanted.startswith("reward/") and not cfg.method.rewarded:
        advice = f"method {cfg.method.kind} as set here reads no rewards; take a loss, such as loss/student"
    raise ValueError(f"loop.best_metric = {wanted} is not logged by this recipe: {advice}")


def _check_validated(cfg: RunConfig) -> None:
    every, saved = cfg.validation.every, cfg.loop.checkpoint_every
    if math.lcm(every, saved) > cfg.loop.steps:
        raise ValueError(
            f"loop.best_metric = {cfg.loop.best_metric} compares checkpoints that are validated, and with validation.every "
            f"= {every} and loop.checkpoint_every = {saved} only the last one is; set both to the same number"
        )


def metric_keys(cfg: RunConfig) -> tuple[str, ...]:
    """Every key that a row of metrics.jsonl can hold; some appear only in a second stage."""
    rewards = [key for spec in _rewards(cfg) for key in (*_scored(spec), *_of_reward(spec))]
    moved = ("student/moved",) if cfg.starts_as_teacher else ()
    names = [_name(spec) for spec in (*_rewards(cfg), *cfg.held_out)] + ([DIVERSITY] if cfg.feature_scorer else [])
    sizes = cfg.model.sizes if isinstance(cfg.model, DiffusersModel) else ()
    names += [at_size(name, *size) for size in sizes for name in names]
    validated = [start + name for name in names for start in (PREFIX, TEACHER)]
    scores = validated if cfg.validation.every else []
    return tuple(dict.fromkeys((*_ALWAYS, *moved, *_of_method(cfg), *rewards, *scores)))


def _rewards(cfg: RunConfig) -> tuple[RewardConfig, ...]:
    return cfg.rewards if cfg.method.rewarded else ()


def _of_method(cfg: RunConfig) -> tuple[str, ...]:
    samples, targets, spreads = (
        tuple(f"reward/{_name(spec)}/{what}" for spec in _rewards(cfg)) for what in ("sample", "target", "group_std")
    )
    spreads = ("reward/group_share", *spreads)
    match cfg.method:
        case DMDConfig() as method:
            return ("loss/regression",) if method.regression_weight > 0 else ()
        case DMD2Config() as method:
            return ("loss/head", "loss/gan", "gan/real", "gan/student") if method.adversarial else ()
        case DMDRConfig() as method:
            return ("schedule/c", *_of_dmdr(method, samples))
        case _ if not cfg.method.rewarded:
            return ()
        case DMDReFLConfig():
            return ("loss/refl", "reward/sample", "reward/unscored", *samples)
        case DMDNFTConfig():
            return ("loss/nft", "weight/r", *_COLLECTED, *samples)
        case DMDGRPOConfig():
            return ("loss/grpo", "policy/moved", "policy/clipped", *_COLLECTED, *samples)
        case GDMDConfig() as method:
            grouped = spreads if method.group_size > 1 else ()
            return (*_TARGETS, *_OPTIMALITY, *samples, *targets, *grouped)
        case TiltedGDMDConfig() as method:
            gradient = ("gap/pull",) if method.reward_gradient > 0 else ()
            compared = (*_OPTIMALITY, *samples) if isinstance(method, ShuffledTiltedGDMDConfig) else ()
            return (*_TARGETS, *compared, "weight/effective", *gradient, *targets, *spreads)


def _of_dmdr(method: DMDRConfig, samples: tuple[str, ...]) -> Iterator[str]:
    if method.tilt > 0 and method.cold_start > 0:
        yield from ("weight/tilt", "reward/complete")
    if method.rl_weight > 0:
        yield "loss/rl"
        if method.strategy == "refl":
            yield from ("reward/sample", "reward/unscored", *samples)
        if method.strategy == "grpo":
            yield from (*_COLLECTED, *samples)
        if method.strategy == "dpo":
            yield from ("reward/complete", "reward/paired")


def _scored(spec: RewardConfig) -> tuple[str, str]:
    """Keys that show whether a reward carries a signal (runs.reward_signal)."""
    return f"scores/{_name(spec)}/unscored", f"scores/{_name(spec)}/spread"


def _of_reward(spec: RewardConfig) -> Iterator[str]:
    """Keys that a reward logs itself."""
    name = _name(spec)
    match spec:
        case OcrConfig():
            yield f"reward/{name}/unasked"
        case RemoteConfig():
            yield from (f"reward/{name}/unscored", f"reward/{name}/retries")
        case CompositeConfig():
            for part in spec.parts:
                yield f"reward/{name}/{_name(part.reward)}"
                yield from _of_reward(part.reward)
        case _:
            pass


def _name(spec: RewardConfig) -> str:
    """The name of a reward in keys: its label, without the space of a remote one."""
    return f"remote_{spec.reward}" if isinstance(spec, RemoteConfig) else spec.label
