"""Rules of the project that neither ruff nor import-linter (`make lint`) checks."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "diffusers", "transformers", "matplotlib", "tensorboard", "scipy"}
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def _keep_loggers() -> Iterator[None]:
    """import-linter configures logging, which disables every logger that exists."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = {one: one.disabled for one in loggers}
    yield
    for one, disabled in before.items():
        one.disabled = disabled


def imported_by(arguments: list[str]) -> tuple[int, str, set[str]]:
    """Run Python with the arguments -> (exit code, what it printed, top-level packages it imported)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    names = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    rest = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, "\n".join([done.stdout, *rest]), names


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["-c", "import gdmd"], 0, ""),
        (["-m", "gdmd", "--help"], 0, "Usage"),
        (["-m", "gdmd", "train", "--help"], 0, "Usage"),
        (["-m", "gdmd", "train", "nosuch"], 2, "nosuch"),
    ],
)
def test_help_and_config_errors_import_nothing_heavy(arguments: list[str], code: int, expected: str) -> None:
    found, printed, names = imported_by(arguments)
    assert found == code and expected in printed and "Traceback" not in printed, printed
    assert "gdmd" in names and not names & HEAVY


def test_imports_keep_the_contract() -> None:
    """The levels, no circles, configuration without torch: `[tool.importlinter]` in pyproject.toml."""
    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_an_upward_import_inside_a_function_breaks_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract sees function-level imports."""
    for folder in ("high", "low"):
        (tmp_path / "house" / folder).mkdir(parents=True)
        (tmp_path / "house" / folder / "__init__.py").touch()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "low" / "late.py").write_text("def late():\n    from house import high\n")
    config = '[tool.importlinter]\nroot_package = "house"\n[[tool.importlinter.contracts]]\nname = "levels"\n'
    (tmp_path / "pyproject.toml").write_text(
        config + 'type = "layers"\nlayers = ["high", "low"]\ncontainers = ["house"]\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lint_imports(str(tmp_path / "pyproject.toml"), no_cache=True) == 1


def test_no_unsafe_load_and_no_nan_made_a_number() -> None:
    """Method calls and keyword arguments that ruff's banned API does not see."""
    unsafe = re.compile(r"nan_to_num|weights_only\s*=\s*False|allow_pickle\s*=\s*True|^\s*(import|from) pickle", re.M)
    assert [str(file) for file in (ROOT / "gdmd").rglob("*.py") if unsafe.search(file.read_text("utf-8"))] == []


def test_shipped_assets_weigh_at_most_20_megabytes() -> None:
    files = [file for file in (ROOT / "gdmd" / "assets").rglob("*") if file.suffix in (".safetensors", ".json")]
    assert 0 < sum(file.stat().st_size for file in files) <= 20 * MEGABYTE


def test_nothing_says_to_install_from_a_package_index_where_gdmd_is_not() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "gdmd").rglob("*.py")]
    assert [str(file) for file in files if re.search(r"pip install '?gdmd", file.read_text("utf-8"))] == []
