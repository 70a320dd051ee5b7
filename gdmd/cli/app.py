"""The ``gdmd`` program: words -> recipe -> call. Nothing here imports torch before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gdmd.cli import bench, compare, export, lab, results, training
from gdmd.cli.geneval import eval_app
from gdmd.cli.rewards import rewards_app
from gdmd.cli.study import study_app

app = typer.Typer(
    name="gdmd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("train")(training.train_command)
app.command("demo")(training.demo_command)
app.command("compare")(compare.compare_command)
app.add_typer(eval_app, name="eval")
app.command("sample")(results.sample_command)
app.command("report")(results.report_command)
app.command("export")(export.export_command)
app.command("recipes")(lab.recipes_command)
app.command("bench")(bench.bench_command)
app.command("doctor")(lab.doctor_command)
app.command("pretrain")(lab.pretrain_command)
app.add_typer(rewards_app, name="rewards")
app.add_typer(study_app, name="study")

BAD_INPUT, NOT_FINITE, INTERRUPTED = 2, 3, 130


def _version(asked: bool) -> None:
    if asked:
        from gdmd import __version__

        print(f"gdmd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Few-step text-to-image students by distribution matching and gradient-based rewards (arXiv 2604.19009).

    \b
    Examples:
      gdmd demo                              distil a 4-step student on the Shapes lab, with a table and a report
      gdmd train shapes method.gamma=0.5     train a recipe, one field overridden
      gdmd sample runs/shapes-seed0 --prompt "a red circle and a blue ring"

    \b
    Exit codes: 0 done, 2 bad input, 3 a loss or gradient was not finite, 130 Ctrl-C, 143 SIGTERM.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit; what the user can mend is one clear message on stderr, without a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="gdmd")
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(NOT_FINITE if _not_finite(error) else BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _not_finite(error: ValueError) -> bool:
    """Whether training stopped on bad numbers. Asked without importing torch: if it was, the module is there."""
    state = sys.modules.get("gdmd.training.state")
    return state is not None and isinstance(error, state.NonFiniteError)
