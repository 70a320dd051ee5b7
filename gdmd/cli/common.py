"""What the commands share: option types, messages for people (stderr) and JSON for machines (stdout)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gdmd.io import finite_or_none
from gdmd.training.rank import rank_info

if TYPE_CHECKING:
    from rich.console import Console

    from gdmd.config.run import RunConfig

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Of typer, for the program and every group of commands."""

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)
"""Where ``print_json`` writes; None = sys.stdout."""


@contextmanager
def _results_only() -> Iterator[None]:
    """Send what libraries and the user's own code print to stderr; ``print_json`` still writes to stdout."""
    token = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(token)


def _json_given(context: typer.Context, json: bool) -> bool:
    if json:
        context.with_resource(_results_only())
    return json


Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON to stdout; messages go to stderr.", callback=_json_given),
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="The run folder; default: a new one in ./runs.")]
Arguments = Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="Recipe and overrides.")]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="best|last|STEP", help="Which checkpoint of a run; last is the newest.")
]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="[NAME=]WHERE[,key=value ...], as in gdmd sample.")]
ImagesPerPrompt = Annotated[int, typer.Option("--images", "-n", min=1, max=4096, help="Images per prompt.")]
NoiseSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")]


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", text):
        raise typer.BadParameter(f"{text!r} is not a device; write cpu, cuda, cuda:1 or mps")
    return text


Device = Annotated[
    str | None,
    typer.Option(
        "--device", parser=_device, metavar="cpu|cuda|cuda:N|mps", help="Device; default: the GPU if there is one."
    ),
]


def messages() -> Console:
    """The console for people: stderr, so that stdout is free for results. Only rank 0 prints."""
    from rich.console import Console

    return Console(stderr=True, quiet=not rank_info().is_main)


def log(text: str) -> None:
    """Print a message to ``messages``, as it is."""
    messages().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout; NaN (not measured) becomes null, so that every parser can read it."""
    print(json.dumps(finite_or_none(value), indent=2, allow_nan=False), file=_RESULTS.get())


def recipe_of(arguments: Sequence[str]) -> RunConfig:
    """The recipe that comes first, with the KEY=VALUE overrides that follow."""
    from gdmd.recipes.read import read_recipe

    if "=" in arguments[0]:
        raise ValueError(f"name a recipe before {arguments[0]!r}; `gdmd recipes` lists them")
    return read_recipe(arguments[0], arguments[1:])


def unknown_option(option: str, context: Any) -> str:
    """What to add to the error about an unknown option of a command that takes a recipe, such as --learning_rate."""
    names = {parameter.name for parameter in context.command.params} if context else ()
    if not {"arguments", "overrides", "override"} & set(names):
        return ""
    from gdmd.config.fields import all_paths
    from gdmd.config.names import similar_fields
    from gdmd.config.run import RunConfig

    path = option.lstrip("-").replace("-", "_")
    fields = list(all_paths(RunConfig, None))
    meant = f"; did you mean {path}?" if path in fields else similar_fields(path, (), fields)
    if not re.search("called|did you mean", meant):
        return meant
    return f"{meant.rstrip('?')}; write fields as KEY=VALUE, without dashes"
