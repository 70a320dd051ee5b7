"""Where a LoRA is: a file, a folder with one, a PEFT folder, or a hub id of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"


def locate(lora: str, revision: str | None = None) -> Path:
    """The .safetensors file of a LoRA; that of a hub id is downloaded. ValueError if there is none, or several."""
    return local_file(lora) or _download(lora, revision)


def local_file(lora: str) -> Path | None:
    """The .safetensors file of a LoRA on this machine, None for a hub id. ValueError if there is none, or several."""
    place = Path(lora)
    if place.is_file():
        return _safetensors(place, lora)
    if place.is_dir():
        return place / _one_file(place, sorted(file.name for file in place.iterdir() if file.is_file()))
    org, slash, _ = lora.partition("/")
    if slash and not lora.startswith((".", "/", "~")) and not Path(org).exists() and re.fullmatch(r"[\w./-]+", lora):
        return None
    raise ValueError(
        f"lora {lora!r}: no such file or folder, and not a hub id; give ORG/NAME, or ORG/NAME/FILE.safetensors"
    )


def _safetensors(file: Path, lora: str) -> Path:
    if file.suffix != ".safetensors":
        raise ValueError(f"lora {lora!r}: only .safetensors files are read; convert it first")
    return file


def _one_file(folder: Path | str, names: Sequence[str]) -> str:
    """The LoRA among the files of a folder: PEFT's, diffusers', or the only one."""
    found = [name for name in names if name.endswith(".safetensors")]
    for wanted in ([PEFT_FILE] if PEFT_CONFIG in names else []) + [DIFFUSERS_FILE]:
        if wanted in found:
            return wanted
    if len(found) == 1:
        return found[0]
    below = Path(folder) / "lora" / PEFT_CONFIG
    advice = f"did you mean {below.parent}?" if below.is_file() else "name one of them"
    raise ValueError(f"lora {folder}: it holds {len(found)} .safetensors files; {advice}")


def _download(lora: str, revision: str | None) -> Path:
    """The file of ORG/NAME or ORG/NAME/FILE, with the PEFT config next to it if there is one; from the cache if possible."""
    import httpx
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    org, name, *below = lora.split("/", 2)
    repository, file = f"{org}/{name}", "".join(below)

    def optional(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError:
            return None

    try:
        settings = optional(str(Path(file).with_name(PEFT_CONFIG) if file else PEFT_CONFIG))
        if file:
            return Path(hf_hub_download(repository, str(_safetensors(Path(file), lora)), revision=revision))
        found = (optional(PEFT_FILE) if settings else None) or optional(DIFFUSERS_FILE)
        only = _one_file(repository, list_repo_files(repository, revision=revision)) if found is None else ""
        return found or Path(hf_hub_download(repository, only, revision=revision))
    except (HfHubHTTPError, EntryNotFoundError, OSError, httpx.HTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"lora {lora!r}: no such file or folder here, and the hub cannot be read: {first}") from error
