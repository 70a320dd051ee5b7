"""What ``gdmd doctor`` does: versions, device, the shipped networks and pipelines, the recipes and one training step."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gdmd.config.model import DiffusersModel
from gdmd.config.shapes_pipeline import PIPELINES, PREFIX, read_shapes_pipeline, shipped_pipelines
from gdmd.models.loading import open_family
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.runs.assets import asset_path, load_asset
from gdmd.runs.run_folder import commit, create, versions
from gdmd.runs.student_file import ROLES, SHIPPED, part, read_student_file
from gdmd.shapes.rewards import load_scorer
from gdmd.shapes.roles import load_dit, load_vae
from gdmd.shapes.scorer_networks import KINDS
from gdmd.training.loop import train

SUMS = "sha256.json"
"""In the folder of the shipped files: path -> sha256. tools/checksums.py writes it. A file that is not listed is only
loaded."""


@dataclass(frozen=True)
class Check:
    """One check: what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    found: str

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "ok": self.ok, "found": self.found}


def examine(chosen: str | None = None) -> list[Check]:
    """All checks, in order of dependence; none of them raises. chosen: the device of the training step."""
    checks = [Check(f"version {name}", True, found) for name, found in versions().items()]
    checks.append(Check("commit", True, commit() or "not a git checkout"))
    checks.append(Check("device", True, device()))
    checks += [_checked(f"asset {name}", lambda name=name: asset(name)) for name in asset_names()]  # type: ignore[misc]
    checks += [
        _checked(f"asset {PREFIX}{name}", lambda name=name: pipeline(name))  # type: ignore[misc]
        for name in shipped_pipelines()
    ]
    checks.append(_checked("recipes", recipes))
    checks.append(_checked("writable folder", writable))
    checks.append(_checked("one training step", lambda: smoke(chosen)))
    return checks


def asset_names() -> tuple[str, ...]:
    """The networks that ship with the package."""
    return ("shapes_vae", "shapes_teacher", *KINDS, *SHIPPED.values())


def device() -> str:
    """The hardware that the networks can use."""
    threads = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return f"{threads}, no GPU"
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {threads}"


def asset(name: str) -> str:
    """Verify the checksum of a shipped network and load it. ValueError says what is wrong."""
    path = asset_path(name)
    tensors = load_asset(path).tensors
    verified = _verified([path], path.parent)
    match name:
        case "shapes_vae":
            load_vae(tensors)
        case "shapes_teacher":
            load_dit(tensors)
        case name if name in SHIPPED.values():
            student = read_student_file(path)
            for role in ROLES:
                load_dit(part(student, role), f"the {role} of {path}")
        case _:
            load_scorer(name, tensors)  # type: ignore[arg-type]
    return f"{verified}, loads"


def pipeline(name: str) -> str:
    """Verify the checksums of a shipped diffusers pipeline and load it. ValueError says what is wrong."""
    folder, path = PIPELINES / name, f"{PREFIX}{name}"
    verified = _verified(_files(folder), PIPELINES.parent)
    trained = read_shapes_pipeline(path)
    assert trained is not None  # shipped_pipelines lists those with a marker
    if find_spec("diffusers") is None:
        return f"{verified}, not loaded: diffusers is not installed"
    size = {"height": trained.height, "width": trained.width, "max_tokens": trained.max_tokens}
    open_family(DiffusersModel(path=path, **size))
    return f"{verified}, loads"


def checksums(folder: Path) -> dict[str, str]:
    """Path below ``folder`` -> sha256, of all its files but SUMS."""
    files = [file for file in _files(folder) if file.name != SUMS]
    return {file.relative_to(folder).as_posix(): _sha256(file) for file in files}


def recipes() -> str:
    """Read every shipped recipe."""
    names = recipe_names()
    for name in names:
        read_recipe(name)
    return f"{len(names)} valid; `gdmd recipes` lists them"


def writable() -> str:
    """Whether runs can be written below the current folder; nothing is written."""
    folder = Path("runs") if Path("runs").exists() else Path(".")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder.resolve()} is not writable: change to another folder, or use --run")
    return str(folder.resolve())


def smoke(chosen: str | None = None) -> str:
    """One iteration of the smoke recipe in a temporary folder."""
    cfg = read_recipe("shapes_smoke", ["loop.steps=1", "loop.batch_size=4", "validation.every=0"])
    components = build(cfg, chosen)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gdmd-doctor-") as folder:
        run = create(Path(folder) / "run", cfg.model_dump(mode="json"))
        train(components.method, components.roles, components.stream, cfg.loop, run)
    return f"done in {time.perf_counter() - began:.1f} s"


def _verified(files: Sequence[Path], folder: Path) -> str:
    """The size of files below ``folder`` and whether they are the shipped ones. ValueError for one that is not."""
    sums = folder / SUMS
    known = json.loads(sums.read_text(encoding="utf-8")) if sums.is_file() else {}
    listed = 0
    for file in files:
        shipped = known.get(file.relative_to(folder).as_posix())
        listed += shipped is not None
        if shipped is not None and shipped != (digest := _sha256(file)):
            raise ValueError(f"{file} has sha256 {digest[:12]}, the shipped one {shipped[:12]}. Reinstall gdmd.")
    size = sum(file.stat().st_size for file in files)
    verified = "sha256 verified" if listed == len(files) else "no sha256 to compare with"
    return f"{size / 1e6:.2f} MB, {verified}"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _checked(name: str, check: Callable[[], str]) -> Check:
    """Run a check and turn every error into its finding: this command exists to report what is broken."""
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, " ".join(f"{error}".split()) or type(error).__name__)
