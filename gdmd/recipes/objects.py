"""What a run is given as Python objects, instead of the paths and names that a recipe holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gdmd.data.prompt_files import PromptFile
from gdmd.io import content_hash

PYTHON = "python:"
"""Prefix of the names of such objects in config.yaml and run.json."""


@dataclass(frozen=True)
class GivenObjects:
    """Objects that were given to a ``DistillationTrainer``. A run can only be resumed with the same ones.

    pipeline: the base model, an open diffusers pipeline. functions: rewards of kind "function", by name.
    prompts: the training prompts.
    """

    pipeline: Any = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    prompts: PromptFile | None = None

    @property
    def resume_advice(self) -> str:
        """How to continue their run after a change of a reward function; "" without objects: by the command line."""
        given = self.pipeline is not None or self.functions or self.prompts is not None
        call = "the same DistillationTrainer(...).train(resume_from_checkpoint=True)"
        return f"{call} (add accept_changes=True if you change a reward function)" if given else ""

    @cached_property
    def pipeline_content(self) -> str:
        """A hash of the pipeline's weights in memory, which may differ from those on disk (a fused LoRA).

        Adapters that training has added do not count.
        """
        digest = hashlib.sha256()
        for name, part in sorted(self.pipeline.components.items()):
            weights: Mapping[str, Any] = part.state_dict() if isinstance(part, torch.nn.Module) else {}
            for key, tensor in weights.items():
                if ".lora_" not in key:
                    digest.update(f"{name}.{key.replace('.base_layer.', '.')} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"weights:{digest.hexdigest()}"

    @cached_property
    def pipeline_settings(self) -> str:
        """A hash of the pipeline's settings and of those of its parts: the scheduler's shift and betas, the VAE's scaling.

        What they were loaded from, and versions of libraries, do not count.
        """
        parts = {name: getattr(part, "config", None) for name, part in self.pipeline.components.items()}
        configs = {"pipeline": self.pipeline.config} | {k: one for k, one in parts.items() if isinstance(one, Mapping)}
        found = {name: {k: v for k, v in one.items() if not k.startswith("_")} for name, one in configs.items()}
        return f"sha256:{content_hash(json.dumps(found, sort_keys=True, default=str))}"


NOTHING_GIVEN = GivenObjects()
