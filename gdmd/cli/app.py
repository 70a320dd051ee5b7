"""The ``gdmd`` program: arguments -> recipe -> call. Nothing here imports torch before it is needed."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gdmd.cli import evaluate, export, info, latents, profile, sweep, train
from gdmd.cli.common import SETTINGS, unknown_option
from gdmd.cli.plan import plan_command
from gdmd.cli.rewards import rewards_app
from gdmd.cli.study import study_app
from gdmd.training.rank import rank_info

START, TRAIN, USE, EVALUATE, MAINTAIN = "Start", "Train", "Use a student", "Evaluate and compare", "Maintain"
"""Groups of commands in --help, in this order."""


class Grouped(TyperGroup):
    """Lists the commands by the groups that ``rich_help_panel`` names; typer does so only in rich mode.

    Reports Ctrl-C, which typer turns into a silent exit with code 130.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; finished checkpoints and images are kept", file=sys.stderr)
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for title in (START, TRAIN, USE, EVALUATE, MAINTAIN):
            found = {name: one for name, one in self.commands.items() if one.rich_help_panel == title}
            with formatter.section(title):
                limit = formatter.width - 6 - width
                formatter.write_dl([(name.ljust(width), one.get_short_help_str(limit)) for name, one in found.items()])


app = typer.Typer(
    cls=Grouped,
    name="gdmd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _add(group: str, name: str, function: Callable[..., None], short_help: str) -> None:
    app.command(name, short_help=short_help, rich_help_panel=group)(function)


_add(START, "demo", train.demo_command, "Distill two Shapes students and compare them (5 minutes).")
_add(START, "recipes", info.recipes_command, "List the recipes, print one, or explain its fields.")
_add(START, "plan", plan_command, "Estimate memory and speed before loading a model.")
_add(START, "doctor", info.doctor_command, "Check the installation.")
_add(TRAIN, "train", train.train_command, "Train a recipe.")
_add(TRAIN, "latents", latents.latents_command, "Encode the real images of a recipe once, for DMD2.")
_add(TRAIN, "profile", profile.profile_command, "Measure the speed of a recipe on this machine.")
_add(TRAIN, "report", evaluate.report_command, "Write report.html of a run.")
_add(USE, "sample", evaluate.sample_command, "Generate images from prompts.")
_add(USE, "export", export.export_command, "Export a student for diffusers and ComfyUI.")
app.add_typer(
    evaluate.eval_app,
    name="eval",
    short_help="Measure models: ShapesEval, reward scores, GenEval.",
    rich_help_panel=EVALUATE,
)
_add(EVALUATE, "sweep", sweep.sweep_command, "Compare training methods across seeds and budgets.")
app.add_typer(study_app, name="study", rich_help_panel=EVALUATE)
app.add_typer(rewards_app, name="rewards", rich_help_panel=MAINTAIN)
_add(MAINTAIN, "pretrain", info.pretrain_command, "Train the networks of the Shapes world again.")

OUT_OF_MEMORY = (
    "For a training, `gdmd plan RECIPE [KEY=VALUE]... --gpu GIB --fit` finds settings that fit into GIB of memory; for "
    "other commands, generate or score fewer images at a time. Finished checkpoints and images are kept."
)
BAD_INPUT, NOT_FINITE, RANK_LOST, INTERRUPTED = 2, 3, 4, 130
_PIPELINES = (
    *("stable_diffusion.pipeline_stable_diffusion", "stable_diffusion_xl.pipeline_stable_diffusion_xl"),
    *("stable_diffusion_3.pipeline_stable_diffusion_3", "flux.pipeline_flux"),
)
FILTERED_LOGGERS = (
    *("transformers.utils.import_utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base"),
    *(
        "diffusers.pipelines.pipeline_utils",
        "torchao",
        "torch.utils._pytree",
        "diffusers.quantizers.torchao.torchao_quantizer",
    ),
    *("transformers.tokenization_utils_base", *(f"diffusers.pipelines.{name}" for name in _PIPELINES)),
)
"""Library loggers whose expected warnings are dropped (``_should_log``)."""


def _version(asked: bool) -> None:
    if asked:
        from gdmd._version import __version__

        print(f"gdmd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distill text-to-image models to a few steps with reward-guided distribution matching (arXiv 2604.19009).

    \b
    Examples:
      gdmd demo                            distill two 4-step students of Shapes
      gdmd train shapes method.gamma=0.5   train a recipe with one field changed
      gdmd sample runs/shapes-seed0 --prompt "a red circle and a blue ring"

    \b
    Exit codes: 0 done, 2 bad input, 3 a loss or gradient was not finite,
    4 a rank hung or was lost, 130 Ctrl-C, 143 SIGTERM.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit. A user's mistake is reported on stderr, without a traceback."""
    for name in FILTERED_LOGGERS:
        logging.getLogger(name).addFilter(_should_log)
    ours = logging.getLogger("gdmd")
    if not any(isinstance(handler, NoteHandler) for handler in ours.handlers):
        ours.addHandler(NoteHandler())
    try:
        given = [_expand_home(one) for one in (sys.argv[1:] if arguments is None else arguments)]
        code = app(args=given, prog_name="gdmd", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        sys.exit(_show_usage_error(error))
    except ValueError as error:
        report(error)
        sys.exit(exit_code(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: torch may not be loaded
            raise
        print(f"error: {str(error).splitlines()[0]} {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _expand_home(argument: str) -> str:
    """Expand ~/FOLDER and --option=~/FOLDER: shells do not expand the second, notebooks expand neither."""
    found = re.fullmatch(r"(--[\w-]+=)?(~/.*)", argument, re.DOTALL)
    return (found[1] or "") + os.path.expanduser(found[2]) if found else argument


class NoteHandler(logging.Handler):
    """Warnings of the package on stderr, one line each, from rank 0 only."""

    def emit(self, record: logging.LogRecord) -> None:
        if _is_main():
            print(f"note: {record.getMessage()}", file=sys.stderr)


def _show_usage_error(error: Any) -> int:
    """Print what is wrong with the arguments, or the help if there are none; return the exit code."""
    error.message = error.message.replace("Value error, ", "")  # typer repeats pydantic's label of a ValueError
    if isinstance(option := getattr(error, "option_name", None), str):
        meant = unknown_option(option, error.ctx)
        error.message += meant
        error.possibilities = [] if meant else error.possibilities
    error.show()
    return int(error.exit_code)


def _should_log(record: logging.LogRecord) -> bool:
    """False for warnings about expected conditions.

    These are: image processors that want torchvision (loaded with a pipeline, but not used); a LoRA without layers for
    the text encoders (one that changes no layer at all is an error elsewhere); truncated prompts (gdmd reports them once);
    a merged pipeline saved without a component that the run left out, such as T5; what torchao says about kernels of other
    GPUs, about torch's next release, and about fp32.
    """
    text = record.getMessage()
    absent = text.startswith("self.") and text.endswith("=None of type <class 'NoneType'> cannot be saved.")
    expected = ("No LoRA keys associated to", "Token indices sequence length", "The following part of your input was")
    torchao = text.startswith(("Failed to load", "Unable to import `torchao`", "You are trying to set torch_dtype"))
    torchao |= "register_constant() on Enum" in text
    return not (torchao or "requires torchvision" in text or text.startswith(expected) or absent)


def report(error: ValueError) -> None:
    """Print an error on stderr; one that every rank has is printed by rank 0 only."""
    known = _is(error, "gdmd.training.role_state", "NonFiniteError")
    if _is(error, "gdmd.training.distributed", "OtherRankError") or (known and not _is_main()):
        return
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def exit_code(error: ValueError) -> int:
    """The exit code for an error."""
    if _is(error, "gdmd.training.role_state", "NonFiniteError"):
        return NOT_FINITE
    return RANK_LOST if _is(error, "gdmd.training.distributed", "RanksError") else BAD_INPUT


def _is_main() -> bool:
    try:
        return rank_info().is_main
    except ValueError:  # the rank's environment variables are what is wrong
        return True


def _is(error: ValueError, module: str, name: str) -> bool:
    """isinstance without importing the class's module, which needs torch: an instance implies that it is loaded."""
    found = sys.modules.get(module)
    return found is not None and isinstance(error, getattr(found, name))
