"""Configs of the models that recipes name by hub id, so that they can be planned without their files.

Each is the config.json of the named repository (unet or transformer, vae, scheduler) without diffusers' defaults. Text
encoders are given by their number of weights: CLIP-L 123 M, OpenCLIP bigG 695 M, T5-XXL's encoder 4.76 B, Qwen3-4B and 8B,
Qwen2.5-VL-7B, Qwen3-VL-4B and 8B, Mistral Small 3 24B, Gemma 2 2B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gdmd.config.model import FamilyName

CLIP_L, CLIP_L_PROJECTED, CLIP_BIG_G = 123_060_480, 123_650_304, 694_659_840
T5_XXL, QWEN3_4B, QWEN25_VL_7B = 4_762_310_656, 4_022_468_096, 8_292_166_656
QWEN3_VL_4B, QWEN3_VL_8B = 4_437_815_808, 8_767_123_696
QWEN3_8B, MISTRAL_SMALL_3, GEMMA2_2B = 8_190_735_360, 24_011_361_280, 2_614_341_888


@dataclass(frozen=True)
class NetworkConfig:
    """A diffusers class and its config."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownModel:
    """One model; ``encoders``: weights of all text encoders, ``t5``: those that model.t5 = false leaves out."""

    name: str
    family: FamilyName
    net: NetworkConfig
    vae: NetworkConfig
    scheduler: tuple[str, Mapping[str, Any]]
    encoders: int
    t5: int = 0


def _kl(channels: int, **options: Any) -> NetworkConfig:
    """The AutoencoderKL of Stable Diffusion: three halvings."""
    shape = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    return NetworkConfig("AutoencoderKL", {**shape, "latent_channels": channels, **options})


_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
_VP = ("DDIMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_DYNAMIC = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
_SD3_KL = _kl(16, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT)
_FLUX_KL = _kl(16, scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT)


def _sd15(name: str) -> KnownModel:
    net = NetworkConfig(
        "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    )
    return KnownModel(name, "sd15", net, _kl(4, scaling_factor=0.18215), _VP, CLIP_L)


def _sdxl(name: str) -> KnownModel:
    net = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    vae = _kl(4, scaling_factor=0.13025, sample_size=1024)
    return KnownModel(name, "sdxl", NetworkConfig("UNet2DConditionModel", net), vae, _VP, CLIP_L + CLIP_BIG_G)


def _sd3(name: str, heads: int = 24, **options: Any) -> KnownModel:
    net = {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": heads,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        **options,
    }
    text = CLIP_L_PROJECTED + CLIP_BIG_G + T5_XXL
    return KnownModel(name, "sd3", NetworkConfig("SD3Transformer2DModel", net), _SD3_KL, _FLOW, text, T5_XXL)


def _flux(name: str, *, guided: bool) -> KnownModel:
    net = NetworkConfig("FluxTransformer2DModel", {"guidance_embeds": guided})
    scheduler = _DYNAMIC if guided else ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0})
    return KnownModel(name, "flux", net, _FLUX_KL, scheduler, CLIP_L + T5_XXL)


def _flux2(name: str) -> KnownModel:
    net, vae = NetworkConfig("Flux2Transformer2DModel"), NetworkConfig("AutoencoderKLFlux2")
    return KnownModel(name, "flux2", net, vae, _DYNAMIC, MISTRAL_SMALL_3)


def _flux2_klein(name: str, blocks: tuple[int, int], heads: int, text: int) -> KnownModel:
    """blocks: double-stream, single-stream."""
    net = {
        "num_layers": blocks[0],
        "num_single_layers": blocks[1],
        "num_attention_heads": heads,
        "joint_attention_dim": 320 * heads,  # three layers of Qwen3
        "guidance_embeds": False,
    }
    kind = NetworkConfig("Flux2Transformer2DModel", net)
    return KnownModel(name, "flux2_klein", kind, NetworkConfig("AutoencoderKLFlux2"), _DYNAMIC, text)


def _z_image(name: str) -> KnownModel:
    return KnownModel(name, "z_image", NetworkConfig("ZImageTransformer2DModel"), _kl(16, **_NO_QUANT), _FLOW, QWEN3_4B)


def _qwen_image(name: str) -> KnownModel:
    net = NetworkConfig("QwenImageTransformer2DModel", {"in_channels": 64, "out_channels": 16})
    return KnownModel(name, "qwen_image", net, NetworkConfig("AutoencoderKLQwenImage"), _DYNAMIC, QWEN25_VL_7B)


def _qwen_image21(name: str) -> KnownModel:
    kinds = (NetworkConfig("QwenImage21Transformer2DModel"), NetworkConfig("AutoencoderKLQwenImage21"))
    return KnownModel(name, "qwen_image21", *kinds, _DYNAMIC, QWEN3_VL_8B)


def _krea2(name: str) -> KnownModel:
    scheduler = {"use_dynamic_shifting": True, "max_image_seq_len": 6400}
    kinds = (NetworkConfig("Krea2Transformer2DModel"), NetworkConfig("AutoencoderKLQwenImage"))
    return KnownModel(name, "krea2", *kinds, ("FlowMatchEulerDiscreteScheduler", scheduler), QWEN3_VL_4B)


def _sana(name: str, **options: Any) -> KnownModel:
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae = {
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    }
    solver = (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    )
    return KnownModel(
        name,
        "sana",
        NetworkConfig("SanaTransformer2DModel", options),
        NetworkConfig("AutoencoderDC", vae),
        solver,
        GEMMA2_2B,
    )


_DUAL: dict[str, Any] = {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_KNOWN = (
    _sd15("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    _sdxl("stabilityai/stable-diffusion-xl-base-1.0"),
    _sd3("stabilityai/stable-diffusion-3-medium-diffusers"),
    _sd3("stabilityai/stable-diffusion-3.5-medium", **_DUAL),
    _sd3("stabilityai/stable-diffusion-3.5-large", heads=38, qk_norm="rms_norm"),
    _flux("black-forest-labs/FLUX.1-dev", guided=True),
    _flux("black-forest-labs/FLUX.1-schnell", guided=False),
    _flux2("black-forest-labs/FLUX.2-dev"),
    _flux2_klein("black-forest-labs/FLUX.2-klein-base-4B", (5, 20), 24, QWEN3_4B),
    _flux2_klein("black-forest-labs/FLUX.2-klein-base-9B", (8, 24), 32, QWEN3_8B),
    _z_image("Tongyi-MAI/Z-Image"),
    _qwen_image("Qwen/Qwen-Image"),
    _sana("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", qk_norm="rms_norm_across_heads"),
    _qwen_image21("Qwen/Qwen-Image-2.1"),
    _krea2("krea/Krea-2-Raw"),
)
MODELS: Mapping[str, KnownModel] = {model.name: model for model in _KNOWN}
"""The models by hub id; the first of a family is its standard model."""


def model_of(path: str, family: FamilyName | None) -> KnownModel:
    """The model of a hub id, or the standard one of its family. ValueError if neither is known."""
    if path in MODELS:
        return MODELS[path]
    standard = [model for model in _KNOWN if model.family == family]
    if not standard:
        raise ValueError(
            f"model.path {path!r}: its config is not known and a plan downloads nothing; set model.family to plan the "
            f"standard model of that family, or give a folder. Known are {', '.join(MODELS)}"
        )
    return standard[0]
