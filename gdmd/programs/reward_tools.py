"""What ``gdmd rewards`` does: list, fetch, convert, check against golden scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdmd.config.extras import install
from gdmd.hub import hub_reason, transport_errors, unreachable
from gdmd.rewards.weights import CLIP_L, CONFIG, PUBLISHED, Hub, home, published

PATTERNS = ("*.json", "*.txt", "model.safetensors")
"""Files of a hub repository in transformers' format that a reward reads."""
WORDS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")
"""Those of its tokenizer."""


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


def fetch(kind: str, folder: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Download a reward's published weights at their pinned revision and make them ready for use; where they are.

    What is published as a .pt is converted to safetensors at once and then scores an image. The rest goes into the hub's
    cache, where recipes find it, or into ``folder``. ValueError, after one attempt, for what cannot be downloaded.
    """
    known = published(kind)
    if not known.converted:
        where = _repository(known.weights, PATTERNS, folder)
        if known.tokenizer:
            _repository(known.tokenizer, WORDS if folder else (*WORDS, CONFIG), folder)
        return where
    ready = folder or home() / kind
    if (ready / "model.safetensors").is_file():
        say(f"{kind} was converted before")
        return ready
    file = _file(known.weights, known.file, home() / "fetched" / kind)
    say(f"fetched {file}")
    if kind == "aesthetic":
        _repository(CLIP_L, PATTERNS, None)  # the network below its layers
    from gdmd.rewards.convert import convert

    ready = convert(kind, file, folder)
    try:
        _verify(kind, ready)
    except ValueError:
        shutil.rmtree(ready)  # made just now; left there it would be taken for verified
        raise
    say(f"converted and verified; {file} is no longer needed")
    return ready


def _verify(kind: str, ready: Path) -> None:
    """The converted weights load as the reward loads them and give a finite score. ValueError otherwise."""
    from pydantic import TypeAdapter

    from gdmd.config.rewards import TaggedReward
    from gdmd.recipes.build_rewards import image_reward
    from gdmd.rewards.golden import PROMPTS, golden_images

    cfg: Any = TypeAdapter(TaggedReward).validate_python({"kind": kind, "path": str(ready)})
    image_reward(cfg, "cpu").score_pil(golden_images()[:1], PROMPTS[:1])  # refuses a score that is not finite


def _file(hub: Hub, file: str, folder: Path) -> Path:
    def download(cached_only: bool) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(hub.name, file, revision=hub.revision, local_dir=folder, local_files_only=cached_only)

    return _fetched(hub, file, download)


def _repository(hub: Hub, patterns: Sequence[str], folder: Path | None) -> Path:
    def download(cached_only: bool) -> str:
        from huggingface_hub import snapshot_download

        wanted = {"revision": hub.revision, "allow_patterns": list(patterns), "local_dir": folder}
        found = snapshot_download(hub.name, **wanted, local_files_only=cached_only)
        if "model.safetensors" in patterns and not (Path(found) / "model.safetensors").is_file():
            raise ValueError(f"{found} holds no model.safetensors")  # an earlier download that was cut short
        return found

    return _fetched(hub, CONFIG, download)


def _fetched(hub: Hub, file: str, download: Callable[[bool], str]) -> Path:
    """What ``download`` gives, after one look at the hub. ValueError that says what is wrong and what to do."""
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


def check(
    spec: Mapping[str, Any], record_to: Path | None, against: Path | None, tolerance: float, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Score the golden images with a reward; write them, or compare with a file. Rows of prompt and scores.

    ValueError for scores that differ, by entry and path.
    """
    from pydantic import TypeAdapter, ValidationError

    from gdmd.config.explain import explain
    from gdmd.config.rewards import TaggedReward
    from gdmd.recipes.build_rewards import image_reward
    from gdmd.rewards.golden import Checked, check_golden, compare, record

    golden = _read_json(against) if against else None
    if golden is not None:
        check_golden(golden)
    try:
        cfg: Any = TypeAdapter(TaggedReward).validate_python(dict(spec))
    except ValidationError as error:
        raise ValueError("\n".join(explain(TaggedReward, error, f"reward {spec.get('kind')}"))) from None
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
