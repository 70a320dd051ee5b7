"""Checkers of the house rules: each takes source text (or a command) and returns its violations as sentences."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gdmd"

LEVELS = {
    name: level
    for level, names in enumerate(
        (
            "types config io hub",
            "losses diffusion runs",
            "methods models rewards data training reporting",
            "shapes export",
            "recipes",
            "sources sweep plan profiling",
            "evaluation study",
            "programs",
            "cli",
            "__main__",
        )
    )
    for name in names.split()
}
INPUT_OUTPUT = {"io", "os", "pathlib", "shutil", "tempfile", "socket", "subprocess", "sqlite3", "urllib", "http"}
SHIPPED = {".safetensors", ".json"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> dict[str, str]:
    """Path relative to the repository -> text, of every Python file in the folders that exist."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def module_of(path: str) -> str:
    """gdmd/losses/dmd.py -> gdmd.losses.dmd; a package is called by its own name."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: str, text: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, only for the type checker) of everything a file imports.

    ``from a import b`` counts as a.b; a relative import is resolved; importlib.import_module("a.b") counts too.
    """
    tree = ast.parse(text)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        for name in _names(node, package):
            yield node.lineno, name, id(node) in typing_only  # type: ignore[attr-defined]


def _names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        stem = ".".join(part for part in (base, node.module) if part)
        return [f"{stem}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def layer_violations(path: str, text: str) -> list[str]:
    """Imports that do not go strictly down; a package sees itself, and Protocols may name lower nouns in hints."""
    own = _package(module_of(path))
    if own is None:  # gdmd/__init__.py
        return [f"{path}:{line}: gdmd itself imports {name}" for line, name, _ in imported(path, text)]
    if own not in LEVELS:
        return [f"{path}: the package '{own}' has no level; add it to LEVELS"]
    found = []
    for line, name, typing_only in imported(path, text):
        other = _package(name) if name.split(".")[0] == "gdmd" else None
        if other is None or other == own or other.startswith("__version") or (own == "types" and typing_only):
            continue
        if other not in LEVELS or LEVELS[other] >= LEVELS[own]:
            found.append(f"{path}:{line}: {own} (level {LEVELS[own]}) imports {name} (level {LEVELS.get(other, '?')})")
    return found


def _package(module: str) -> str | None:
    """The part below gdmd: gdmd.losses.dmd -> losses; None for gdmd itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def distributed_violations(path: str, text: str) -> list[str]:
    """torch.distributed anywhere but in training/distributed.py."""
    if path == "gdmd/training/distributed.py":
        return []
    found = [f"{path}:{line}: imports {name}" for line, name, _ in imported(path, text) if _is_distributed(name)]
    dotted = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return found + [
        f"{path}:{node.lineno}: uses torch.distributed" for node in dotted if _is_distributed(ast.unparse(node))
    ]


def _is_distributed(name: str) -> bool:
    return re.match(r"torch\.(distributed|nn\.parallel)\b", name) is not None


def pure_violations(path: str, text: str) -> list[str]:
    """Level 1: no third-party import but torch, no nn.Module, no input or output."""
    found = []
    for line, name, _ in imported(path, text):
        root = name.split(".")[0]
        if root in INPUT_OUTPUT or (root not in ("torch", "gdmd") and root not in sys.stdlib_module_names):
            found.append(f"{path}:{line}: imports {name}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[-1] == "Module" for base in node.bases):
            found.append(f"{path}:{node.lineno}: {node.name} is an nn.Module")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "open",
            "print",
            "input",
            "torch.save",
            "torch.load",
        ):
            found.append(f"{path}:{node.lineno}: calls {ast.unparse(node.func)}()")
    return found


def torch_violations(path: str, text: str) -> list[str]:
    """Level 0 imports no torch at run time, not even inside a function."""
    heavy = [(line, name) for line, name, typing_only in imported(path, text) if not typing_only]
    return [f"{path}:{line}: imports {name}" for line, name in heavy if name.split(".")[0] in ("torch", "numpy")]


def safety_violations(path: str, text: str) -> list[str]:
    """Pickle in any form, and NaN made into a number."""
    found = [f"{path}:{line}: imports {n}" for line, n, _ in imported(path, text) if PICKLES & set(n.split("."))]
    for node in ast.walk(ast.parse(text)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("torch.load", "torch.save") and not _converts(path, node):
            found.append(f"{path}:{node.lineno}: calls {called}, which pickles; use safetensors")  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).split(".")[-1].startswith("nan_to_num"):
            found.append(f"{path}:{node.lineno}: nan_to_num")
        if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in _UNSAFE_KEYWORDS:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    names = [n for _, n, _ in imported(path, text) if n in ("torch.load", "torch.save", "torch.nan_to_num")]
    return found + [f"{path}: imports {name}" for name in names]


def _converts(path: str, node: ast.AST) -> bool:
    """The one place that reads third-party .pt files, as tensors only, to write safetensors."""
    safe = isinstance(node, ast.Call) and any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
    return path == "gdmd/rewards/convert.py" and safe


_UNSAFE_KEYWORDS = {("weights_only", "False"), ("allow_pickle", "True")}


def docstring_violations(path: str, text: str) -> list[str]:
    """Public functions and classes of a file without a docstring."""
    return [
        f"{path}:{node.lineno}: {node.name} has no docstring"
        for node in ast.parse(text).body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]


def weight_violations(folder: Path, limit: int) -> list[str]:
    """A folder whose shipped files (those of SHIPPED) weigh more than ``limit`` bytes together."""
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in SHIPPED)
    return [f"{folder.name} weighs {total} bytes, at most {limit}"] if total > limit else []


def run_and_list_imports(arguments: Iterable[str], path: Path = ROOT) -> tuple[int, set[str], str]:
    """Run Python with the arguments -> exit code, every module that was imported, and what was printed."""
    command = [sys.executable, "-X", "importtime", *arguments]
    finished = subprocess.run(
        command, cwd=path, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True, check=False
    )
    lines = finished.stderr.splitlines()
    modules = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    rest = [line for line in lines if not line.startswith("import time:")]
    return finished.returncode, modules, finished.stdout + "\n".join(rest)


def heavy_modules(modules: Iterable[str]) -> list[str]:
    """Those of the modules that take seconds to import."""
    heavy = {"torch", "diffusers", "transformers", "matplotlib", "tensorboard", "scipy"}
    return sorted(heavy & {module.split(".")[0] for module in modules})
