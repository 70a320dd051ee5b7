"""What ``gdmd doctor`` does: versions, device, the shipped networks, the recipes and one training step."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.runs.assets import asset_path, load_asset
from gdmd.runs.run_folder import commit, create, versions
from gdmd.shapes.rewards import load_scorer
from gdmd.shapes.roles import load_dit, load_vae
from gdmd.shapes.scorer_networks import KINDS
from gdmd.training.loop import train

SUMS = "sha256.json"
"""Next to the shipped networks: file name -> sha256. A file that is not listed is only loaded."""


@dataclass(frozen=True)
class Check:
    """One check: what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    found: str

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "ok": self.ok, "found": self.found}


def examine() -> list[Check]:
    """All checks, in order of dependence; none of them raises."""
    checks = [Check(f"version {name}", True, found) for name, found in versions().items()]
    checks.append(Check("commit", True, commit() or "not a git checkout"))
    checks.append(Check("device", True, device()))
    checks += [_checked(f"asset {name}", lambda name=name: asset(name)) for name in asset_names()]  # type: ignore[misc]
    checks.append(_checked("recipes", recipes))
    checks.append(_checked("writable folder", writable))
    checks.append(_checked("one training step", smoke))
    return checks


def asset_names() -> tuple[str, ...]:
    """The networks that ship with the package."""
    return ("shapes_vae", "shapes_teacher", *KINDS)


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
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    sums = path.with_name(SUMS)
    known = json.loads(sums.read_text(encoding="utf-8")) if sums.is_file() else {}
    if known.get(path.name, digest) != digest:
        raise ValueError(f"{path} has sha256 {digest[:12]}, the shipped one {known[path.name][:12]}. Reinstall gdmd.")
    match name:
        case "shapes_vae":
            load_vae(tensors)
        case "shapes_teacher":
            load_dit(tensors)
        case _:
            load_scorer(name, tensors)  # type: ignore[arg-type]
    verified = "verified" if path.name in known else "no checksum to compare with"
    return f"{len(content) / 1e6:.2f} MB, sha256 {digest[:12]} ({verified}), loads"


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


def smoke() -> str:
    """One iteration of the smoke recipe in a temporary folder."""
    cfg = read_recipe("shapes_smoke", ["loop.steps=1", "loop.batch_size=4", "loop.grid_every=0"])
    components = build(cfg)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gdmd-doctor-") as folder:
        run = create(Path(folder) / "run", cfg.model_dump(mode="json"))
        train(components.method, components.roles, components.stream, cfg.loop, run)
    return f"done in {time.perf_counter() - began:.1f} s"


def _checked(name: str, check: Callable[[], str]) -> Check:
    """Run a check and turn every error into its finding: this command exists to report what is broken."""
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, " ".join(f"{error}".split()) or type(error).__name__)
