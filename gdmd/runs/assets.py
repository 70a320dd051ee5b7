"""Weights as single safetensors files with their history in the header; the shipped ones are in gdmd/assets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.io import RunError, follow_umask, replaced, writing

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "gdmd"  # the header of a safetensors file maps strings to strings; ours is one JSON object under this key


@dataclass(frozen=True)
class Asset:
    """Named tensors and their history (command, seed, configuration, ...)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def asset_folder() -> Path:
    """The folder of the shipped assets."""
    return Path(str(resources.files("gdmd"))) / "assets"


def asset_path(name: str) -> Path:
    """The path of the shipped asset ``name`` (such as "shapes_vae")."""
    return asset_folder() / f"{name}.safetensors"


def load_asset(path: Path | str) -> Asset:
    """Read an asset onto the CPU. A missing or corrupt file is a RunError that says how to get it back."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise RunError(f"asset {path} is missing. Reinstall gdmd, or train it again with gdmd pretrain.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            header = file.metadata() or {}
        metadata = json.loads(header.get(_KEY, "{}"))
        if not isinstance(metadata, dict):
            raise ValueError("its header holds no JSON object")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        cure = "Reinstall gdmd, or train it again with gdmd pretrain."
        raise RunError(f"asset {path} is corrupt ({error}). {cure}") from error
    return Asset(tensors, metadata)


def save_asset(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    command: Sequence[str] | str,
    seed: int,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write an asset atomically; ``command`` and ``seed`` reproduce it."""
    from safetensors.torch import save_file

    path = Path(path)
    line = command if isinstance(command, str) else " ".join(command)
    header = {_KEY: json.dumps({"command": line, "seed": seed, **(metadata or {})}, sort_keys=True)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with writing("the asset", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            save_file(plain, partial, metadata=header)
            follow_umask(partial)
    return path
