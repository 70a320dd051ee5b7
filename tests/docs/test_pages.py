"""README and docs: every command parses, every YAML block is a valid config, every relative link resolves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from typer.main import get_command

from gdmd.cli.app import app
from gdmd.config.image_source import read_source
from gdmd.config.run import RewardConfig, RunConfig
from gdmd.config.sweep import SweepConfig
from gdmd.recipes.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = re.compile(r"reference/(cli|configuration|option-names|api/[\w.-]+)\.md|contributing\.md")
"""Pages that tools/docs/hooks.py makes; ``make docs`` checks the links to them."""
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
WITH_RECIPE = ("train", "plan", "latents", "profile")


def named(path: Path) -> str:
    """The page's path inside the repository."""
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands() -> Iterator[tuple[str, str]]:
    """Page and command of every line of the sh blocks, continued lines joined."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield named(page), " ".join(line.split("  #")[0].split())


def parsed(words: list[str]) -> tuple[str, list[str], dict[str, Any]]:
    """Full name, positional arguments and parameters of a gdmd command; click's error if it does not parse."""
    command: Any = get_command(app)
    path: list[str] = []
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"there is no command {' '.join(['gdmd', *path, name])}"
        command = command.commands[name]
        path.append(name)
    given = command.make_context(path[-1], list(words)).params
    named = [given[one.name] for one in command.params if one.param_type_name == "argument"]
    flat = [[value] if isinstance(value, str) else value for value in named if isinstance(value, str | list | tuple)]
    return " ".join(path), [value for values in flat for value in values], given


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_command_parses(page: str, line: str) -> None:
    """The recipe, its overrides and the sources that a command names are read, too."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        assert words[1] in TARGETS
    if words[0] in ("sbatch", "python"):
        assert (ROOT / words[1]).is_file()
    if words[0] != "gdmd":
        assert words[0] in ("make", "sbatch", "python", "pip", "hf", ".ci/run")
        return
    if len(words) == 2 and words[1] in ("demo", "doctor"):
        return
    name, arguments, given = parsed(words[1:])
    missing = any(word.startswith("model.path=pretrained/") for word in arguments)  # test_laptop.py trains it first
    if name in WITH_RECIPE and not given.get("resume") and not arguments[0].endswith(".yaml") and not missing:
        assert isinstance(read_recipe(arguments[0], arguments[1:]), RunConfig)
    if name in ("eval compare", "eval preference", "sample"):
        for source in arguments:
            assert read_source(source)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_inline_commands_exist(page: Path) -> None:
    """`gdmd NAME` within a sentence or a table names a command."""
    if page.name in ("LOG.md", "shapes.md"):  # history, and pages that a sweep wrote
        return
    known: Any = get_command(app)
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for code in re.findall(r"`gdmd ([a-z]+)", text):
        assert code in known.commands, f"gdmd {code}"


@pytest.mark.parametrize(("page", "text"), [(named(page), text) for page in PAGES for text in blocks(page, "yaml")])
def test_yaml_block_is_valid(page: str, text: str) -> None:
    """A sweep config, or sections of a recipe."""
    given = yaml.safe_load(text)
    if "rows" in given:
        assert SweepConfig.model_validate(given)
    for reward in given.get("rewards", ()):
        assert TypeAdapter(RewardConfig).validate_python(reward)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    """Relative links and images name files of the repository, anchors name headings."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if GENERATED.search(target.as_posix()):
            continue
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in slugs(target), f"{named(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_blocks_are_fenced(page: Path) -> None:
    """No indented code blocks: a paragraph that starts with four spaces (and is not in a list or an admonition)."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    text = re.sub(r"^!!! .*\n(?:    .*\n|\n)*", "", text, flags=re.M)
    assert not re.search(r"(?:\A|\n)\n    (?:gdmd|python|pip|make|curl) ", text)


def test_every_page_is_in_the_navigation() -> None:
    """Pages that a sweep wrote are left out; results.md links them."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs") and not page.is_relative_to(ROOT / "docs" / "results"):
            assert str(page.relative_to(ROOT / "docs")) in navigation


def test_pages_named_in_the_code_exist() -> None:
    for file in [*(ROOT / "gdmd").rglob("*.py"), *(ROOT / "gdmd").rglob("*.yaml")]:
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{named(file)}: {page}"
