"""Real images of a real model: the store of their latents, and the prompts of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.config.model import DiffusersModel
from gdmd.config.real_data import RealDataConfig
from gdmd.config.run import RunConfig
from gdmd.data.latent_cache import LatentStore, StoredLatents
from gdmd.data.prompt_files import PromptFile
from gdmd.data.prompts import read_prompts
from gdmd.shapes.grammar import training_captions
from gdmd.types import Codec


def store_of(real: RealDataConfig, model: DiffusersModel) -> LatentStore:
    """The store of the latents of these images from this VAE, complete or not."""
    what = f"the VAE of {model.path} ({model.dtype}) at {model.height} x {model.width} pixels"
    return LatentStore(Path(real.latents), vae_identity(model), real.source, what)


def vae_identity(model: DiffusersModel) -> str:
    """Everything that changes latents: content of the VAE, precision, tiling, image size, library versions."""
    from gdmd.models.loading import content_of, versions

    facts = [model.dtype, model.decode_tiled, model.height, model.width, *versions(), *content_of(model, ["vae"])]
    return json.dumps(facts)


def real_latents_of(cfg: RunConfig, model: DiffusersModel) -> StoredLatents | None:
    """The stored latents of this model's size, if the method reads real images. ValueError if they are missing."""
    if not cfg.needs_real:
        return None
    if cfg.real_data is None:
        raise ValueError(
            f"{cfg.needs_real} needs real images: set real_data.source (a folder of images with captions, or WebDataset "
            "tars) and real_data.latents (a folder), then run `gdmd latents` with this recipe once; or set "
            "gan_weight = 0 and student_input = simulation"
        )
    return store_of(cfg.real_data, model).open()


def training_prompts(
    cfg: RunConfig, real: StoredLatents | None, given: PromptFile | None = None
) -> tuple[list[list[str]], tuple[Mapping[str, Any], ...] | None]:
    """Groups of prompts, and the rows of a single group.

    From the ``given`` prompts or prompts.file (with real images, each must have one), else the captions of the real
    images, else of the Shapes world, a group per task.
    """
    prompts = given
    if given is None and cfg.prompts.file is not None:
        prompts = read_prompts(cfg.prompts.file, cfg.prompts.column)
    if prompts is not None:
        if real is not None:
            real.check(prompts.texts)
        return [list(prompts.texts)], prompts.rows
    require_prompts(cfg)
    return training_captions() if real is None else [list(real.captions)], None


def require_prompts(cfg: RunConfig) -> None:
    """ValueError if a real model has neither a prompt file nor real images with captions."""
    if not cfg.shapes_world and cfg.prompts.file is None and not cfg.needs_real:
        raise ValueError(
            "prompts.file is not set: a diffusers pipeline needs a file of prompts, for example prompts.txt"
        )


def encoder_of(codec: Codec, shape: tuple[int, int, int], device: str) -> Callable[[Tensor], Tensor]:
    """codec.encode on ``device``. ValueError if the shape of its latents is not the network's."""

    def encode(images: Tensor) -> Tensor:
        latents = codec.encode(images.to(device))
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(f"the VAE's latents have shape {tuple(latents.shape[1:])}, the network expects {shape}")
        return latents

    return encode
