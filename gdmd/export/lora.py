"""A trained student as weights for other programs: diffusers LoRA, the same for ComfyUI, or merged into the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gdmd.config.model import LoraFile
from gdmd.io import follow_umask
from gdmd.models.families.base import Family, stored_dtype
from gdmd.models.lora_files import lora_factors
from gdmd.models.lora_location import DIFFUSERS_FILE

KOHYA_FILE = "comfyui_lora.safetensors"


def save_lora(
    family: Family, weights: Mapping[str, Tensor], folder: Path, loras: Sequence[LoraFile] = ()
) -> list[Path]:
    """Write the adapter ``weights`` (BLOCK.lora_A.weight, ...) in the formats of the family; returns the files.

    loras: LoRAs to include: B A + B' A' = [B B'] [A; A'], whose rank is the sum of both; also in the text encoders.
    The scale alpha / rank is multiplied into B, so that no reader can miss it. UNets also get a file with kohya's keys
    for ComfyUI; for transformers, ComfyUI reads diffusers' keys.
    """
    unet = "unet" in family.needs
    net = "unet" if unet else "transformer"
    layers: dict[str, dict[str, Tensor]] = {
        net: {name: value.cpu().contiguous() for name, value in folded(family, weights).items()}
    }
    for lora in loras:
        for key, pair in lora_factors(family.pipe, lora).items():
            component, _, layer = key.partition(".")
            own = layers.setdefault(component, {})
            for part, value, dim in zip("AB", pair, (0, 1), strict=True):
                name = f"{layer}.lora_{part}.weight"
                both = [own[name], value.cpu()] if name in own else [value.cpu()]
                own[name] = torch.cat(both, dim).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    given = {f"{component}_lora_layers": own for component, own in layers.items()}
    type(family.pipe).save_lora_weights(folder, **given, weight_name=DIFFUSERS_FILE)
    files = [folder / DIFFUSERS_FILE, *([_save_kohya(folder)] if unet else [])]
    follow_umask(*files)
    return files


def folded(family: Family, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter with its scale alpha / rank multiplied into B."""
    scale = family.cfg.lora_alpha / family.cfg.lora_rank
    return {name: (value * scale if "lora_B" in name else value).detach() for name, value in weights.items()}


def _save_kohya(folder: Path) -> Path:
    """diffusers' file -> kohya's keys, by diffusers' own converters."""
    from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    peft = convert_all_state_dict_to_peft(load_file(folder / DIFFUSERS_FILE))
    kohya = convert_state_dict_to_kohya(peft)
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, folder / KOHYA_FILE)
    return folder / KOHYA_FILE


def check_fits(family: Family, weights: Mapping[str, Tensor]) -> None:
    """ValueError if the names or sizes of the student's layers differ from ``family.net``: the base is another model."""
    shapes = {name: tuple(value.shape) for name, value in family.net.named_parameters()}
    wrong = [name for name, value in weights.items() if ".lora_" not in name and shapes.get(name) != tuple(value.shape)]
    adapters = [name for name in weights if name.endswith(".lora_A.weight")]
    wrong += [] if adapters else sorted(shapes.keys() - weights.keys())
    for name in adapters:
        layer = name.removesuffix(".lora_A.weight")
        pair = (weights[f"{layer}.lora_B.weight"].shape[0], weights[name].shape[1])
        wrong += [] if shapes.get(f"{layer}.weight", ())[:2] == pair else [layer]
    if wrong:
        raise ValueError(
            f"{family.cfg.path} is not the base of this student: {len(wrong)} layers are missing on one side or "
            f"differ in size, the first is {wrong[0]}. Give the base model of the run"
        )


@torch.no_grad()
def merge(family: Family, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> float:
    """Merge the student into ``family.net``: W + alpha / rank B A, or all weights of a full student.

    ``dtype``: of the merged weights, except those that diffusers keeps in fp32; default: their own. Returns the share of
    changed weights whose change is lost by rounding to it.
    """
    changed = lost = 0
    for name, value in _students(family, weights):
        target = family.net.get_parameter(name)
        base = target.float()
        wanted = target.dtype if dtype is None else stored_dtype(family.net, name, dtype)
        moved = value != base
        changed += int(moved.sum())
        lost += int((moved & (value.to(wanted) == base.to(wanted))).sum())
        target.data = value.to(wanted)
    return lost / changed if changed else 0.0


def _students(family: Family, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the network that the student changes, with its new value, in fp32."""
    net: nn.Module = family.net
    if family.cfg.full in ("student", "both"):
        for name, value in weights.items():
            yield name, value.to(net.get_parameter(name).device, torch.float32)
        return
    scale = family.cfg.lora_alpha / family.cfg.lora_rank
    for layer in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
        target = net.get_parameter(f"{layer}.weight")
        down, up = (weights[f"{layer}.lora_{part}.weight"].to(target.device, torch.float32) for part in "AB")
        yield f"{layer}.weight", target.float() + scale * (up.flatten(1) @ down.flatten(1)).reshape(target.shape)
