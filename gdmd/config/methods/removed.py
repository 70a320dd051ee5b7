"""Options of GDMD that earlier versions had: what to write now."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

TILTED = "kind: gdmd_tilted, without score_target, weighting and student_target"
REMOVED = {
    "weighting": f"kind gdmd has the loss of the paper; softmax weights are {TILTED}",
    "student_target": "kind gdmd has an update per target, kind gdmd_tilted one mean target",
    "control": "use kind: gdmd_ablation with control constant, shuffled or indicator, or kind: gdmd_tilted_shuffled",
    "scored_guidances": "it did not improve GDMD; leave it out",
    "score_baseline": "it did not improve GDMD; leave it out",
    "score_target": "kind gdmd scores x0 - scored_step x grad; normalized is scored_step: 1, raw is scored_step: 1 "
    "with normalize: false, and real is not the target of the paper",
    "z_source": "kind gdmd takes Z from the gains of its steps, kind gdmd_tilted from the scores; leave it out",
    "z_decay": "the decay of Z is always 0.99; leave it out",
    "old_decay": "the EMA decay of kind gdmd is min(1e-3 step, 0.5); leave it out",
}
"""Key -> advice."""


def refuse_removed(given: Any, fields: Container[str]) -> Any:
    """ValueError for a removed key or value, with what to write now; everything else is passed on.

    fields: the keys that the chosen kind has.
    """
    if not isinstance(given, Mapping):
        return given
    if given.get("score_target") == "continuation":
        raise ValueError(f"score_target 'continuation' is a separate method now; write {TILTED}{_control(given)}")
    found = [f"{key} was removed: {advice}" for key, advice in REMOVED.items() if key in given and key not in fields]
    if found:
        raise ValueError("; ".join(found))
    return given


def _control(given: Mapping[str, Any]) -> str:
    return "; its shuffled control is kind: gdmd_tilted_shuffled" if given.get("control") == "shuffled" else ""
