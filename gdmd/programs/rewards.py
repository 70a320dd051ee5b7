"""What ``gdmd rewards`` does: list, fetch, convert, check against golden scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdmd.config.extras import install
from gdmd.rewards.sources import PUBLISHED, Hub, home, published

PATTERNS = ["*.json", "*.txt", "model.safetensors"]
"""Files of a hub repository in transformers' format that a reward reads."""


def listing() -> list[dict[str, Any]]:
    """One row per published reward: what it is, where its weights are, whether they are converted here. No torch."""
    return [
        {
            "kind": one.kind,
            "about": one.about,
            "range": one.range,
            "reads": one.reads,
            "weights": _named(one.weights) + (f" {one.file}" if one.file else ""),
            "converted": _converted(one.kind) if one.converted else None,
        }
        for one in PUBLISHED
    ]


def fetch(kind: str, folder: Path | None = None) -> list[Path]:
    """Download the published files of a reward at their pinned revision; the only command that asks the network for them."""
    known = published(kind)
    target = folder or home() / "fetched" / kind
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise ValueError(f"fetching needs huggingface_hub; do: {install('diffusers')}") from error
    hub = known.weights
    try:
        if known.file:
            return [Path(hf_hub_download(hub.name, known.file, revision=hub.revision, local_dir=target))]
        found = snapshot_download(hub.name, revision=hub.revision, allow_patterns=PATTERNS, local_dir=target)
        return [Path(found)]
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"cannot fetch {_named(hub)}: {first}; check the network, or copy the files here by other means"
        ) from error


def check(
    spec: Mapping[str, Any], record_to: Path | None, against: Path | None, tolerance: float, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Score the golden images with a reward; write them, or compare with a file. Rows of prompt and scores.

    ValueError for scores that differ, by entry and path.
    """
    from pydantic import TypeAdapter, ValidationError

    from gdmd.config.rewards import ImageReward
    from gdmd.recipes.rewards import image_reward
    from gdmd.rewards.golden import Checked, check_golden, compare, record

    golden = _read_json(against) if against else None
    if golden is not None:
        check_golden(golden)
    try:
        cfg: Any = TypeAdapter(ImageReward).validate_python(dict(spec))
    except ValidationError as error:
        raise ValueError(f"reward {spec.get('kind')}: {error.errors()[0]['msg']}") from None
    reward = image_reward(cfg, device)
    if not isinstance(reward, Checked):
        raise ValueError(f"reward {cfg.kind} has no weights of its own to check; check its parts")
    if golden is not None:
        _report(compare(reward, golden, tolerance), against)
        return list(golden["entries"])
    made = record(reward, {"weights": facts_of(spec), "dtype": cfg.dtype})
    if record_to:
        _write_json(record_to, made)
    return list(made["entries"])


def facts_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights these are: the given path or the pinned id, and the origin of a converted folder."""
    known = published(str(spec["kind"]))
    given = spec.get("path")
    folder = Path(given) if given else home() / known.kind
    origin = folder / "converted.json"
    facts: dict[str, Any] = {"path": Path(given).name if given else _named(known.weights)}
    if known.converted and origin.is_file():
        facts["origin"] = _read_json(origin)
    return facts


def _report(differences: list[Any], path: Path | None) -> None:
    if differences:
        lines = [f"entry {d.entry}, {d.path}: recorded {d.recorded:.6f}, found {d.found:.6f}" for d in differences]
        raise ValueError("\n".join([f"{len(differences)} scores differ from {path}", *lines]))


def _named(hub: Hub) -> str:
    return f"{hub.name}@{hub.revision[:12]}" if hub.revision else hub.name


def _converted(kind: str) -> str:
    folder = home() / kind
    return str(folder) if (folder / "model.safetensors").is_file() else ""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); give a file that --record wrote") from error


def _write_json(path: Path, content: Any) -> None:
    from gdmd.io import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2) + "\n", "the golden scores")
