"""The table of option names, and the descriptions of fields in the docs and in ``gdmd recipes NAME --explain``."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.main import get_command

from gdmd.cli.app import app
from gdmd.config.fields import all_paths
from gdmd.config.load import ConfigError
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.option_names import OPTION_NAMES, OptionName, option_named
from gdmd.config.reference import explained, sections
from gdmd.config.run import RunConfig
from gdmd.recipes.read import read_recipe, recipe_names

HOOKS = Path(__file__).resolve().parents[2] / "tools" / "docs" / "hooks.py"
FIELDS = set(all_paths(RunConfig, None))


@pytest.mark.parametrize("row", OPTION_NAMES, ids=lambda row: row.elsewhere.split()[0])
def test_option_name_leads_to_a_field_or_an_option(row: OptionName) -> None:
    assert row.here or row.note
    assert set(row.fields) <= FIELDS
    if row.is_command:
        _, name, option, *_ = shlex.split(row.here)
        command: Any = get_command(app)
        assert option in {one for parameter in command.commands[name].params for one in parameter.opts}


def test_option_names_are_found_as_users_write_them() -> None:
    names = [name for row in OPTION_NAMES for name in row.elsewhere.split()]
    assert len(set(names)) == len(names)
    assert option_named("--Learning-Rate") == option_named("lr") != None  # noqa: E711
    assert option_named("nosuch") is None


def values(cfg: BaseModel, path: str = "") -> dict[str, Any]:
    """Path -> value of every field that is not a section."""
    found: dict[str, Any] = {}
    for name, value in cfg:
        inner = list(enumerate(value)) if isinstance(value, tuple) else []
        if isinstance(value, BaseModel):
            found |= values(value, f"{path}{name}.")
        elif inner and isinstance(inner[0][1], BaseModel):
            for k, one in inner:
                found |= values(one, f"{path}{name}.{k}.")
        else:
            found[path + name] = value
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_explanation_has_every_field_in_80_columns(name: str) -> None:
    cfg = read_recipe(name)
    lines = list(explained(cfg))
    assert max(map(len, lines)) <= 80
    assert {line[2:].split("=")[0] for line in lines if re.match(r"[* ] [\w.]+=", line)} == values(cfg).keys()


def test_page_and_explanation_have_the_same_rows() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", HOOKS)
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = " ".join(re.sub(r"[`\\]", "", hooks.configuration()).replace("&lt;", "<").split())
    text = " ".join(" ".join(explained(read_recipe("shapes"))).split())
    (loop,) = [section for section in sections(RunConfig) if section.path == "loop"]
    for row in loop.rows:
        plain = " ".join(row.description.split())
        assert f"| {row.name} | {row.type} | {row.default} | {plain.replace('`', '')} |" in page
        assert f"{row.type}; default {row.default} {plain}" in text


@pytest.mark.parametrize(("given", "steps"), [(4, (1.0, 0.75, 0.5, 0.25)), (1, (1.0,)), ([1.0, 0.4], (1.0, 0.4))])
def test_student_steps_as_a_number(given: Any, steps: tuple[float, ...]) -> None:
    assert GDMDConfig(student_steps=given).student_steps == steps


@pytest.mark.parametrize("given", [0, -1, True, 2.0, 10**9])
def test_wrong_number_of_student_steps(given: Any) -> None:
    with pytest.raises(ConfigError):
        GDMDConfig(student_steps=given)
