"""A trained student as weights for other programs: diffusers LoRA, the same for ComfyUI, or merged into the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gdmd.backbones.base import Family

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "comfyui_lora.safetensors"


def save_lora(family: Family, weights: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write the adapter ``weights`` (BLOCK.lora_A.weight, ...) in the formats of the family; returns the files.

    The scale alpha / rank is multiplied into B, so that no reader can miss it. UNets also get kohya's key format,
    which ComfyUI reads; transformers need none: it reads diffusers' keys.
    """
    scale = family.cfg.lora_alpha / family.cfg.lora_rank
    folded = {k: (v * scale if "lora_B" in k else v).detach().cpu().contiguous() for k, v in weights.items()}
    unet = "unet" in family.needs
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"unet_lora_layers" if unet else "transformer_lora_layers": folded}
    type(family.pipe).save_lora_weights(folder, **layers, weight_name=DIFFUSERS_FILE)
    return [folder / DIFFUSERS_FILE, *([_save_kohya(folder)] if unet else [])]


def _save_kohya(folder: Path) -> Path:
    """diffusers' file -> kohya's keys, by diffusers' own converters."""
    from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    peft = convert_all_state_dict_to_peft(load_file(folder / DIFFUSERS_FILE))
    kohya = convert_state_dict_to_kohya(peft)
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, folder / KOHYA_FILE)
    return folder / KOHYA_FILE


@torch.no_grad()
def merge(family: Family, weights: Mapping[str, Tensor]) -> None:
    """Put the student into ``family.net``: W + alpha / rank B A, or all weights of a full student."""
    net: nn.Module = family.net
    if family.cfg.full in ("student", "both"):
        dtype = next(net.parameters()).dtype
        net.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=False)
        return
    scale = family.cfg.lora_alpha / family.cfg.lora_rank
    layers = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
    for layer in layers:
        target = net.get_parameter(f"{layer}.weight")
        down, up = (weights[f"{layer}.lora_{part}.weight"].to(target.device, torch.float32) for part in "AB")
        change = scale * (up.flatten(1) @ down.flatten(1)).reshape(target.shape)
        target.copy_((target.float() + change).to(target.dtype))
