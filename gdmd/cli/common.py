"""What the commands share: option types, the console for people (stderr), and JSON for machines (stdout)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdmd.io import finite_or_none
from gdmd.training.rank import rank_info

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

    return Console(stderr=True, quiet=not rank_info().is_main)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what was not measured (NaN) is null, so that every reader can parse it."""
    print(json.dumps(finite_or_none(value), indent=2, allow_nan=False))
