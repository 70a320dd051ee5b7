"""Fingerprints of the files a run reads: kept in run.json, compared when the run is resumed. No torch here.

"inputs":  {"prompts.file": {"given": "p.txt", "fingerprint": "sha256:...", "since": "2026-01-31T12:00:00+0000"}, ...}
"changes": [{"at": ..., "step": ..., "input": "prompts.file", "was": {...}, "now": {...}}]   those that were accepted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdmd.runs.run_folder import Run, now, read_facts, write_facts

INPUTS, CHANGES = "inputs", "changes"


@dataclass(frozen=True)
class Input:
    """A file or folder that a run reads. ``fingerprint``: of its content, with its kind; None = unknown here.

    ``commit``: that of a folder in the hub's cache, which equals the hub id at that commit.
    """

    given: str
    fingerprint: str | None
    missing: bool = False
    commit: str | None = None


@dataclass(frozen=True)
class Change:
    """An input whose content has changed since the run started, or may have."""

    field: str
    was: Mapping[str, Any]
    now: Input

    def __str__(self) -> str:
        before, since = self.was.get("fingerprint"), self.was.get("since", "its start")
        moved = "" if self.was["given"] == self.now.given else f" (was {self.was['given']})"
        if self.now.missing:
            return f"{self.field}: {self.now.given} is missing; the run has used {_short(before)} since {since}"
        if before is None:
            return f"{self.field}: {self.now.given}{moved}: the run recorded no fingerprint to compare its content with"
        if not self.known:
            return (
                f"{self.field}: {self.now.given}{moved} cannot be compared with what the run has used since {since}, "
                f"{_short(before)}: its fingerprint is {_short(self.now.fingerprint)}"
            )
        return (
            f"{self.field}: {self.now.given}{moved} has different content, {_short(self.now.fingerprint)}; the run has "
            f"used {_short(before)} since {since}"
        )

    @property
    def known(self) -> bool:
        """Whether both fingerprints exist and are of one kind, so that a difference means different content."""
        before, now = self.was.get("fingerprint"), self.now.fingerprint
        return before is not None and now is not None and kind_of(before) == kind_of(now)


def recorded(run: Path) -> dict[str, dict[str, Any]] | None:
    """The inputs in run.json of a run folder; None for a run of an older version."""
    found = read_facts(run).get(INPUTS)
    return dict(found) if isinstance(found, dict) else None


def changes_of(before: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Input]) -> list[Change]:
    """The inputs whose content differs from the record; if it is unknown, another path counts as different."""
    found = []
    for field, current in inputs.items():
        was = before.get(field)
        if was is None:
            continue
        if (
            current.fingerprint is None
            and current.given == was["given"]
            and str(was.get("fingerprint")).startswith("sha256:")
        ):
            current = replace(current, missing=True)  # a hub id that is not cached looks the same
        if was.get("fingerprint") is not None and current.fingerprint is not None:
            same = was["fingerprint"] in (current.fingerprint, f"commit:{current.commit}")
        else:
            same = was["given"] == current.given
        if current.missing or not same:
            found.append(Change(field, was, current))
    return found


def record(run: Run, inputs: Mapping[str, Input], accepted: list[Change], step: int) -> None:
    """Write the inputs, and the changes that the user accepted, into run.json."""
    facts = read_facts(run.path)
    before: Mapping[str, Mapping[str, Any]] = facts.get(INPUTS, {})
    rows = dict(before)  # an input that cannot be read now keeps its record
    for field, current in inputs.items():
        was = before.get(field, {})
        fingerprint = current.fingerprint or was.get("fingerprint")
        since = was["since"] if was and was.get("fingerprint") == fingerprint else now()
        rows[field] = {"given": current.given, "fingerprint": fingerprint, "since": since}
    changes = [
        {"at": now(), "step": step, "input": one.field, "was": dict(one.was), "now": rows[one.field]}
        for one in accepted
    ]
    updated = facts | {INPUTS: rows}
    if changes:
        updated[CHANGES] = [*facts.get(CHANGES, []), *changes]
    if updated != facts:
        write_facts(run.path, updated)


def last_change(run: Path) -> int:
    """The number of finished steps at the last change that was accepted; -1 without one."""
    return max((int(one["step"]) for one in read_facts(run).get(CHANGES, ())), default=-1)


def change_lines(facts: Mapping[str, Any]) -> list[str]:
    """The accepted changes of a run for a report or card, in order."""
    return [
        f"{one['input']} changed at step {one['step']}: {one['was']['given']} ({_short(one['was'].get('fingerprint'))}) -> "
        f"{one['now']['given']} ({_short(one['now'].get('fingerprint'))})"
        for one in facts.get(CHANGES, ())
    ]


def input_lines(facts: Mapping[str, Any]) -> list[str]:
    """The inputs of a run for a report."""
    return [
        f"{field}: {one['given']} ({one.get('fingerprint') or 'unknown'})"
        for field, one in facts.get(INPUTS, {}).items()
    ]


def kind_of(fingerprint: str | None) -> str:
    """The kind of a fingerprint: "sha256" of content, "commit" of the hub, or "unknown"."""
    return (fingerprint or "unknown").partition(":")[0]


def _short(fingerprint: str | None) -> str:
    kind, colon, digits = (fingerprint or "unknown").partition(":")
    return kind + colon + digits[:12]
