"""From a recipe to live objects: the only place where concrete classes meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDAblationConfig, GDMDConfig
from gdmd.config.methods.gdmd_tilted import ShuffledTiltedGDMDConfig, TiltedGDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig, ShapesModel
from gdmd.data.latent_cache import StoredLatents
from gdmd.data.prompts import PromptStream
from gdmd.data.text_cache import CachedText
from gdmd.diffusion.device import pick_device
from gdmd.diffusion.sampling import times
from gdmd.methods.base import ImageSize, RealLatents
from gdmd.methods.dmd import Dmd
from gdmd.methods.dmd2 import Dmd2
from gdmd.methods.dmd_grpo import DmdGrpo
from gdmd.methods.dmd_nft import DmdNft
from gdmd.methods.dmd_refl import DmdRefl
from gdmd.methods.dmdr import Dmdr
from gdmd.methods.gdmd import Gdmd
from gdmd.methods.gdmd_ablations import CONTROLS, GdmdTiltedShuffled
from gdmd.methods.gdmd_tilted import GdmdTilted
from gdmd.methods.scorer import Scorer
from gdmd.methods.sizes import ResizableMethod, SeveralSizes
from gdmd.recipes.build_data import real_latents_of, training_prompts
from gdmd.recipes.build_rewards import asset_tensors, build_rewards, check_prompts
from gdmd.recipes.objects import NOTHING_GIVEN, GivenObjects
from gdmd.shapes.latents import RenderedLatents
from gdmd.shapes.roles import (
    LATENT_SHAPE,
    ShapesCodec,
    ShapesRoles,
    ShapesTextEncoder,
    load_dit,
    load_vae,
)
from gdmd.types import Codec, Critic, Denoiser, Method, Native, Reward, Roles, TextEncoder

if TYPE_CHECKING:
    from gdmd.models.families.base import Family
    from gdmd.models.roles import DiffusersRoles

PromptRows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Components:
    """Everything a run is made of."""

    roles: ShapesRoles | DiffusersRoles
    codec: Codec
    encoder: TextEncoder
    rewards: tuple[Reward, ...]
    method: Method
    stream: PromptStream
    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    student_steps: tuple[float, ...] = ()  # through the family's timestep mapping; empty: those of the recipe
    teacher_times: Callable[[int], Tensor] = times
    scoring: Codec | None = None  # decoder for rewards, if not ``codec``
    scorers: tuple[Reward, ...] = ()  # held-out rewards, for validation
    sizes: tuple[ImageSize, ...] = ()  # of a run with several

    def at_sizes(self) -> tuple[Components, ...]:
        """These components as samplers of images of each size; ``self`` for a run with one size."""
        names = ("latent_shape", "student_steps", "teacher_times")
        each = ({name: getattr(size, name) for name in names} for size in self.sizes)
        return tuple(replace(self, **own) for own in each) or (self,)


def build(cfg: RunConfig, device: str | None = None, given: GivenObjects = NOTHING_GIVEN) -> Components:
    """Load the networks, wrap them, and build the method of the recipe; without ``device`` on a GPU if there is one."""
    device = pick_device(device)
    match cfg.model:
        case ShapesModel() as model:
            components = _shapes(cfg, model, device, given)
        case DiffusersModel() as model:
            components = _diffusers(cfg, model, device, given)
    if not cfg.held_out:
        return components
    return replace(components, scorers=build_rewards(cfg.held_out, device, given.functions))


def _shapes(cfg: RunConfig, model: ShapesModel, device: str, given: GivenObjects) -> Components:
    bf16 = cfg.loop.precision == "bf16"
    teacher = load_dit(*asset_tensors(model.teacher, "shapes_teacher")).to(device)
    codec = ShapesCodec(load_vae(*asset_tensors(model.vae, "shapes_vae")).to(device))
    roles = ShapesRoles(teacher, bf16=bf16, head_seed=head_seed(cfg))
    encoder = ShapesTextEncoder(device)
    rewards = build_rewards(cfg.rewards, device, given.functions) if cfg.method.rewarded else ()
    groups, meta = _checked_prompts(cfg, None, (), given)
    stream = _stream(cfg, groups, meta, encoder)
    real = RenderedLatents(codec) if cfg.method.student_input == "data" or roles.critic else None
    method = method_of(cfg.method, roles, codec, rewards, SHAPES, real, cfg.loop.micro_batch)
    return Components(roles, codec, encoder, rewards, method, stream)


def _diffusers(cfg: RunConfig, model: DiffusersModel, device: str, given: GivenObjects) -> Components:
    """Times in the recipe are uniform; the method gets them through the family's timestep mapping."""
    real = real_latents_of(cfg, model)
    stores = {size: real_latents_of(cfg, model.at_size(*size)) for size in model.sizes}
    groups, meta = _checked_prompts(cfg, real, [store for store in stores.values() if store is not None], given)
    from gdmd.models.distilled import check_guidance
    from gdmd.models.loading import LazyTextEncoder, adopt, encoder_identity, open_family
    from gdmd.models.roles import DiffusersRoles
    from gdmd.models.scoring_decoder import scoring_codec
    from gdmd.models.student_start import compare_samplers, open_start

    if given.pipeline is not None:
        family = adopt(given.pipeline, model, device)
    else:
        family = open_family(model, device, encoders=model.embeddings is None)
    start = open_start(family, device)
    compare_samplers(start, cfg.method.student_steps, cfg.method.student_sampler)
    check_guidance(family, cfg.method.guidance)
    encoder: TextEncoder = family.encoder
    if model.embeddings is not None:
        encoder = CachedText(LazyTextEncoder(family), Path(model.embeddings), encoder_identity(family), device)
    roles = DiffusersRoles(family, start=start, half=cfg.loop.precision == "bf16", head_seed=head_seed(cfg))
    own = cfg.method.model_copy(update={"student_steps": start.student_times(cfg.method.student_steps)})
    rewards = build_rewards(cfg.rewards, device, given.functions) if cfg.method.rewarded else ()
    stream = _stream(cfg, groups, meta, encoder)
    latents = LatentSpec(family.latent_shape, roles.fake.family.native, family.teacher_times)
    codec = scoring_codec(family, device)
    method = method_of(own, roles, codec, rewards, latents, real, cfg.loop.micro_batch)
    sizes = tuple(_size(cfg, family.at_size(*size), start.at_size(*size), found) for size, found in stores.items())
    return Components(
        *(roles, family.codec, encoder, rewards, SeveralSizes(method, sizes) if sizes else method, stream),
        latent_shape=family.latent_shape,
        student_steps=own.student_steps,
        teacher_times=family.teacher_times,
        scoring=codec if model.scoring_decoder is not None else None,
        sizes=sizes,
    )


def _checked_prompts(
    cfg: RunConfig, real: StoredLatents | None, stores: Sequence[StoredLatents], given: GivenObjects
) -> tuple[list[list[str]], PromptRows | None]:
    """Groups of prompts and the rows of a single group. ValueError unless the rewards and ``stores`` can use them."""
    groups, meta = training_prompts(cfg, real, given.prompts)
    texts = [text for group in groups for text in group]
    for store in stores:
        store.check(texts)
    check_prompts(cfg.rewards, texts, meta)
    return groups, meta


def _stream(cfg: RunConfig, groups: list[list[str]], rows: PromptRows | None, encoder: TextEncoder) -> PromptStream:
    per_prompt = cfg.method.prompt_group
    return PromptStream(groups, encoder, cfg.loop.batch_size, cfg.loop.seed, per_prompt, [rows] if rows else None)


def _size(cfg: RunConfig, teacher: Family, start: Family, real: RealLatents | None) -> ImageSize:
    """What depends on the image size of these families."""
    sides, steps = (teacher.cfg.height, teacher.cfg.width), start.student_times(cfg.method.student_steps)
    return ImageSize(*sides, teacher.latent_shape, steps, teacher.teacher_times, real)


def head_seed(cfg: RunConfig) -> int | None:
    """Seed of the GAN head's weights; None without a GAN."""
    judged = isinstance(cfg.method, DMD2Config) and cfg.method.adversarial
    return cfg.loop.seed if judged else None


def compile_networks(cfg: RunConfig, components: Components) -> None:
    """torch.compile where model.compile asks for it. For programs that train: a few images are faster without."""
    if not (isinstance(cfg.model, DiffusersModel) and cfg.model.compile):
        return
    from gdmd.models.compile import require_compiler
    from gdmd.models.roles import DiffusersRoles

    assert isinstance(components.roles, DiffusersRoles)
    require_compiler(next(iter(components.roles.parameters("student").values())).device.type)
    components.roles.compile()


class MethodRoles(Roles, Protocol):
    """Roles with a GAN head, for DMD2, and a blended real score, for DMDR."""

    @property
    def critic(self) -> Critic | None: ...

    def blended_teacher(self, share: float) -> Denoiser: ...


@dataclass(frozen=True)
class LatentSpec:
    """The latents of a model: their shape, what the fake score's network predicts, and the teacher's sampling times."""

    latent_shape: tuple[int, int, int] = LATENT_SHAPE
    native: Native = "velocity"
    teacher_times: Callable[[int], Tensor] = times


SHAPES = LatentSpec()


def method_of(
    cfg: MethodConfig,
    roles: MethodRoles,
    codec: Codec,
    rewards: tuple[Reward, ...],
    latents: LatentSpec,
    real: RealLatents | None,
    micro_batch: int = 0,
) -> ResizableMethod:
    """The method of this configuration on these objects. micro_batch: samples per backward pass through the decoder."""
    parts = (roles, latents.latent_shape, latents.native, real)
    scorer = Scorer(codec, rewards, micro_batch)
    match cfg:
        case DMDConfig() as own:
            return Dmd(own, *parts, teacher_times=latents.teacher_times)
        case DMD2Config() as own:
            return Dmd2(own, *parts, critic=roles.critic)
        case DMDRConfig() as own:
            return Dmdr(own, *parts, scorer=scorer, blend=roles.blended_teacher)
        case DMDReFLConfig() as own:
            return DmdRefl(own, *parts, scorer=scorer)
        case DMDNFTConfig() as own:
            return DmdNft(own, *parts, scorer=scorer)
        case DMDGRPOConfig() as own:
            return DmdGrpo(own, *parts, scorer=scorer)
        case ShuffledTiltedGDMDConfig() as own:
            return GdmdTiltedShuffled(own, *parts, scorer=scorer)
        case TiltedGDMDConfig() as own:
            return GdmdTilted(own, *parts, scorer=scorer)
        case GDMDAblationConfig() as own:
            return CONTROLS[own.control](own, *parts, scorer=scorer)
        case GDMDConfig() as own:
            return Gdmd(own, *parts, scorer=scorer)
