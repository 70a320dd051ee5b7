"""MkDocs hooks: the pages that are generated at build time.

``reference/configuration.md`` from the field descriptions of the configs, ``reference/cli.md`` from the commands,
``reference/api/*.md`` from the docstrings of the package, ``contributing.md`` from CONTRIBUTING.md. Nothing here
imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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
    pages: list[Any] = [{"types": "reference/api/types.md"}]
    pages += [{name.replace("/", "."): f"reference/api/{_page(name)}.md"} for name in _packages()]
    for section in config.nav or []:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if isinstance(entry, dict) and "API" in entry:
                entry["API"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "contributing.md": contributing(),
        "reference/configuration.md": configuration(),
        "reference/cli.md": cli(),
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


def contributing() -> str:
    """CONTRIBUTING.md with its links relative to docs/."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


# Configuration


def configuration() -> str:
    """Every field of a recipe, a sweep config and a source, with types, defaults and descriptions."""
    from gdmd.config import image_source, sweep
    from gdmd.config.run import RunConfig

    parts = [
        "# Configuration",
        "",
        "Every field of a recipe, from the descriptions in `gdmd/config`. Override a field with `KEY=VALUE`, for example "
        "`loop.steps=500`. `gdmd recipes NAME` prints the values of one recipe.",
        "",
        "[I] marks a value that the GDMD paper does not give and that is our inference.",
        "",
        "## Top level",
        "",
        *_described(RunConfig.model_json_schema()),
        "",
        "## Sweep configs",
        "",
        "The YAML file of [`gdmd sweep`](../guides/compare-methods.md).",
        "",
        *_described(_with_fields(sweep, "rows", "seeds", "base").model_json_schema(), "sweep"),
        "",
        "## Sources",
        "",
        "The settings of a [source](../guides/evaluate.md#sources), written as `,key=value`.",
        "",
        *_described(_with_fields(image_source, "where").model_json_schema(), "source"),
    ]
    return "\n".join(parts) + "\n"


def _with_fields(module: Any, *names: str) -> Any:
    """The config class of a module that has these fields."""
    classes = [one for one in vars(module).values() if set(names) <= set(getattr(one, "model_fields", ()))]
    return classes[0]


def _described(schema: Mapping[str, Any], name: str = "") -> list[str]:
    """The table of a config, then a section for each config in it."""
    lines = _table(schema)
    for path, definition in _sections(schema):
        kind = definition["properties"].get("kind", {})
        values = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
        place = f"{name}: {path}" if name else path
        title = f"`{place}`" + (f", `kind: {' | '.join(values)}`" if values else "")
        lines += ["", f"### {title}", "", _text(definition.get("description", "")), "", *_table(definition)]
    return lines


def _sections(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted path and definition of every section, in the order of the recipe, each definition once."""
    seen: set[str] = set()
    queue = [("", schema)]
    while queue:
        path, definition = queue.pop(0)
        if path:
            yield path, definition
        for name, field in definition.get("properties", {}).items():
            below = f"{path}.{name}" if path else name
            for reference in _references(field):
                if reference not in seen:
                    seen.add(reference)
                    queue.append((below + ("[]" if "items" in field else ""), schema["$defs"][reference]))


def _references(field: Any) -> Iterator[str]:
    if isinstance(field, Mapping):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key, value in field.items():
            if key not in ("discriminator", "default"):
                yield from _references(value)
    elif isinstance(field, list):
        for value in field:
            yield from _references(value)


def _table(definition: Mapping[str, Any]) -> list[str]:
    required = set(definition.get("required", ()))
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in definition["properties"].items():
        default = "required" if name in required else _default(field)
        lines.append(f"| `{name}` | {_cell(_type(field))} | {default} | {_text(field.get('description', ''))} |")
    return lines


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "$ref" in field:
        return "section"
    if field.get("type") == "array":
        inner = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return f"list of {_type(inner)}"
    low = [f">= {field['minimum']}"] if "minimum" in field else []
    low += [f"> {field['exclusiveMinimum']}"] if "exclusiveMinimum" in field else []
    high = [f"<= {field['maximum']}"] if field.get("maximum", 2**63) < 2**62 else []
    high += [f"< {field['exclusiveMaximum']}"] if "exclusiveMaximum" in field else []
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "true or false", "object": "mapping"}
    return " ".join([names.get(field.get("type", ""), field.get("type", "any")), *low, *high])


def _default(field: Mapping[str, Any]) -> str:
    """A default as YAML; "see below" for a section."""
    if "default" not in field:
        return ""
    value = field["default"]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and value or any(isinstance(one, dict) for one in nested):
        return "see below"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) or not value else f"`{value}`"


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
