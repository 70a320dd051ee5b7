"""The ``gdmd`` program: words -> recipe -> call. Nothing here imports torch before it is needed."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gdmd.cli import evaluate, export, info, latents, profile, sweep, train
from gdmd.cli.geneval import eval_app
from gdmd.cli.plan import plan_command
from gdmd.cli.rewards import rewards_app
from gdmd.cli.study import study_app
from gdmd.training.rank import rank_info

app = typer.Typer(
    name="gdmd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("train")(train.train_command)
app.command("plan")(plan_command)
app.command("latents")(latents.latents_command)
app.command("demo")(train.demo_command)
app.command("sweep")(sweep.sweep_command)
app.add_typer(eval_app, name="eval")
app.command("sample")(evaluate.sample_command)
app.command("report")(evaluate.report_command)
app.command("export")(export.export_command)
app.command("recipes")(info.recipes_command)
app.command("profile")(profile.profile_command)
app.command("doctor")(info.doctor_command)
app.command("pretrain")(info.pretrain_command)
app.add_typer(rewards_app, name="rewards")
app.add_typer(study_app, name="study")

BAD_INPUT, NOT_FINITE, RANK_LOST, INTERRUPTED = 2, 3, 4, 130
_PIPELINES = (
    *("stable_diffusion.pipeline_stable_diffusion", "stable_diffusion_xl.pipeline_stable_diffusion_xl"),
    *("stable_diffusion_3.pipeline_stable_diffusion_3", "flux.pipeline_flux"),
)
QUIETER = (
    *("transformers.utils.import_utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base"),
    "diffusers.pipelines.pipeline_utils",
    *("transformers.tokenization_utils_base", *(f"diffusers.pipelines.{name}" for name in _PIPELINES)),
)
"""Loggers of libraries that are asked for the warnings worth saying only."""


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
      gdmd demo                            distill two 4-step students of Shapes
      gdmd train shapes method.gamma=0.5   train a recipe, one field overridden
      gdmd sample runs/shapes-seed0 --prompt "a red circle and a blue ring"

    \b
    Exit codes: 0 done, 2 bad input, 3 a loss or gradient was not finite,
    4 one of several ranks hung or was lost, 130 Ctrl-C, 143 SIGTERM.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit; what the user can mend is one clear message on stderr, without a traceback."""
    for name in QUIETER:
        logging.getLogger(name).addFilter(_worth_saying)
    ours = logging.getLogger("gdmd")
    if not any(isinstance(handler, Notes) for handler in ours.handlers):
        ours.addHandler(Notes())
    try:
        words = [_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        code = app(args=words, prog_name="gdmd", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        sys.exit(_misused(error))
    except ValueError as error:
        report(error)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _home(word: str) -> str:
    """~/FOLDER and --option=~/FOLDER below the home folder: shells leave the second, and notebooks both, as they are."""
    found = re.fullmatch(r"(--[\w-]+=)?(~/.*)", word, re.DOTALL)
    return (found[1] or "") + os.path.expanduser(found[2]) if found else word


class Notes(logging.Handler):
    """Warnings of the package on stderr, one line each; among several ranks only rank 0 speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        if _first():
            print(f"note: {record.getMessage()}", file=sys.stderr)


def _misused(error: Any) -> int:
    """Print what is wrong with the arguments, or the help if there were none; return the exit code."""
    error.message = error.message.replace("Value error, ", "")  # typer repeats pydantic's label of a ValueError
    error.show()
    return int(error.exit_code)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not what is so by design.

    That image processors want torchvision: diffusers loads them with a pipeline, and nothing here uses them. That a
    LoRA of the denoiser holds nothing for the text encoders (one that changes no layer is refused elsewhere). That a
    prompt is cut off: gdmd counts these prompts, once. That a merged pipeline is saved without a component that the run
    left out, such as T5.
    """
    said = record.getMessage()
    absent = said.startswith("self.") and said.endswith("=None of type <class 'NoneType'> cannot be saved.")
    beginnings = ("No LoRA keys associated to", "Token indices sequence length", "The following part of your input was")
    return not ("requires torchvision" in said or said.startswith(beginnings) or absent)


def report(error: ValueError) -> None:
    """Print it on stderr. What all ranks know is said by rank 0 alone."""
    known = _is(error, "gdmd.training.role_state", "NonFiniteError")
    if _is(error, "gdmd.training.distributed", "OtherRankError") or (known and not _first()):
        return
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def exit_code(error: ValueError) -> int:
    """What the program exits with after this error."""
    if _is(error, "gdmd.training.role_state", "NonFiniteError"):
        return NOT_FINITE
    return RANK_LOST if _is(error, "gdmd.training.distributed", "RanksError") else BAD_INPUT


def _first() -> bool:
    try:
        return rank_info().is_main
    except ValueError:  # the seat itself is what is wrong
        return True


def _is(error: ValueError, module: str, name: str) -> bool:
    """Whether it is of a class that is known only with torch. If it is, the module is there and is not imported."""
    found = sys.modules.get(module)
    return found is not None and isinstance(error, getattr(found, name))
