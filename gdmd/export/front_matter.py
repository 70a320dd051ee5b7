"""The metadata of a model card, as the Hugging Face Hub reads it, and the license of the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import PREFIX
from gdmd.hub import hub_file, transport_errors

LICENSE = ("license", "license_name", "license_link")
"""The license fields of a card."""


def front_matter(cfg: RunConfig, license: Mapping[str, str], samples: str | None, *, lora: bool) -> str:
    """The YAML between the lines of dashes. ``samples``: images/step_STEP.png in the folder, for the Hub's gallery.

    lora: the folder holds a LoRA for the base model, not a whole pipeline.
    """
    model = cfg.model
    assert isinstance(model, DiffusersModel)
    base = base_id(model.start)
    tags = ["text-to-image", "diffusers", *(["lora", "template:sd-lora"] if lora else [])]
    tags += ["few-step", "distillation", "gdmd", *([cfg.method.kind] if cfg.method.kind != "gdmd" else [])]
    fields: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags,
        **license,
    }
    if samples:
        text = f"samples after {int(Path(samples).stem.partition('_')[2])} iterations"
        fields["widget"] = [{"text": text, "output": {"url": samples}}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def base_id(model: DiffusersModel) -> str | None:
    """The base model's hub id; None for a folder, unless it is in the Hub's cache."""
    if cached := re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", f"{Path(model.location).absolute()}/"):
        return f"{cached[1]}/{cached[2]}"
    return None if Path(model.location).is_dir() else model.path


def base_license(model: DiffusersModel) -> dict[str, str]:
    """The license fields of the base model's own card; {} if it has none, or cannot be read.

    A link to a file of the base model's repository becomes an address.
    """
    if model.path.startswith(PREFIX):
        return {"license": "apache-2.0"}  # part of this package
    text = _card_of(model)
    head = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    try:
        fields = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    found = {name: str(fields[name]) for name in LICENSE if isinstance(fields, dict) and fields.get(name)}
    link, base = found.get("license_link", ""), base_id(model)
    if link and "://" not in link:
        found.pop("license_link")
        found |= {"license_link": f"https://huggingface.co/{base}/blob/main/{link}"} if base else {}
    return found if "license" in found else {}


def _card_of(model: DiffusersModel) -> str:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        local = Path(model.location).is_dir()
        card = Path(model.location) / "README.md" if local else hub_file(model.path, "README.md", model.revision)
        return card.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError, EntryNotFoundError, HfHubHTTPError, *transport_errors()):
        return ""
