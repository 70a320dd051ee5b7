"""A student and its fake score in one small file, which loop.start_from accepts; ``shapes:dmd`` ships with the package.

Tensors are named "student.NAME" (the EMA, fp16) and "fake.NAME" (fp8: training soon changes the fake score). The header
holds the command, seed, step, commit, inputs and configuration of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.config.names import listed
from gdmd.config.shapes_pipeline import PREFIX
from gdmd.io import RunError, typed
from gdmd.runs import checkpoint
from gdmd.runs.assets import Asset, asset_path, load_asset, save_asset
from gdmd.runs.run_folder import TRAINED_BEFORE, open_run, read_facts

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = {"dmd": "shapes_dmd"}
"""Name after ``shapes:`` -> the asset."""
ROLES = ("student", "fake")
EXPORT_FILE = "gdmd_export.json"
"""The file in an exported folder with what is needed to generate images with it."""


def student_file(start_from: str) -> Path | None:
    """The file that loop.start_from names; None for a run folder. ValueError for an unknown shapes:NAME."""
    if start_from.startswith(PREFIX):
        name = start_from.removeprefix(PREFIX)
        if name not in SHIPPED:
            known = listed([f"{PREFIX}{one}" for one in SHIPPED])
            raise ValueError(
                f"loop.start_from: {start_from!r} is not a shipped student; give {known}, the folder of a run, or a file "
                "of gdmd pretrain student"
            )
        return asset_path(SHIPPED[name])
    return Path(start_from) if start_from.endswith(".safetensors") else None


def read_student_file(path: Path) -> Asset:
    """The tensors in fp32 and the history of a student file. RunError for a missing, damaged or other file."""
    asset = load_asset(path)
    facts = asset.metadata
    missing = [role for role in ROLES if not any(name.startswith(f"{role}.") for name in asset.tensors)]
    if missing or not all(isinstance(facts.get(key), dict) for key in ("config", "inputs")):
        raise RunError(
            f"{path} does not hold a student and its fake score; give a file that gdmd pretrain student has written"
        )
    return Asset({name: tensor.float() for name, tensor in asset.tensors.items()}, facts)


def part(asset: Asset, role: str) -> Mapping[str, Tensor]:
    """The tensors of a role by their parameter names."""
    return {name.removeprefix(f"{role}."): one for name, one in asset.tensors.items() if name.startswith(f"{role}.")}


def origin_of(asset: Asset) -> str:
    """Where the student comes from: "step 1000 of `gdmd train shapes_dmd loop.seed=1`"."""
    return f"step {asset.metadata['step']} of `{asset.metadata['command']}`"


def pack_student(run: Path, folder: Path) -> Path:
    """Write shapes_METHOD.safetensors from the newest checkpoint of a Shapes run. ValueError for another model."""
    import torch

    config, facts = open_run(run).config, read_facts(run)
    if config["model"]["kind"] != "shapes":
        raise ValueError(
            f"{run} is a run of {config['model'].get('path', 'another model')}, not of the Shapes networks; give its folder "
            "itself as loop.start_from"
        )
    saved = checkpoint.load_chosen(run / "checkpoints")
    if saved is None:
        raise RunError(f"{run} has no checkpoint yet. Train it first: gdmd train --resume {typed(run)}.")
    parts = {"student": saved.part("ema") or saved.part("student"), "fake": saved.part("fake")}
    dtypes = {"student": torch.float16, "fake": torch.float8_e4m3fn}
    tensors = {
        f"{role}.{name}": tensor.to(dtypes[role]) for role, named in parts.items() for name, tensor in named.items()
    }
    metadata: dict[str, Any] = {"step": saved.step, "commit": facts.get("commit"), "config": dict(config)}
    metadata |= {"inputs": facts.get("inputs", {}), "updates": saved.state["roles"]["student"]["updates"]}
    metadata |= {TRAINED_BEFORE: facts[TRAINED_BEFORE]} if TRAINED_BEFORE in facts else {}
    path = folder / f"shapes_{config['method']['kind']}.safetensors"
    return save_asset(path, tensors, command=command_of(facts), seed=config["loop"]["seed"], metadata=metadata)


def command_of(facts: Mapping[str, Any]) -> str:
    """The command of a run, without the locations of the program and the run."""
    words = [str(word) for word in facts.get("command", ())]
    at = words.index("--run") if "--run" in words[:-1] else len(words)
    return " ".join(["gdmd", *words[1:at], *words[at + 2 :]])
