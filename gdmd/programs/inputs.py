"""Is a run resumed with what it was started with? Its prompts, base model, rewards and latents, compared by content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeReward
from gdmd.config.run import RewardConfig, RunConfig
from gdmd.data.prompts import prompt_file
from gdmd.data.real_latents import INDEX
from gdmd.io import RunError, typed, weights_fingerprint
from gdmd.programs.folders import WEIGHTS
from gdmd.programs.hub_pins import hub_commits
from gdmd.recipes.real_data import store_of
from gdmd.rewards.callable import source_hash
from gdmd.rewards.sources import converted_folder, published
from gdmd.runs import checkpoint
from gdmd.runs.assets import asset_path
from gdmd.runs.inputs import Change, Input, changes_of, record, recorded
from gdmd.runs.rundir import Run, read_facts

BASE = ("model.path", "model.teacher")
"""The frozen teacher that a student is a change of."""


def settle_inputs(cfg: RunConfig, run: Run, console: Console, *, accept: bool = False) -> None:
    """Record the inputs of a new run; of a resumed one, refuse those that changed (RunError) or record that with ``accept``.

    A place that changed while the content stayed is noted. A run of an older version has no fingerprints: it says so once.
    """
    inputs, before = inputs_of(cfg), recorded(run)
    steps = checkpoint.steps(run.checkpoints)
    if before is None and steps:
        before = _unchecked(run, inputs, console)
    changes = changes_of(before or {}, inputs)
    gone = [change for change in changes if change.now.missing]
    if gone or (changes and not accept):
        raise RunError(_refusal(run, changes, gone))
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
    record(run, inputs, changes, max(steps, default=0))


def check_start(cfg: RunConfig, *, accept: bool = False) -> None:
    """RunError where loop.start_from names a run of another base model: its adapters are changes of that one."""
    if not cfg.loop.start_from or accept:
        return
    theirs = read_facts(Path(cfg.loop.start_from)).get("inputs", {})
    own = {field: one for field, one in inputs_of(cfg).items() if field in BASE and field in theirs}
    for change in changes_of(theirs, own):
        if _kind(change.was.get("fingerprint")) == _kind(change.now.fingerprint):
            raise RunError(
                f"loop.start_from={cfg.loop.start_from} was trained on another base model. {change}. Give the base model "
                "of that run, or accept the difference with --accept-changes"
            )


def inputs_of(cfg: RunConfig) -> dict[str, Input]:
    """Every file and folder that the run of a recipe reads, by its field."""
    found: dict[str, Input] = {}
    if cfg.prompts.file is not None:
        found["prompts.file"] = _local(cfg.prompts.file, prompt_file(cfg.prompts.file))
    model = cfg.model
    if isinstance(model, DiffusersModel):
        found |= _pipeline(model)
        if cfg.needs_real and cfg.real_data is not None:
            found["real_data.latents"] = _local(cfg.real_data.latents, store_of(cfg.real_data, model).folder / INDEX)
    else:
        for name in ("teacher", "vae"):
            given = getattr(model, name)
            found[f"model.{name}"] = _local(given or "shipped", Path(given or asset_path(f"shapes_{name}")))
    if cfg.method.rewarded:
        for place, reward in _rewards(cfg.rewards):
            found |= {f"{place}.{field}": one for field, one in _reward(reward).items()}
    return found


def _pipeline(model: DiffusersModel) -> dict[str, Input]:
    commits = {name: commit for name, _, commit in hub_commits(model).values()}
    found = {"model.path": _weights(model.path, commits.get(model.path), model.variant)}
    if decoder := model.scoring_decoder:
        found["model.scoring_decoder"] = _weights(decoder, commits.get(decoder))
    return found


def _rewards(rewards: tuple[RewardConfig, ...]) -> Iterator[tuple[str, Any]]:
    """Each single reward with its place in the configuration."""
    for number, reward in enumerate(rewards):
        if isinstance(reward, CompositeReward):
            yield from ((f"rewards.{number}.parts.{k}.reward", part.reward) for k, part in enumerate(reward.parts))
        else:
            yield f"rewards.{number}", reward


def _reward(reward: Any) -> dict[str, Input]:
    """Local weights by content, hub ids by name and revision, functions by the file that defines them."""
    given = {field: getattr(reward, field, None) for field in WEIGHTS}
    found = {field: _weights(value, getattr(reward, "revision", None)) for field, value in given.items() if value}
    if not given["path"] and _converted(reward.kind):
        found["path"] = _local("converted", converted_folder(reward.kind, None))
    if not given["asset"] and reward.kind.startswith("shapes_") and asset_path(reward.kind).is_file():
        found["asset"] = _local("shipped", asset_path(reward.kind))
    for field in ("target", "reader"):
        if target := getattr(reward, field, None):
            found[field] = _source(target)
    return found


def _converted(kind: str) -> bool:
    try:
        return published(kind).converted
    except ValueError:  # a function, a server, Shapes
        return False


def _source(target: str) -> Input:
    """A function, by its code and the modules of its folder that it imports."""
    try:
        return Input(target, f"sha256:{source_hash(target)}")
    except ValueError:  # loading the reward says what is wrong
        return Input(target, None)


def _weights(given: str, commit: str | None, variant: str | None = None) -> Input:
    """Of a folder or file its content; of a hub id its commit, where that is known."""
    path = Path(given).expanduser()
    if path.exists():
        return _local(given, path, variant)
    return Input(given, f"commit:{commit}" if commit else None)


def _local(given: str, path: Path, variant: str | None = None) -> Input:
    if not path.exists():
        return Input(given, None, missing=True)
    return Input(given, f"sha256:{weights_fingerprint(path, variant)}")


def _unchecked(run: Run, inputs: Mapping[str, Input], console: Console) -> dict[str, dict[str, Any]]:
    """The places in the configuration of a run whose version recorded no content."""
    _say(
        console,
        f"note: {run.path} was started by a version that recorded no fingerprints: whether its prompts, base model and "
        "rewards have changed since cannot be checked. They are recorded from now on",
    )
    leaves = {field: _at(run.config, field) for field in inputs}
    since = read_facts(run.path).get("started", "its start")
    return {
        field: {"given": given, "fingerprint": None, "since": since}
        for field, given in leaves.items()
        if isinstance(given, str)
    }


def _at(config: Any, field: str) -> Any:
    for key in field.split("."):
        config = config[int(key)] if isinstance(config, list) else (config or {}).get(key)
    return config


def _refusal(run: Run, changes: list[Change], gone: list[Change]) -> str:
    lines = [f"{run.path} cannot be resumed as the same run: its inputs changed.", *map(str, changes)]
    places = " ".join(f"{one.field}=PLACE" for one in changes if not one.field.endswith(("target", "reader")))
    elsewhere = (
        f", or give the place of the same content: gdmd train --resume {typed(run.path)} {places}" if places else ""
    )
    advice = f"Restore what changed{elsewhere}."
    accept = " To continue with the new content, add --accept-changes; run.json, the report and the model card show it."
    return "\n".join([*lines, advice + ("" if gone else accept)])


def _kind(fingerprint: str | None) -> str:
    return (fingerprint or "unknown").partition(":")[0]


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
