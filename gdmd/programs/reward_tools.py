"""What ``gdmd rewards list`` and ``gdmd rewards fetch`` do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gdmd.config.extras import install
from gdmd.hub import hub_reason, transport_errors, unreachable
from gdmd.io import read_json
from gdmd.rewards.weights import CLIP_L, CONFIG, CONVERTED, PRETRAINED, HubRepo, cache_dir, pretrained_weights

PATTERNS = ("*.json", "*.txt", "model.safetensors", "model-*.safetensors")
"""Files that a reward reads from a hub repository in transformers' format."""
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
"""The files of a tokenizer."""


def listing() -> list[dict[str, Any]]:
    """One row per pretrained reward: its formula, its weights, and the folder of converted weights. Without torch."""
    return [
        {
            "kind": one.kind,
            "about": one.about,
            "range": one.range,
            "reads": one.reads,
            "weights": _named(one.weights) + (f" {one.file}" if one.file else ""),
            "converted": _converted(one.kind) if one.converted else None,
        }
        for one in PRETRAINED
    ]


def fetch(kind: str, folder: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Download the published weights of a reward at their pinned revision; returns their folder.

    A file in another format is converted, and must then score an image. Other weights go to the hub's cache, where
    recipes find them, or to ``folder``. ValueError, after one attempt, if the download fails.
    """
    known = pretrained_weights(kind)
    if not known.converted:
        where = _repository(known.weights, PATTERNS, folder)
        if known.tokenizer:
            _repository(known.tokenizer, TOKENIZER if folder else (*TOKENIZER, CONFIG), folder)
        return where
    ready = folder or cache_dir() / kind
    if (ready / "model.safetensors").is_file():
        _require_pinned(known.weights, ready)
        say(f"{kind} is already converted")
        return ready
    file = _file(known.weights, known.file, cache_dir() / "fetched" / kind)
    say(f"fetched {file}")
    if kind == "aesthetic":
        _repository(CLIP_L, PATTERNS, None)  # the network that computes its input
    from gdmd.rewards.convert import convert

    ready = convert(kind, file, folder, revision=known.weights.revision)
    try:
        _verify(kind, ready)
    except ValueError:
        shutil.rmtree(ready)  # otherwise the next fetch would take it for verified
        raise
    say(f"converted and verified; {file} is no longer needed")
    return ready


def _require_pinned(hub: HubRepo, ready: Path) -> None:
    """ValueError for a conversion of another revision; the revision of a user's own file is unknown."""
    facts = read_json(file, "Remove the folder and fetch again.") if (file := ready / CONVERTED).is_file() else {}
    before = facts.get("revision")
    if before and hub.revision and before != hub.revision:
        raise ValueError(
            f"{ready} was converted from {hub.name} at {before[:12]}, and the pinned revision is {hub.revision[:12]}: "
            "remove the folder and fetch again, or keep it for its scores and give it as path"
        )


def _verify(kind: str, ready: Path) -> None:
    """ValueError unless the converted weights load and give an image a finite score."""
    from PIL import Image
    from pydantic import TypeAdapter

    from gdmd.config.rewards import TaggedReward
    from gdmd.recipes.build_rewards import image_reward

    cfg: Any = TypeAdapter(TaggedReward).validate_python({"kind": kind, "path": str(ready)})
    image = Image.linear_gradient("L").convert("RGB")
    image_reward(cfg, "cpu")([image], ["a photo of a red apple on a wooden table"])


def _file(hub: HubRepo, file: str, folder: Path) -> Path:
    def download(cached_only: bool) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(hub.name, file, revision=hub.revision, local_dir=folder, local_files_only=cached_only)

    return _fetched(hub, file, download)


def _repository(hub: HubRepo, patterns: Sequence[str], folder: Path | None) -> Path:
    def download(cached_only: bool) -> str:
        from huggingface_hub import snapshot_download

        wanted = {"revision": hub.revision, "allow_patterns": list(patterns), "local_dir": folder}
        found = snapshot_download(hub.name, **wanted, local_files_only=cached_only)
        if "model.safetensors" in patterns and (missing := _missing_weights(Path(found))):
            raise ValueError(f"{found} has no {missing}")  # an interrupted earlier download
        return found

    return _fetched(hub, CONFIG, download)


def _missing_weights(folder: Path) -> str:
    """A weight file that the folder lacks, "" if it is complete; large models have several, which an index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return next((name for name in names if not (folder / name).is_file()), "")


def _fetched(hub: HubRepo, file: str, download: Callable[[bool], str]) -> Path:
    """Call ``download(cached_only)`` after asking the hub once. ValueError with the reason and the remedy."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ValueError(f"fetching needs huggingface_hub; do: {install('diffusers')}") from error
    away = ""
    try:
        away = unreachable(hub.name, file, hub.revision)
        return Path(download(bool(away)))
    except (OSError, ValueError, RuntimeError, *transport_errors()) as error:
        reason = f"the hub cannot be reached ({away})" if away else hub_reason(error, file, hub.revision)
        raise ValueError(
            f"cannot fetch {_named(hub)}: {reason}. Check the network and fetch again, or copy the files here "
            "(docs/guides/rewards.md)"
        ) from error


def _named(hub: HubRepo) -> str:
    return f"{hub.name}@{hub.revision[:12]}" if hub.revision else hub.name


def _converted(kind: str) -> str:
    folder = cache_dir() / kind
    return str(folder) if (folder / "model.safetensors").is_file() else ""
