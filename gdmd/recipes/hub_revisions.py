"""The commits at which a run reads its hub ids: reported if not pinned, kept in run.json, compared on resume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from gdmd.config.model import DiffusersModel
from gdmd.runs.run_folder import Run, read_facts, write_facts

KEY = "hub_commits"
"""Key in run.json."""
PINNED = re.compile(r"[0-9a-f]{40}")
"""A commit; branches and tags can move."""


def record_commits(model: DiffusersModel, run: Run, console: Console, cache: Path | None = None) -> None:
    """Store the commits in run.json, and report those that are not pinned. ``check_inputs`` rejects a moved branch."""
    found = hub_commits(model, cache)
    if not found:
        return
    facts = read_facts(run.path)
    before: Mapping[str, str] = facts.get(KEY, {})
    for field, (name, revision, commit) in found.items():
        if revision is None or not PINNED.fullmatch(revision):
            note = f"{name} is not pinned to a commit; {field}={commit} reproduces this run"
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    known = {**before, **{name: commit for name, _, commit in found.values()}}
    if known != before:
        write_facts(run.path, facts | {KEY: known})


def hub_commits(model: DiffusersModel, cache: Path | None = None) -> dict[str, tuple[str, str | None, str]]:
    """(hub id, given revision, commit in the hub's cache) by the field that pins it. Without the network."""
    from huggingface_hub import try_to_load_from_cache

    asked = {
        "model.revision": (model.location, model.revision, "model_index.json"),
        "model.student_revision": (model.student and model.start.location, model.student_revision, "model_index.json"),
        "model.scoring_decoder_revision": (model.scoring_decoder, model.scoring_decoder_revision, "config.json"),
    }
    found = {}
    for field, (name, revision, file) in asked.items():
        if name is None or Path(name).is_dir():
            continue
        place = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if isinstance(place, str):  # CACHE/models--ORG--NAME/snapshots/COMMIT/FILE
            found[field] = (name, revision, Path(place).parent.name)
    return found
