"""From a recipe to live objects: the only place where concrete classes meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdmd.backbones.shapes import (
    LATENT_SHAPE,
    ShapesCodec,
    ShapesRoles,
    ShapesTextEncoder,
    load_dit,
    load_vae,
)
from gdmd.config.method import DmdConfig, GdmdConfig
from gdmd.config.rivals import Dmd2Config, DmdrConfig
from gdmd.config.rivals_rl import DmdGrpoConfig, DmdNftConfig, DmdReflConfig
from gdmd.config.run import RunConfig, ShapesReward
from gdmd.data.latents import RenderedLatents
from gdmd.data.prompts import PromptStream, read_prompts, training_captions
from gdmd.methods.dmd import Dmd
from gdmd.methods.dmd2 import Dmd2
from gdmd.methods.dmd_grpo import DmdGrpo
from gdmd.methods.dmd_nft import DmdNft
from gdmd.methods.dmd_refl import DmdRefl
from gdmd.methods.dmdr import Dmdr
from gdmd.methods.gdmd import Gdmd
from gdmd.methods.scoring import Scorer
from gdmd.rewards.checker import PartialCredit
from gdmd.rewards.shapes import load_scorer
from gdmd.runs.assets import asset_path, load_asset
from gdmd.types import Method, Reward


@dataclass(frozen=True)
class Lab:
    """Everything a run is made of."""

    roles: ShapesRoles
    codec: ShapesCodec
    encoder: ShapesTextEncoder
    rewards: tuple[Reward, ...]
    method: Method
    stream: PromptStream
    latent_shape: tuple[int, int, int] = LATENT_SHAPE


def build(cfg: RunConfig, device: str | None = None) -> Lab:
    """Load the networks, wrap them, and put the method of the recipe on top; on the GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = cfg.loop.precision == "bf16"
    teacher = load_dit(*_tensors(cfg.model.teacher, "shapes_teacher")).to(device)
    codec = ShapesCodec(load_vae(*_tensors(cfg.model.vae, "shapes_vae")).to(device), bf16=bf16)
    judged = isinstance(cfg.method, Dmd2Config) and cfg.method.adversarial
    roles = ShapesRoles(teacher, bf16=bf16, head_seed=cfg.loop.seed if judged else None)
    encoder = ShapesTextEncoder(device)
    rewards = build_rewards(cfg.rewards, device)
    groups = [list(read_prompts(Path(cfg.prompts.file)))] if cfg.prompts.file else training_captions()
    stream = PromptStream(groups, encoder, cfg.loop.batch_size, cfg.loop.seed, cfg.method.prompt_group)
    return Lab(roles, codec, encoder, rewards, _method(cfg, roles, codec, rewards), stream)


def _tensors(given: str | None, name: str) -> tuple[dict[str, torch.Tensor], str]:
    path = Path(given) if given else asset_path(name)
    return load_asset(path).tensors, str(path)


def build_rewards(specs: Sequence[ShapesReward], device: str = "cpu") -> tuple[Reward, ...]:
    """The reward models of a recipe, in its order."""
    return tuple(_reward(spec, device) for spec in specs)


def _reward(spec: ShapesReward, device: str) -> Reward:
    match spec.kind:
        case "shapes_partial_credit":
            return PartialCredit()
        case kind:
            return load_scorer(kind, _tensors(spec.asset, kind)[0]).to(device)


def _method(cfg: RunConfig, roles: ShapesRoles, codec: ShapesCodec, rewards: tuple[Reward, ...]) -> Method:
    real = RenderedLatents(codec) if cfg.method.student_input == "data" or roles.critic else None
    match cfg.method:
        case DmdConfig() as own:
            return Dmd(own, roles, LATENT_SHAPE, "velocity", real)
        case Dmd2Config() as own:
            return Dmd2(own, roles, LATENT_SHAPE, "velocity", real).attach(roles.critic)
        case DmdrConfig() as own:
            blend = roles.blended_teacher
            return Dmdr(own, roles, LATENT_SHAPE, "velocity", real).attach(Scorer(codec, rewards), blend)
        case DmdReflConfig() as own:
            return DmdRefl(own, roles, LATENT_SHAPE, "velocity", real).attach(Scorer(codec, rewards))
        case DmdNftConfig() as own:
            return DmdNft(own, roles, LATENT_SHAPE, "velocity", real).attach(Scorer(codec, rewards))
        case DmdGrpoConfig() as own:
            return DmdGrpo(own, roles, LATENT_SHAPE, "velocity", real).attach(Scorer(codec, rewards))
        case GdmdConfig() as own:
            return Gdmd(own, roles, LATENT_SHAPE, "velocity", real).attach(Scorer(codec, rewards))
