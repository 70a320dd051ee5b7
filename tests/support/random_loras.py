"""Random LoRAs for the shipped miniature pipelines, as files that other programs would write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gdmd.config.shapes_pipeline import located

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}


def pipeline(name: str, where: str | Path = "") -> Any:
    """A miniature, or a pipeline of its class from another folder."""
    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    return diffusers.DiffusionPipeline.from_pretrained(
        where or located(f"shapes:{name}"), dtype=torch.float32, **without
    )


def write_lora(
    file: Path, name: str, seed: int, ends: tuple[str, ...], parts: Sequence[str] = ("unet",), *, kohya: bool = False
) -> Path:
    """A LoRA of rank 2 for these parts of a miniature, for layers with these endings; with kohya's keys, alpha is 1."""
    drawn, tensors, pipe = torch.Generator().manual_seed(seed), dict[str, Tensor](), pipeline(name)
    for part in parts:
        for layer, module in getattr(pipe, part).named_modules():
            if not layer.endswith(ends) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            out, into, *kernel = module.weight.shape
            down = torch.randn(2, into, *kernel, generator=drawn) * module.weight[0].numel() ** -0.5
            up = torch.randn(out, 2, *(1 for _ in kernel), generator=drawn) * 0.2
            if kohya:
                key = f"{KOHYA[part]}{layer.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
            else:
                tensors |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    save_file(tensors, file)
    return file
