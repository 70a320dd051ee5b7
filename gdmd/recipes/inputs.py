"""Check that a resumed run has the inputs that it started with: prompts, base model, rewards and latents, by content."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.config.real_data import RealDataConfig
from gdmd.config.rewards import CompositeConfig, FunctionConfig
from gdmd.config.run import RewardConfig, RunConfig, ShapesModel
from gdmd.data.prompts import prompt_file, read_prompts
from gdmd.io import RunError, typed, weights_fingerprint
from gdmd.recipes.build_data import store_of
from gdmd.recipes.contents import lora_content
from gdmd.recipes.hub_revisions import KEY as COMMITS
from gdmd.recipes.hub_revisions import PINNED, hub_commits
from gdmd.recipes.objects import NOTHING_GIVEN, PYTHON, GivenObjects
from gdmd.recipes.run_folders import TARGETS, WEIGHTS
from gdmd.rewards.user_code import source_hash
from gdmd.rewards.weights import converted_folder, pretrained_weights
from gdmd.runs import checkpoint
from gdmd.runs.assets import asset_path
from gdmd.runs.inputs import Change, Input, changes_of, kind_of, record, recorded
from gdmd.runs.run_folder import Run, read_facts
from gdmd.runs.student_file import read_student_file, student_file

BASE = ("model.path", "model.teacher", "model.teacher_loras", "model.student", "model.student_lora")
"""The frozen networks whose weights the adapters modify: these fields, and what is in them."""
_log = logging.getLogger(__name__)


def check_inputs(
    cfg: RunConfig, run: Run, console: Console, *, accept: bool = False, given: GivenObjects = NOTHING_GIVEN
) -> None:
    """Record the inputs of a new run; for a resumed run, RunError if any changed, unless ``accept`` (then record that).

    Inputs that moved without a change of content are reported, and runs of older versions, which have no fingerprints.
    """
    inputs, before = inputs_of(cfg, given), recorded(run.path)
    _require_given(run, before or {}, inputs, given)
    steps = checkpoint.steps(run.checkpoints)
    old = before is None and bool(steps)
    if old:
        before = _places(run, inputs)
    changes = changes_of(before or {}, inputs)
    gone = [change for change in changes if change.now.missing]
    if gone or (changes and not accept):
        raise RunError(_refusal(run, changes, gone))
    if old:
        _say(
            console,
            f"note: {run.path} was started by a version of gdmd that recorded no fingerprints, so changes of its prompts, "
            "base model and rewards cannot be detected. They are recorded from now on",
        )
    moved = [
        field for field, one in inputs.items() if before and field in before and before[field]["given"] != one.given
    ]
    for field in moved:
        if field not in {change.field for change in changes}:
            _say(
                console,
                f"{field} moved from {before[field]['given']} to {inputs[field].given}; the content is the same",
            )
    for change in changes:
        _say(console, f"warning: accepted: {change}")
    if changes:  # they may be those of another base model
        run.teacher_images.unlink(missing_ok=True)
    record(run, inputs, changes, max(steps, default=0))


def check_start(cfg: RunConfig, *, accept: bool = False, given: GivenObjects = NOTHING_GIVEN) -> None:
    """RunError if loop.start_from names a run of another base model, which its adapters would not fit.

    A run of an open pipeline recorded its weights in memory, other runs the files.
    """
    if not cfg.loop.start_from or accept:
        return
    run, file = Path(cfg.loop.start_from), student_file(cfg.loop.start_from)
    theirs = recorded(run) if (run / "run.json").is_file() else None  # a copy may lack it
    theirs = read_student_file(file).metadata["inputs"] if file else theirs
    if not theirs:
        return
    in_memory = kind_of(theirs.get("model.path", {}).get("fingerprint")) == "weights" and given.pipeline is not None
    base = _opened(given) if in_memory else _base(cfg.model)
    own = {k: one for k, one in base.items() if k in theirs and ".".join(k.split(".")[:2]) in BASE}
    for change in changes_of(theirs, own):
        if change.known:
            raise RunError(
                f"loop.start_from={cfg.loop.start_from} was trained on another base model. {change}. Use the base model "
                "of that run, or accept the difference with --accept-changes (in Python train(accept_changes=True))"
            )


def on_base(
    cfg: RunConfig, run: Path, base: str | None, option: str, field: Literal["path", "student"] = "path"
) -> RunConfig:
    """The configuration of a run with its base model at ``base``, if that has moved (None: where the run recorded it).

    field: "student" for the model that the student starts as.
    ValueError that suggests ``option`` for a missing base model, and for a ``base`` whose content differs from what the
    run recorded. Warns if the recorded base model has changed since, and if the content cannot be compared.
    """
    from gdmd.models.loading import is_local

    assert isinstance(cfg.model, DiffusersModel)
    changes = {field: base, "revision" if field == "path" else "student_revision": None}
    model = cfg.model if base is None else cfg.model.model_copy(update=changes)
    try:
        is_local((model if field == "path" else model.start).location, f"model.{field}")
    except ValueError as error:
        raise ValueError(
            f"{error} If the base model of {run} has moved, give its new location with {option}."
        ) from error
    known = recorded(run) if (run / "run.json").is_file() else None  # a copy may lack it
    key = f"model.{field}"
    was = (known or {}).get(key)
    if was is None and base is not None:
        _log.warning("%s recorded no fingerprint of its base model, so it cannot be compared with %s", run, base)
    own = {key: _pipeline(model)[key]} if was else {}
    for change in changes_of({key: was or {}}, own):
        if base is not None and change.known:
            raise ValueError(
                f"{option}: the student of {run} was trained on another base model. {change}. Use a copy of that model"
            )
        _log.warning("the student of %s may not fit its base model. %s", run, change)
    return cfg.model_copy(update={"model": model})


def inputs_of(cfg: RunConfig, given: GivenObjects = NOTHING_GIVEN) -> dict[str, Input]:
    """All files, folders and Python objects that a run reads, by config field."""
    found: dict[str, Input] = {}
    if given.prompts is not None:
        content = f"sha256:{given.prompts.fingerprint()}"
        found["prompts"] = Input(f"{PYTHON}{len(given.prompts.prompts)} prompts", content)
    elif cfg.prompts.file is not None:
        found["prompts.file"] = _prompts(cfg.prompts.file, cfg.prompts.column)
    if given.pipeline is not None:
        found |= _opened(given)
    else:
        found |= _base(cfg.model)
    if isinstance(cfg.model, DiffusersModel) and cfg.needs_real and cfg.real_data is not None:
        found |= _latents(cfg.real_data, cfg.model)
    if cfg.method.rewarded:
        for path, reward in _rewards(cfg.rewards):
            found |= {f"{path}.{field}": one for field, one in _reward(reward).items()}
    return found


def _require_given(
    run: Run, before: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Input], given: GivenObjects
) -> None:
    """RunError for a run that was started with Python objects and is resumed without them."""
    started = {field for field, one in before.items() if str(one["given"]).startswith(PYTHON)}
    missing = sorted(
        field
        for field in started
        if field not in inputs
        or not inputs[field].given.startswith(PYTHON)
        or (field.endswith(".source") and inputs[field].given.removeprefix(PYTHON) not in given.functions)
    )
    if missing:
        names = ", ".join(f"{field} ({before[field]['given'].removeprefix(PYTHON)})" for field in missing)
        raise RunError(
            f"{run.path} was started from Python with objects that its folder does not hold: {names}. Resume it with the "
            "same DistillationTrainer(...).train(resume_from_checkpoint=True)"
        )


def _opened(given: GivenObjects) -> dict[str, Input]:
    """An open pipeline as the base model."""
    pipe = given.pipeline
    return {
        "model.path": Input(f"{PYTHON}{type(pipe).__name__}", given.pipeline_content),
        "model.path.settings": Input(type(pipe.scheduler).__name__, given.pipeline_settings),
    }


def _base(model: DiffusersModel | ShapesModel) -> dict[str, Input]:
    """The frozen networks that the student is trained from."""
    if isinstance(model, DiffusersModel):
        return _pipeline(model)
    given = {name: getattr(model, name) for name in ("teacher", "vae")}
    return {
        f"model.{name}": _local(path or "shipped", Path(path or asset_path(f"shapes_{name}")))
        for name, path in given.items()
    }


def _pipeline(model: DiffusersModel) -> dict[str, Input]:
    commits = {name: commit for name, _, commit in hub_commits(model).values()}
    found = {"model.path": _weights(model.path, commits.get(model.path), model.variant, model.location)}
    if student := model.student:
        own = _weights(student, commits.get(student), model.student_variant, model.start.location)
        found["model.student"] = own
    loras = {f"model.teacher_loras.{number}.path": lora for number, lora in enumerate(model.teacher_loras)}
    loras |= {"model.student_lora.path": model.student_lora} if model.student_lora else {}
    found |= {field: _lora(lora) for field, lora in loras.items()}
    if decoder := model.scoring_decoder:
        found["model.scoring_decoder"] = _weights(decoder, commits.get(decoder))
    return found


def _lora(lora: LoraFile) -> Input:
    if Path(lora.path).exists():
        return Input(lora.path, f"sha256:{lora_content(lora.path)}")
    pinned = lora.revision and PINNED.fullmatch(lora.revision)
    return Input(lora.path, f"commit:{lora.revision}" if pinned else None)


def _prompts(given: str, column: str | None) -> Input:
    """Fingerprint of the prompts and their metadata, independent of the file format."""
    if not prompt_file(given).exists():
        return Input(given, None, missing=True)
    return Input(given, f"sha256:{read_prompts(given, column).fingerprint()}")


def _latents(real: RealDataConfig, model: DiffusersModel) -> dict[str, Input]:
    """Fingerprint of the images and captions of stored latents; nothing if they are not computed yet."""
    if not Path(real.latents).exists():
        return {"real_data.latents": Input(real.latents, None, missing=True)}
    fingerprint = store_of(real, model).fingerprint()
    return {"real_data.latents": Input(real.latents, f"sha256:{fingerprint}")} if fingerprint else {}


def _rewards(rewards: tuple[RewardConfig, ...]) -> Iterator[tuple[str, Any]]:
    """Each single reward with its path in the configuration."""
    for number, reward in enumerate(rewards):
        if isinstance(reward, CompositeConfig):
            yield from ((f"rewards.{number}.parts.{k}.reward", part.reward) for k, part in enumerate(reward.parts))
        else:
            yield f"rewards.{number}", reward


def _reward(reward: Any) -> dict[str, Input]:
    """Local weights by content, hub ids by name and revision, functions by the file that defines them."""
    if isinstance(reward, FunctionConfig):
        return {"source": Input(f"{PYTHON}{reward.name}", f"sha256:{reward.source}" if reward.source else None)}
    given = {field: getattr(reward, field, None) for field in WEIGHTS}
    found = {field: _weights(value, getattr(reward, "revision", None)) for field, value in given.items() if value}
    if not given["path"] and _converted(reward.kind):
        found["path"] = _local("converted", converted_folder(reward.kind, None))
    if not given["asset"] and reward.kind.startswith("shapes_") and asset_path(reward.kind).is_file():
        found["asset"] = _local("shipped", asset_path(reward.kind))
    for field in TARGETS:
        if target := getattr(reward, field, None):
            found[field] = _source(target)
    return found


def _converted(kind: str) -> bool:
    try:
        return pretrained_weights(kind).converted
    except ValueError:  # not a pretrained reward
        return False


def _source(target: str) -> Input:
    """Fingerprint of a function's code, and of the modules of its folder that it imports."""
    try:
        return Input(target, f"sha256:{source_hash(target)}")
    except ValueError:  # building the reward reports the reason
        return Input(target, None)


def _weights(given: str, commit: str | None, variant: str | None = None, location: str | None = None) -> Input:
    """Fingerprint of a folder or file: its content; of a hub id: its commit, if known. location: default ``given``."""
    path = Path(location or given).expanduser()
    if path.exists():
        cached = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})/?$", os.path.abspath(path))
        return replace(_local(given, path, variant), commit=cached[1] if cached else None)
    return Input(given, f"commit:{commit}" if commit else None)


def _local(given: str, path: Path, variant: str | None = None) -> Input:
    if not path.exists():
        return Input(given, None, missing=True)
    return Input(given, f"sha256:{weights_fingerprint(path, variant)}")


def _places(run: Run, inputs: Mapping[str, Input]) -> dict[str, dict[str, Any]]:
    """Inputs of a run of an older version, which recorded only the commits of hub ids."""
    leaves = {field: _at(run.config, field) for field in inputs}
    facts = read_facts(run.path)
    since, commits = facts.get("started", "its start"), facts.get(COMMITS, {})
    return {
        field: {"given": given, "fingerprint": f"commit:{commits[given]}" if given in commits else None, "since": since}
        for field, given in leaves.items()
        if isinstance(given, str)
    }


def _at(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = config[int(key)] if isinstance(config, list) else (config or {}).get(key)
    return config


def _refusal(run: Run, changes: list[Change], gone: list[Change]) -> str:
    sure = any(change.known or change.now.missing for change in changes)
    reason = "its inputs changed" if sure else "whether its inputs are the same cannot be checked"
    lines = [f"{run.path} cannot be resumed as the same run: {reason}.", *map(str, changes)]
    if not sure:
        return "\n".join(
            [
                *lines,
                "Use the previous path or, if you know that the content is the same, add --accept-changes (in Python "
                "train(accept_changes=True)).",
            ]
        )
    shown = "run.json, the report and the model card show it."
    if any(one.now.given.startswith(PYTHON) for one in changes):
        accept = f" To continue with the new content, give train(accept_changes=True); {shown}"
        return "\n".join([*lines, "Restore what changed." + ("" if gone else accept)])
    overrides = " ".join(f"{one.field}=PATH" for one in changes)
    command = f"gdmd train --resume {typed(run.path)} {overrides}"
    advice = f"Restore what changed, or give the new path of the same content: {command}."
    accept = f" To continue with the new content, add --accept-changes (in Python train(accept_changes=True)); {shown}"
    return "\n".join([*lines, advice + ("" if gone else accept)])


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
