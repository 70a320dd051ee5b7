"""The model card of an exported student: what it is, how to call it, what it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gdmd.backbones.base import Family
from gdmd.config.run import RunConfig
from gdmd.export.lora import DIFFUSERS_FILE


def model_card(
    cfg: RunConfig, family: Family, arguments: Mapping[str, Any], facts: Mapping[str, Any], *, merged: bool
) -> str:
    """README.md: front matter of the hub, three lines of use, training, and what must be filled in by its owner."""
    model = family.cfg
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    rewards = [reward.label for reward in cfg.rewards] if cfg.method.rewarded else []
    lines = [
        *_front_matter(model.path),
        f"# {cfg.name}: {len(cfg.method.student_steps)}-step student of {model.path}",
        "",
        f"Distilled with {cfg.method.kind} (gdmd). No classifier-free guidance: one network call per step.",
        "",
        "## Use",
        "```python",
        *_use(family, given, merged),
        "```",
        "The scheduler re-noises at every step; other schedulers give worse images.",
        "",
        "## Training",
        *_table(cfg, facts, rewards),
        "",
        "## To be filled in by the owner",
        "- Licence: that of the base model and of the reward models applies.",
        "- Data: the source and licence of the prompts.",
        "- Metrics: measured on which prompts, against which teacher.",
        "",
        "## Configuration",
        "```json",
        json.dumps(cfg.model_dump(mode="json"), indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: str) -> Sequence[str]:
    return (
        "---",
        f"base_model: {base}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "license: other",
        "tags: [text-to-image, diffusers, distillation, few-step]",
        "---",
        "",
    )


def _use(family: Family, given: str, merged: bool) -> Sequence[str]:
    scheduler = "LCMScheduler" if family.native == "eps" else "FlowMatchEulerDiscreteScheduler"
    if merged:
        return (
            "import torch, diffusers",
            'pipe = diffusers.DiffusionPipeline.from_pretrained("THIS_FOLDER", dtype=torch.bfloat16).to("cuda")',
            f'image = pipe("a red cube on a blue sphere", {given}).images[0]',
        )
    return (
        "import torch, diffusers",
        f'pipe = diffusers.{family.pipeline}.from_pretrained("{family.cfg.path}", dtype=torch.bfloat16).to("cuda")',
        f'pipe.scheduler = diffusers.{scheduler}.from_pretrained("THIS_FOLDER", subfolder="scheduler")',
        f'pipe.load_lora_weights("THIS_FOLDER", weight_name="{DIFFUSERS_FILE}")',
        f'image = pipe("a red cube on a blue sphere", {given}).images[0]',
    )


def _table(cfg: RunConfig, facts: Mapping[str, Any], rewards: Sequence[str]) -> Sequence[str]:
    command = " ".join(str(word) for word in facts.get("command") or ()) or "not recorded"
    rows = {
        "method": cfg.method.kind,
        "teacher guidance": cfg.method.guidance,
        "iterations": facts.get("step", cfg.loop.steps),
        "batch": cfg.loop.batch_size,
        "rewards": ", ".join(rewards) or "none",
        "prompts": cfg.prompts.file or "not recorded",
        "seed": cfg.loop.seed,
        "command": f"`{command}`",
    }
    return ("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()))
