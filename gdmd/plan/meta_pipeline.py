"""A pipeline without its weights, for ``gdmd plan``: real classes from config files or from ``model_configs``.

Networks are on the "meta" device: they have shapes and names, but no memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.device import DTYPES
from gdmd.models.families.base import Family
from gdmd.models.loading import (
    FAMILIES,
    check_pipeline,
    family_of,
    is_local,
    require_diffusers,
)
from gdmd.models.pipeline_files import absent, components, load_errors, local_index, weight_files
from gdmd.plan.model_configs import MODELS, KnownModel, model_of


@dataclass(frozen=True)
class MetaPipeline:
    """A family on the meta device."""

    family: Family
    encoders: int  # number of weights of the text encoders
    source: str  # where the configs come from, as text


def meta_family(cfg: DiffusersModel) -> MetaPipeline:
    """The pipeline of cfg.path as a Family on the meta device. No weight is read and nothing is downloaded.

    A folder's own configs are used; for a hub id, the known config of that model (``model_configs``). An unknown id needs
    model.family, and is planned as the standard model of that family.
    """
    require_diffusers()
    if is_local(cfg.location):
        return _from_folder(cfg, Path(cfg.location))
    model = model_of(cfg.path, cfg.family)
    (family,) = [kind for kind in FAMILIES if kind.name == model.family]
    if cfg.family not in (None, model.family):
        raise ValueError(
            f"{cfg.what} is of family {model.family}, but model.family = {cfg.family}; use a recipe of {model.family}, or "
            "set model.family=null"
        )
    net, vae = model.net, model.vae
    pipe = _pipe(cfg, family, _build(net.kind, net.options), _build(vae.kind, vae.options), model.scheduler)
    same = "" if cfg.path in MODELS else f", the standard model of family {model.family}"
    return MetaPipeline(_checked(family(pipe, cfg)), _encoders(model, cfg), f"published config of {model.name}{same}")


def meta_decoder(cfg: DiffusersModel, channels: int) -> nn.Module:
    """The AutoencoderTiny of cfg.scoring_decoder: from its folder, or TAESD for a hub id."""
    given = str(cfg.scoring_decoder)
    if is_local(given, "model.scoring_decoder", "config.json"):
        return _cast(_build("AutoencoderTiny", _read(Path(given) / "config.json")), cfg)
    return _cast(_build("AutoencoderTiny", {"latent_channels": channels}), cfg)


def _checked(family: Family) -> Family:
    """The family, whose network fits the image sizes of its config. ValueError if it does not."""
    family.check_sizes()
    return family


def _from_folder(cfg: DiffusersModel, folder: Path) -> MetaPipeline:
    index = local_index(folder)
    family = family_of(index, cfg)
    check_pipeline(folder, index, family, cfg)
    name = "unet" if "unet" in family.needs else "transformer"
    net, vae = (_build(index[part][1], _read(folder / part / "config.json")) for part in (name, "vae"))
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    pipe = _pipe(cfg, family, net, vae, (index["scheduler"][1], scheduler), index)
    names = [
        name for name in components(index) if name.startswith("text_encoder") and (cfg.t5 or name != "text_encoder_3")
    ]
    parts = [folder / name for name in names if name not in absent(index, names, folder)]
    encoders = sum(weights_in(file) for part in parts for file in weight_files(part, cfg.variant))
    return MetaPipeline(_checked(family(pipe, cfg)), encoders, f"configs in {folder}")


def _pipe(
    cfg: DiffusersModel,
    family: type[Family],
    net: nn.Module,
    vae: Any,
    scheduler: tuple[str, Mapping[str, Any]],
    index: Mapping[str, Any] | None = None,
) -> SimpleNamespace:
    """The parts of a pipeline that a family needs. ``index``: its model_index.json."""
    import diffusers

    own: Any = vae
    kind, options = scheduler
    try:
        built = getattr(diffusers, kind).from_config(dict(options))
    except load_errors() as error:  # an unknown class, a missing library, an invalid setting
        raise ValueError(f"{cfg.what}: its scheduler ({kind}) cannot be loaded: {error}") from error
    parts = {
        "unet" if "unet" in family.needs else "transformer": _cast(net, cfg),
        "vae": _cast(own, cfg),
        "scheduler": built,
    }
    return SimpleNamespace(**parts, components=parts, vae_scale_factor=2 ** _halvings(own), config=dict(index or {}))


def _halvings(vae: Any) -> int:
    """How many times a VAE halves the sides of an image."""
    config = vae.config
    for key in ("encoder_block_out_channels", "block_out_channels"):  # AutoencoderDC, AutoencoderKL
        if key in config:
            return len(config[key]) - 1
    return len(vae.temperal_downsample)


def _build(kind: str, options: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers on the meta device."""
    import diffusers

    try:
        with torch.device("meta"):
            net: nn.Module = getattr(diffusers, kind).from_config(dict(options))
    except load_errors() as error:
        raise ValueError(f"the network {kind} cannot be built from its config: {error}") from error
    return net.requires_grad_(False).eval()


def _cast(net: nn.Module, cfg: DiffusersModel) -> nn.Module:
    """Cast to the dtype of the model; diffusers' own ``to`` would warn about weights that exist only after loading."""
    return nn.Module.to(net, DTYPES[cfg.dtype])


def _encoders(model: KnownModel, cfg: DiffusersModel) -> int:
    return model.encoders - (0 if cfg.t5 else model.t5)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); copy the pipeline again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected an object, got {type(tree).__name__}; copy the pipeline again")
    return tree


def weights_in(file: Path) -> int:
    """Number of weights in a safetensors file; only its header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a safetensors file ({error}); copy the pipeline again") from error
    return sum(torch.Size(shape).numel() for shape in shapes)
