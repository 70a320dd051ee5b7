"""How to install optional dependencies: gdmd is installed from a checkout, not from a package index."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, with the folder to run it in if that is not the current one."""
    command = f"pip install -e '.[{extra}]'"
    if not (ROOT / "pyproject.toml").is_file():
        return f"{command} in a checkout of gdmd"
    return command if Path.cwd() == ROOT else f"{command} in {ROOT}"
