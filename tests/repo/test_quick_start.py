"""Help and config errors answer in a blink: they import neither torch nor any other library that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_rules import heavy_modules, run_and_list_imports


def test_import_gdmd_imports_nothing_heavy() -> None:
    code, modules, printed = run_and_list_imports(["-c", "import gdmd"])
    assert code == 0, printed
    assert "gdmd" in modules
    assert not heavy_modules(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code, modules, printed = run_and_list_imports(["-m", "gdmd", *arguments])
    assert code == 0, printed
    assert "gdmd.cli.app" in modules
    assert "Usage" in printed
    assert not heavy_modules(modules)


def test_an_unknown_recipe_is_one_clear_error_and_imports_nothing_heavy() -> None:
    code, modules, printed = run_and_list_imports(["-m", "gdmd", "train", "nosuch"])
    assert code == 2, printed
    assert "nosuch" in printed and "Traceback" not in printed
    assert not heavy_modules(modules)


def test_a_heavy_import_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "innocent.py").write_text("def late():\n    import torch\nlate()\n")
    code, modules, _ = run_and_list_imports(["-c", "import innocent"], tmp_path)
    assert code == 0
    assert heavy_modules(modules) == ["torch"]
