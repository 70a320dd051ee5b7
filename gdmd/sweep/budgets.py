"""How many outer iterations a budget is: the pace of a recipe is probed by hooks, once for all its seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdmd.config.run import RunConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.io import read_json, write_atomic
from gdmd.methods.pass_counter import Counted, Pace, measure_pace
from gdmd.recipes.build import Components, build
from gdmd.runs.run_folder import config_hash
from gdmd.shapes.roles import ShapesRoles

PROBED = 6
"""Iterations of a probe, spread over the training so that stages of a method are seen: the roll-out's length varies
from batch to batch by about 2 % of an iteration."""
STAGES = 0.015
"""About twice what two probes of one pace differ by; a method with stages differs by more over another length."""
CLOSER = 24
"""Iterations of the second probe of a method with stages: a stage's share of the training is met to a 48th."""


def counted(components: Components) -> Counted:
    """The method of a lab with its cost counted by hooks on the four denoisers."""
    return Counted(components.method, networks(components.roles))


def networks(roles: ShapesRoles) -> list[Any]:
    """The networks behind the roles."""
    return [roles.student.net, roles.fake.net, roles.teacher.net, roles.old.net]


def iterations(job: Mapping[str, Any], probes: Path) -> int:
    """The outer iterations of a student cell.

    updates: the fewest with at least the asked student updates. passes: the number whose expected passes come nearest
    to those of the reference row under the budget of updates. A method whose stages differ in cost has another pace
    over that number of iterations, and is probed over them once more, at more places.
    """
    own = pace_of(job["recipe"], job["student_updates"], probes)
    if job["passes_of"] is None:
        return own.steps_for_updates(job["student_updates"])
    reference = pace_of(job["passes_of"], job["student_updates"], probes)
    passes = reference.passes * reference.steps_for_updates(job["student_updates"])
    steps = own.steps_for_passes(passes)
    there = pace_of(job["recipe"], round(steps * own.updates), probes, CLOSER)
    return there.steps_for_passes(passes) if abs(there.passes / own.passes - 1) > STAGES else steps


def pace_of(recipe: Mapping[str, Any], updates: int, probes: Path, count: int = PROBED) -> Pace:
    """The pace of a recipe, from the file of an earlier probe where there is one."""
    tree = {key: recipe[key] for key in ("model", "method", "rewards", "prompts", "loop")}
    tree |= {"name": "probe", "loop": {**tree["loop"], "seed": 0}}
    path = probes / f"{config_hash({**tree, 'updates': updates, 'count': count})[:16]}.json"
    if path.exists():
        return Pace(**read_json(path, "Delete it, and the recipe is probed again."))
    pace = probe(RunConfig.model_validate(tree), updates, count)
    probes.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"passes": pace.passes, "updates": pace.updates}), "the probe", option="--out")
    return pace


def probe(cfg: RunConfig, updates: int, count: int) -> Pace:
    """Passes and student updates per iteration: one iteration to learn the updates, then ``count`` over the training."""
    components = build(cfg)
    first = measure_pace(counted(components), [_batch(components, cfg, 0)])
    steps = first.steps_for_updates(updates)
    components = build(cfg)
    return measure_pace(counted(components), (_batch(components, cfg, place) for place in places(steps, count)))


def places(steps: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of a training, as iterations."""
    return [int((k + 0.5) * steps / count) for k in range(count)]


def _batch(components: Components, cfg: RunConfig, step: int) -> Any:
    prompts = components.stream.at(step)
    return step, prompts, SampleRng(cfg.loop.seed, step, prompts.index)
