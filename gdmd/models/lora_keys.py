"""The keys and scales of LoRA files as many programs write them, and the same LoRA with diffusers' keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.models.lora_location import PEFT_CONFIG

PEFT_PREFIX = "base_model.model."
KINDS: Mapping[str, str] = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "ia3_": "IA3",
    "on_input": "IA3",
    "oft_": "OFT",
    "vera_": "VeRA",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding_": "LoRA of an embedding",
}
"""Part of a key -> the other kind of adapter to which it belongs."""
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}
HARMLESS = set(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout megatron_config megatron_core peft_version "
    "qalora_group_size revision target_modules task_type".split()
)
"""Fields of adapter_config.json without effect once the adapter is trained."""
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""init_lora_weights that keep the base model's weights; PiSSA, OLoRA, CorDA and LoftQ change them."""
_WEIGHT = re.compile(
    r"(?P<layer>.+?)[._](?:lora_(?:A|B|down|up)(?:\.[a-z]\w*)?|lora\d?\.(?:down|up)|lora_linear_layer\.(?:down|up))"
    r"\.(?:weight|bias)|(?P<scaled>.+)\.alpha"
)
_DOWN = re.compile(r"(lora_A(\.\w+)?|[._]down)\.weight$")
_OWN = re.compile(r"(unet|transformer|text_encoder(_2)?)\..+\.lora_(A\.weight|B\.weight|B\.bias)")
"""Keys as diffusers writes them."""


def read_lora(file: Path, lora: str) -> dict[str, Tensor]:
    """The tensors of a file. ValueError, naming ``lora``, if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"lora {lora!r} cannot be read: {error}. Copy it again") from error


def header_settings(file: Path, component: str) -> dict[str, Any]:
    """The settings that diffusers writes into a file's header: rank, alpha and patterns; empty for most files."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    prefix, settings = f"{component}.", json.loads(text) if text else {}
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def check_kind(weights: Mapping[str, Tensor], lora: str) -> None:
    """ValueError for keys of another kind of adapter, which diffusers would skip or misread."""
    kinds = {name: key for key in weights for part, name in KINDS.items() if part in key}
    if kinds:
        name, key = next(iter(kinds.items()))
        raise ValueError(f"lora {lora!r} holds {name} ({key}), which is not supported; give a plain LoRA")
    others = [key for key in weights if not _WEIGHT.fullmatch(key)]
    if others:
        raise ValueError(
            f"lora {lora!r}: {len(others)} of its {len(weights)} keys are not those of a LoRA, among them {others[0]}; "
            "give a plain LoRA"
        )


def with_diffusers_keys(weights: Mapping[str, Tensor], file: Path, pipe: Any, lora: str) -> dict[str, Tensor] | None:
    """The LoRA with every layer's scale multiplied into its B; None for a file that diffusers reads correctly itself.

    Layers named as in the denoiser get diffusers' keys here, whatever the prefix and suffix of their keys; all others are
    left to diffusers' conversions.
    """
    settings, names = file.with_name(PEFT_CONFIG), _own_names(weights, pipe)
    scales = _scales(weights, lora)
    if all(key.startswith(PEFT_PREFIX) for key in weights) and (names or settings.is_file()):
        if not settings.is_file():
            raise ValueError(
                f"lora {lora!r}: its keys are PEFT's, but {settings} is missing, which holds alpha; add it"
            )
        names = names or {layer: layer.removeprefix(PEFT_PREFIX) for layer in layers_of(weights)}
        config, ranks = _peft_config(settings), _ranks(weights)
        scales = {layer: scale_of(config, names[layer], rank) for layer, rank in ranks.items()}
    elif all(_OWN.fullmatch(key) for key in weights):
        return None
    elif names is None:
        return _folded(weights, scales, kept=denoiser_name(pipe) == "transformer")
    return _renamed(weights, names, scales, denoiser_name(pipe), lora)


def _peft_config(file: Path) -> dict[str, Any]:
    """adapter_config.json. ValueError for an adapter that is not a plain LoRA, or a field with unknown effect."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the adapter again") from error
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind}, which is not supported; give a plain LoRA")
    if config.get("use_dora"):
        raise ValueError(f"{file}: use_dora is on, and DoRA is not supported; give a plain LoRA")
    wrong = [key for key, value in config.items() if key not in READ | HARMLESS and value]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    wrong += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_INITS else []
    if wrong:
        fields = ", ".join(f"{key} = {config[key]!r}" for key in wrong)
        raise ValueError(f"{file}: {fields}, which is not supported; give a plain LoRA")
    return dict(config)


def _own_names(weights: Mapping[str, Tensor], pipe: Any) -> dict[str, str] | None:
    """layer of the file -> layer of the denoiser; None unless the denoiser has them all."""
    component, layers = denoiser_name(pipe), layers_of(weights)
    names = [name for name, _ in getattr(pipe, component).named_modules() if name]
    for before in (f"{component}.", PEFT_PREFIX, "diffusion_model.", ""):
        known = {f"{before}{name}": name for name in names}
        if layers <= known.keys():
            return {layer: known[layer] for layer in layers}
    known = {f"lora_unet_{name.replace('.', '_')}": name for name in names}
    return {layer: known[layer] for layer in layers} if layers <= known.keys() else None


def _renamed(
    weights: Mapping[str, Tensor], names: Mapping[str, str], scales: Mapping[str, float], component: str, lora: str
) -> dict[str, Tensor]:
    ready: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.endswith(".alpha"):
            continue
        layer, down = layer_of(key), bool(_DOWN.search(key))
        new = f"{component}.{names[layer]}.lora_{'A' if down else 'B'}.{key.rpartition('.')[2]}"
        if new in ready:
            raise ValueError(
                f"lora {lora!r} holds several adapters ({key} is a second one of its layer); keep one of them"
            )
        ready[new] = value if down else value.float() * scales.get(layer, 1.0)
    return ready


def _folded(weights: Mapping[str, Tensor], scales: Mapping[str, float], *, kept: bool) -> dict[str, Tensor]:
    """The same keys with alpha / rank multiplied into B: diffusers would apply one layer's alpha to the whole UNet.

    kept: set alpha to the rank instead of removing it, as the conversions for transformers need it.
    """
    ranks = _ranks(weights)
    ready: dict[str, Tensor] = {}
    for key, value in weights.items():
        layer = layer_of(key)
        if key.endswith(".alpha"):
            ready |= {key: torch.tensor(float(ranks[layer]))} if kept and ranks.get(layer) else {}
        else:
            ready[key] = value if _DOWN.search(key) else value.float() * scales.get(layer, 1.0)
    return ready


def _scales(weights: Mapping[str, Tensor], lora: str) -> dict[str, float]:
    """alpha / rank of the layers with an alpha in the file."""
    ranks = _ranks(weights)
    alphas = {layer_of(key): value for key, value in weights.items() if key.endswith(".alpha")}
    wrong = [layer for layer, value in alphas.items() if value.numel() != 1]
    if wrong:
        raise ValueError(f"lora {lora!r}: {wrong[0]}.alpha is not one number; copy or convert the LoRA again")
    return {layer: float(value) / ranks[layer] for layer, value in alphas.items() if ranks.get(layer)}


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; ``rank`` is that of the weights.

    As in PEFT, a pattern matches a layer's name or its ending, as a regular expression, and the first match counts.
    """
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    alpha = float(next(own, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ranks(weights: Mapping[str, Tensor]) -> dict[str, int]:
    return {layer_of(key): value.shape[0] for key, value in weights.items() if _DOWN.search(key)}


def layers_of(weights: Mapping[str, Tensor]) -> set[str]:
    """The layers of a file by its own names; one with nothing but an alpha does not count."""
    return {layer_of(key) for key in weights if not key.endswith(".alpha")}


def layer_of(key: str) -> str:
    """The layer of a key of weights or alpha; any other key unchanged."""
    found = _WEIGHT.fullmatch(key)
    return (found["layer"] or found["scaled"]) if found else key


def denoiser_name(pipe: Any) -> str:
    """The component of a pipeline that denoises: unet or transformer."""
    return "unet" if "unet" in pipe._lora_loadable_modules else "transformer"
