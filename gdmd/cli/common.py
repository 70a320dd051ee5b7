"""What the commands share: option types, the console for people (stderr), and JSON for machines (stdout)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdmd.runs.seat import seat

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout; messages go to stderr.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="The run folder; default: below ./runs.")]

Which = Annotated[
    str, typer.Option("--checkpoint", metavar="best|last|STEP", help="Which checkpoint of a run; default: its newest.")
]


def messages() -> Console:
    """Where people read: stderr, so that stdout is free for results. Among several ranks only rank 0 speaks."""
    from rich.console import Console

    return Console(stderr=True, quiet=not seat().first)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what was not measured (NaN) is null, so that every reader can parse it."""
    print(json.dumps(_without_nan(value), indent=2, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
