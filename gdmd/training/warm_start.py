"""Start from the student and fake score of another run or of a file (loop.start_from); find a run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.io import near_name
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import open_run
from gdmd.runs.student_file import origin_of, part, read_student_file, student_file
from gdmd.training.distributed import DistributedContext
from gdmd.training.ema import load_named
from gdmd.training.role_state import RoleState
from gdmd.types import Role, Roles

HEAD = "gan_head."
"""Prefix of a GAN head's parameters, which the other run may not have: a head always starts fresh."""


def newest(checkpoints: Path, context: DistributedContext) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of a folder: rank 0 finds it, the others read the same one."""
    found: list[checkpoint.Checkpoint | None] = []

    def find() -> str | None:
        found.append(checkpoint.load_newest(checkpoints))
        return str(found[0].path) if found[0] else None

    path = context.on_main(find)
    return found[0] if found else checkpoint.load(Path(path), verify=False) if path else None


def require_start(run: str) -> None:
    """ValueError unless loop.start_from names a run with a checkpoint or a student file."""
    if file := student_file(run):
        read_student_file(file)
        return
    if not run or checkpoint.steps(Path(run) / "checkpoints"):
        return
    what = "has no checkpoint" if Path(run).is_dir() else "does not exist"
    above = next((folder for folder in list(Path(run).parents)[:2] if checkpoint.steps(folder / "checkpoints")), None)
    near = f" Did you mean {above}?" if above else "" if Path(run).is_dir() else near_name(run)
    raise ValueError(f"loop.start_from: the run folder {run} {what}; give one that `gdmd train` has written.{near}")


def check_model(run: str, config: Mapping[str, Any]) -> None:
    """ValueError if the configuration of loop.start_from stores its roles differently; reads no weights."""
    if not run:
        return
    there = _config_of(run) if student_file(run) else open_run(Path(run)).config
    theirs, own = there.get("model", {}), config["model"]
    other = theirs.get("kind") != own["kind"]
    keys = ("kind",) if other else ("full",) if own.get("full") == "both" else ("full", "lora_rank")
    pairs = {key: (theirs.get(key, own.get(key)), own.get(key)) for key in keys}
    pairs |= {key: (_start(theirs)[key], new) for key, new in _start(own).items() if own.get("full") != "both"}
    wrong = [f"model.{key} is {old!r} there and {new!r} here" for key, (old, new) in pairs.items() if old != new]
    if wrong:
        raise ValueError(
            f"loop.start_from: the networks of {run} do not fit this run: {', '.join(wrong)}. Use the values of that run, "
            "or start from another one"
        )


def _start(model: Mapping[str, Any]) -> dict[str, Any]:
    """What adapters modify, without file locations, which may differ."""
    lora = model.get("student_lora")
    return {
        "student": "a pipeline" if model.get("student") else None,
        "student_lora": lora and f"a LoRA of weight {lora['weight']}",
        "teacher_loras": [f"a LoRA of weight {one['weight']}" for one in model.get("teacher_loras") or ()],
        "fake_from": model.get("fake_from", "teacher"),
    }


def check_roles(run: str, roles: Roles) -> None:
    """ValueError unless student and fake score of that run have the tensors of ``roles``; reads a run's headers only."""
    if file := student_file(run):
        asset = read_student_file(file)
        return _compare(run, lambda role: {name: tuple(one.shape) for name, one in part(asset, role).items()}, roles)
    for step in reversed(checkpoint.steps(Path(run) / "checkpoints") if run else []):
        try:
            folder = Path(run) / "checkpoints" / f"step_{step:06d}"
            return _compare(run, partial(checkpoint.shapes, folder), roles)
        except checkpoint.DamagedCheckpoint:  # reported where it is loaded
            continue


def _compare(run: str, shapes: Callable[[str], Mapping[str, tuple[int, ...]]], roles: Roles) -> None:
    both: tuple[Role, Role] = ("student", "fake")
    for role in both:
        own = {name: tuple(w.shape) for name, w in roles.parameters(role).items() if not name.startswith(HEAD)}
        theirs = {k: shape for k, shape in shapes(role).items() if not k.startswith(HEAD)}
        wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        if wrong:
            raise ValueError(
                f"loop.start_from: the {role} of {run} belongs to another network: {len(wrong)} of its "
                f"{len(own.keys() | theirs.keys())} tensors differ in name or size, first {wrong[0]}. Start from a run of "
                "the same family, model size and model.lora_targets"
            )


def warm_start(
    run: str, states: Mapping[Role, RoleState], context: DistributedContext, config: Mapping[str, Any]
) -> str:
    """Load student (its EMA if there is one) and fake score of another run or file; returns the message for the user.

    ``config``: of the new run. If its adapters have another lora_alpha than the other run's, B is scaled so that they
    change the base model equally; if that one is a folder with only checkpoints, its lora_alpha is taken as equal.
    Optimizers, counters and schedule start fresh; the EMA starts at these weights. ValueError if the networks differ.
    """
    require_start(run)
    before = _config_of(run)
    factor = _scale(before) / _scale(config) if before else 1.0  # unknown: taken as equal
    tensors, messages = _networks(run, context)
    for role, state in states.items():
        own = {name: weights for name, weights in state.parameters.items() if not name.startswith(HEAD)}
        theirs = {
            name: weights * factor if factor != 1 and ".lora_B." in name else weights
            for name, weights in tensors[role].items()
            if not name.startswith(HEAD)
        }
        load_named(own, theirs, f"the {role} of loop.start_from = {run}", context)
        if state.ema is not None:
            _copy(state.ema.shadow, own)
    return "\n".join([*messages, *_notes(before, config)])


def _networks(run: str, context: DistributedContext) -> tuple[Mapping[Role, Mapping[str, Tensor]], list[str]]:
    """The tensors of student and fake score, and what to tell the user about them."""
    if file := student_file(run):
        asset = read_student_file(file)
        message = f"student (EMA) and fake score start from {run}, {origin_of(asset)}"
        return {"student": part(asset, "student"), "fake": part(asset, "fake")}, [message]
    saved = newest(Path(run) / "checkpoints", context)
    assert saved is not None
    averaged = saved.part("ema")
    message = f"student{' (EMA)' if averaged else ''} and fake score start from step {saved.step} of {run}"
    return {"student": averaged or saved.part("student"), "fake": saved.part("fake")}, [*saved.messages, message]


def _config_of(run: str) -> Mapping[str, Any]:
    """The configuration of a run or student file; empty for a folder that holds only checkpoints."""
    if file := student_file(run):
        config: Mapping[str, Any] = read_student_file(file).metadata["config"]
        return config
    return open_run(Path(run)).config if (Path(run) / "config.yaml").is_file() else {}


def _scale(config: Mapping[str, Any]) -> float:
    """alpha / rank of the adapters; 1 for networks without them."""
    model = config.get("model", {})
    return model["lora_alpha"] / model["lora_rank"] if "lora_alpha" in model else 1.0


def _notes(before: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Differences that are allowed, although they change the student or its images."""
    model = ("lora_alpha", "path", "dtype", "quantization", "embedded_guidance", "max_tokens", "t5")
    method = ("student_steps", "student_sampler")
    keys = (*(("model", key) for key in model), *(("method", key) for key in method))
    notes = []
    for section, key in keys:
        if key == "lora_alpha" and config.get("model", {}).get("full") == "both":  # no adapters
            continue
        old, new = (one.get(section, {}).get(key) for one in (before, config))
        if before and old is not None and old != new:
            more = ", so B is scaled to keep the student" if key == "lora_alpha" else ""
            notes.append(f"{section}.{key} was {old} there and is {new} here{more}")
    seed = before.get("loop", {}).get("seed")
    if seed is not None and seed == config.get("loop", {}).get("seed"):
        notes.append(f"loop.seed is {seed} there, too: this run repeats its prompts and noise; give another one")
    return notes


@torch.no_grad()
def _copy(shadow: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, average in shadow.items():
        average.copy_(weights[name])
