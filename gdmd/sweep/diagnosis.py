"""Diagnosis of a training, at its start and at each kept checkpoint: rewards, gradients, and what an update changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from gdmd.config.describe import labels_of
from gdmd.config.methods.all import MethodConfig, without_rewards
from gdmd.config.run import RunConfig, ShapesReward
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.pass_counter import without_cost
from gdmd.methods.scorer import Scorer
from gdmd.recipes.build import Components, build
from gdmd.recipes.build_rewards import build_rewards, scorers_of
from gdmd.recipes.open_run import load_ema, student_row
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import Run
from gdmd.shapes.evaluate import HELDOUT, evaluate
from gdmd.shapes.grammar import Split
from gdmd.sweep.divergence import apply_iteration, divergence, fixed_states, realized_change, student_gradient
from gdmd.training.distributed import SINGLE_PROCESS
from gdmd.training.ema import load_named
from gdmd.training.optimizer import lr_factor
from gdmd.training.role_state import RoleState, role_states
from gdmd.training.warm_start import warm_start
from gdmd.types import PromptBatch, Reward, Role, Update

ROLES: tuple[Role, Role] = ("student", "fake")


def diagnose(cfg: RunConfig, run: Run, how: Mapping[str, Any], split: Split) -> list[dict[str, Any]]:
    """One entry for the start and one for each checkpoint of the run, in order of student updates."""
    saved = [None, *(checkpoint.load(run.checkpoints / f"step_{n:06d}") for n in checkpoint.steps(run.checkpoints))]
    return [_point(cfg, each, how, split) for each in saved]


def _point(cfg: RunConfig, saved: checkpoint.Checkpoint | None, how: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """Rewards and ShapesEval of the EMA student, then the divergence of the two gradients and the realized change."""
    step = saved.step if saved else 0
    updates = saved.state["roles"]["student"]["updates"] if saved else 0
    return {
        "step": step,
        "updates": updates,
        **_curve(cfg, saved, how, split),
        **_gradients(cfg, saved, step),
        **_change(cfg, saved, step),
    }


def _curve(cfg: RunConfig, saved: checkpoint.Checkpoint | None, how: Mapping[str, Any], split: Split) -> dict[str, Any]:
    components = build(cfg)
    if saved:
        load_ema(components, saved)
    else:
        begin(components, cfg)
    size = cfg.eval.model_copy(update={"per_task": how["per_task"], "images": how["images"]})
    row = evaluate(student_row(cfg, components), components, size, all_scorers(cfg), split).json()
    return {"shapeseval": row["shapeseval"]["overall"], "rewards": row["rewards"], "fidelity": row["fidelity"]}


def _gradients(cfg: RunConfig, saved: checkpoint.Checkpoint | None, step: int) -> dict[str, float]:
    """Divergence of the reward and DMD gradients; {} for a method without rewards."""
    plain = without_rewards(cfg.method)
    if plain is None:
        return {}
    both = build(cfg), build(_with_method(cfg, plain))
    prompts, rng = draws(both[0], cfg, step)  # the method's own groups of prompts, for both
    found = []
    for components in both:
        restore(components, saved) if saved else begin(components, cfg)
        found.append(student_gradient(components.method, components.roles, step, prompts, rng))
    return asdict(divergence(*found))


def _change(cfg: RunConfig, saved: checkpoint.Checkpoint | None, step: int) -> dict[str, Any]:
    """Change of the rewards in the next iteration of the loop, with its optimizer state and learning rate."""
    components = build(cfg)
    states = role_states(components.roles, cfg.loop)
    if saved:
        restore(components, saved)
        for state in states.values():
            state.load(saved.part, saved.state["roles"][state.role])
    else:
        begin(components, cfg)
    prompts, rng = draws(components, cfg, step)
    steps, sampler = cfg.method.student_steps, cfg.method.student_sampler
    fixed = fixed_states(components.roles, prompts, rng, steps, components.latent_shape, sampler)
    progress = min(step, cfg.loop.steps - 1) / cfg.loop.steps
    factor = lr_factor(cfg.loop.lr_schedule, progress, states["student"].updates, cfg.loop.warmup)
    appliers = {role: _applier(state, factor) for role, state in states.items()}
    iterate = partial(apply_iteration, components.method, appliers, step, prompts, rng)
    change = realized_change(iterate, components.roles, fixed, partial(_scores, cfg, components, prompts))
    trained = {label for reward in cfg.rewards for label in labels_of(reward)}
    seen = [value for name, value in change.items() if name in trained]
    return {"change": sum(seen) / len(seen) if seen else None, "change_heldout": change[HELDOUT]}


def all_scorers(cfg: RunConfig) -> tuple[Reward, ...]:
    """All rewards of the Shapes world, whatever a row is trained on: three scorers and the checker's partial credit."""
    return (*scorers_of(cfg), *build_rewards([ShapesReward(kind="shapes_partial_credit")]))


def restore(components: Components, saved: checkpoint.Checkpoint) -> None:
    """Load networks, old policy and method state of a checkpoint (not the EMA)."""
    for role in ROLES:
        load_named(components.roles.parameters(role), saved.part(role), f"the {role}")
    components.roles.load_old_state(saved.part("old"))
    components.method.load(without_cost(saved.part("method")))


def begin(components: Components, cfg: RunConfig) -> None:
    """Load the weights that the training started from: the teacher's, or those of a first stage."""
    if cfg.loop.start_from:
        warm_start(
            cfg.loop.start_from, role_states(components.roles, cfg.loop), SINGLE_PROCESS, cfg.model_dump(mode="json")
        )


def draws(components: Components, cfg: RunConfig, step: int) -> tuple[PromptBatch, SampleRng]:
    """The prompts and the random draws of this step of the training."""
    prompts = components.stream.at(step)
    return prompts, SampleRng(cfg.loop.seed, step, prompts.index)


def _applier(state: RoleState, factor: float) -> Callable[[Update], object]:
    return lambda update: state.apply(update, factor)


def _scores(cfg: RunConfig, components: Components, prompts: PromptBatch, x0: Tensor) -> dict[str, Tensor]:
    rewards = all_scorers(cfg)
    scored = Scorer(components.codec, rewards)(x0, prompts)
    return {reward.name: own for reward, own in zip(rewards, scored, strict=True)}


def _with_method(cfg: RunConfig, method: MethodConfig) -> RunConfig:
    return RunConfig.model_validate(cfg.model_dump(mode="json") | {"method": method.model_dump(mode="json")})
