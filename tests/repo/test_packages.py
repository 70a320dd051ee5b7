"""Wheel and sdist: what they hold, and whether an installed wheel works outside of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from gdmd import __version__

pytest.importorskip("hatchling")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, folder: Path, path: str = "") -> str:
    """Run a command in a folder, with ``path`` as PYTHONPATH, and return its stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, target: Path, kind: str) -> Path:
    """The wheel or sdist of a source tree."""
    command = (sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target)
    run(*command, folder=source, path=os.environ.get("PYTHONPATH", ""))
    (found,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def contents(wheel: Path) -> dict[str, int]:
    """Name -> CRC of every file in a wheel."""
    with ZipFile(wheel) as archive:
        return {one.filename: one.CRC for one in archive.infolist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """The wheel includes recipes, templates, text files, networks and small pipelines."""
    files = [file.relative_to(ROOT) for file in (ROOT / "gdmd").rglob("*") if file.is_file()]
    shipped = {file.as_posix() for file in files if "__pycache__" not in file.parts}
    assert shipped <= contents(wheel).keys()
    assert {Path(name).suffix for name in shipped} >= {".py", ".typed", ".yaml", ".safetensors", ".jinja", ".txt"}


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """The wheel runs with the dependencies of this environment, but without its copy of gdmd."""
    where = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", where, wheel)
    run(sys.executable, *pip, folder=tmp_path)
    program = where / "bin" / "gdmd"
    assert run(program, "--version", folder=tmp_path, path=str(where)) == f"gdmd {__version__}\n"
    assert "shapes_smoke" in run(program, "recipes", folder=tmp_path, path=str(where))
    code = "import gdmd, gdmd.runs.assets as a; a.load_asset(a.asset_path('shapes_vae')); print(gdmd.__file__)"
    assert str(where) in run(sys.executable, "-c", code, folder=tmp_path, path=str(where))


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    run("tar", "-xf", build(ROOT, tmp_path / "sdist", "sdist"), folder=tmp_path)  # tarfile's filters need Python 3.11.4
    again = build(tmp_path / f"gdmd-{__version__}", tmp_path / "again", "wheel")
    assert contents(again) == contents(wheel)


def test_one_version() -> None:
    """The package, its metadata and its citation have the same version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == str(citation["version"]) == __version__
    assert project["urls"]["Paper"] == citation["preferred-citation"]["url"]
