"""MkDocs hooks: the pages that are generated at build time.

``reference/configuration.md`` from the field descriptions of the configs, ``reference/cli.md`` from the commands,
``reference/option-names.md`` from the table of names, ``reference/api/*.md`` from the docstrings of the package,
``contributing.md`` from CONTRIBUTING.md. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gdmd.config.option_names import option_table
from gdmd.config.reference import NESTED, REQUIRED, sections

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gdmd"
API = {
    "methods": "Methods: one algorithm per file",
    "losses": "Losses: pure functions, one file per paper",
    "diffusion": "Diffusion: schedules, samplers, guidance, random draws",
    "models": "Models: roles, LoRA, VAE and timesteps of diffusers pipelines",
    "models/families": "Model families: one file per diffusers family",
    "rewards": "Rewards",
    "data": "Data: prompts, text and latent caches",
    "training": "Training: the loop and what it needs",
    "shapes": "Shapes: the embedded text-to-image world",
    "reporting": "Reporting: statistics, distances, plots, tables",
}
"""Packages in the API reference and the title of each page; a package that does not exist is left out."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the empty navigation entry "API" with the pages of the packages that exist."""
    pages: list[Any] = [{"gdmd": "reference/api/gdmd.md"}, {"types": "reference/api/types.md"}]
    pages += [{name.replace("/", "."): f"reference/api/{_page(name)}.md"} for name in _packages()]
    for section in config.nav or []:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if isinstance(entry, dict) and "API" in entry:
                entry["API"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {
        "contributing.md": contributing(),
        "reference/configuration.md": configuration(),
        "reference/cli.md": cli(),
        "reference/option-names.md": option_table(),
        "reference/api/gdmd.md": public_api(),
        "reference/api/types.md": "# Types\n\n::: gdmd.types\n",
    }
    for name in _packages():
        modules = sorted(file.stem for file in (PACKAGE / name).glob("*.py") if not file.stem.startswith("_"))
        body = "\n".join(f"::: gdmd.{name.replace('/', '.')}.{module}\n" for module in modules)
        pages[f"reference/api/{_page(name)}.md"] = f"# {API[name]}\n\n{body}"
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def _packages() -> list[str]:
    return [name for name in API if (PACKAGE / name / "__init__.py").is_file()]


def _page(name: str) -> str:
    return name.replace("/", "-")


def public_api() -> str:
    """The names that `import gdmd` and `gdmd.rewards` offer, each with its docstring."""
    import gdmd
    from gdmd import rewards

    names = [f"gdmd.{module}.{name}" for name, module in gdmd.MODULES.items()]
    scorers = [f"gdmd.rewards.{module}.{name}" for name, module in rewards.MODULES.items()]
    parts = [
        "# Public API",
        "Everything here is imported from `gdmd` or `gdmd.rewards`, for example `from gdmd import DistillationTrainer`. "
        "These names change only with an entry in the release notes. The pure functions of the [losses](losses.md) and "
        "of [diffusion](diffusion.md) (schedules, samplers, guidance) are public under their modules. See also "
        "[Train from Python](../../guides/python.md) and the fields of "
        "[TrainingConfig](../configuration.md#trainingconfig).",
        *(f"::: {name}" for name in [*names, *scorers]),
    ]
    return "\n\n".join(parts) + "\n"


def contributing() -> str:
    """CONTRIBUTING.md with its links relative to docs/."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


# Configuration


def configuration() -> str:
    """Every field of a recipe, a sweep config and a source, with types, defaults and descriptions."""
    from gdmd.config import image_source, sweep
    from gdmd.config.run import RunConfig
    from gdmd.config.training_config import TrainingConfig

    parts = [
        "# Configuration",
        "",
        "Every field of a recipe, from the descriptions in `gdmd/config`. Override a field with `KEY=VALUE`, for example "
        "`loop.steps=500`. `gdmd recipes NAME` prints the values of one recipe, `gdmd recipes NAME --explain` also their "
        "descriptions.",
        "",
        "[I] marks a value that the GDMD paper does not give and that is our inference.",
        "",
        "## Top level",
        "",
        *_described(RunConfig),
        "",
        "## TrainingConfig",
        "",
        "The arguments of [`gdmd.TrainingConfig`](../guides/python.md), for Python.",
        "",
        *_described(TrainingConfig),
        "",
        "## Sweep configs",
        "",
        "The YAML file of [`gdmd sweep`](../guides/compare-methods.md).",
        "",
        *_described(_with_fields(sweep, "rows", "seeds", "base"), "sweep"),
        "",
        "## Sources",
        "",
        "The settings of a [source](../guides/evaluate.md#sources), written as `,key=value`.",
        "",
        *_described(_with_fields(image_source, "where"), "source"),
    ]
    return "\n".join(parts) + "\n"


def _with_fields(module: Any, *names: str) -> Any:
    """The config class of a module that has these fields."""
    classes = [one for one in vars(module).values() if set(names) <= set(getattr(one, "model_fields", ()))]
    return classes[0]


def _described(cls: type[BaseModel], name: str = "") -> list[str]:
    """The table of a config, then a section for each config in it."""
    lines: list[str] = []
    for section in sections(cls):
        if section.path:
            place = f"{name}: {section.path}" if name else section.path
            title = f"`{place}`" + (f", `kind: {' | '.join(section.kinds)}`" if section.kinds else "")
            lines += ["", f"### {title}", "", _text(section.description), ""]
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for row in section.rows:
            default = row.default if row.default in ("", REQUIRED, NESTED) else f"`{row.default}`"
            lines.append(f"| `{row.name}` | {_cell(row.type)} | {default} | {_text(row.description)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _text(text: str) -> str:
    """A description as one line of Markdown; code between backticks stays as it is."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _cell(part) for part in parts).replace("\n", " ")


# Commands


def cli() -> str:
    """Every command with its help, arguments and options."""
    from typer.main import get_command

    from gdmd.cli.app import app

    parts = [
        "# Commands",
        "",
        "Every command accepts `--help`. Exit codes: 0 done, 1 a run of a sweep failed, 2 wrong input, 3 a loss or gradient "
        "was not finite, 4 one of several ranks was lost, 130 Ctrl-C, 143 SIGTERM (a checkpoint is saved).",
    ]
    for path, command in _commands("gdmd", get_command(app)):
        parts += ["", f"## `{path}`", "", *_help(command.help or ""), "", *_parameters(command)]
    return "\n".join(parts) + "\n"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if not below:
        yield path, command
        return
    for name, inner in below.items():
        yield from _commands(f"{path} {name}", inner)


def _help(text: str) -> list[str]:
    r"""Paragraphs as text; a block that is set off by \b (examples) as a fenced block without its indentation."""
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", text.split("\f")[0]):
        if "\b" in block:
            first, *rest = [line.rstrip() for line in block.replace("\b", "").strip("\n").splitlines()]
            shown = ["```text", *(line.removeprefix("  ") for line in rest), "```", ""] if rest else []
            lines += [_text(first), "", *shown]
        elif block.strip():
            lines += [_text(block), ""]
    return lines


def _parameters(command: Any) -> list[str]:
    lines = ["| argument or option | default | |", "|---|---|---|"]
    for one in command.params:
        if "--help" in one.opts:
            continue
        names = (
            [*one.opts, *one.secondary_opts] if one.param_type_name == "option" else [one.metavar or one.name.upper()]
        )
        default = one.default if isinstance(one.default, (int, float, str, Path)) and one.default != "" else None
        shown = (
            "required"
            if one.required
            else ""
            if default is None or default is False
            else f"`{str(default).lower() if default is True else default}`"
        )
        described = _text(getattr(one, "help", "") or "")
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {shown} | {described} |")
    return lines if len(lines) > 2 else []
