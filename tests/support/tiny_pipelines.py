"""Tiny random pipelines of the real diffusers classes, built without a download; about 0.1 M weights each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import logging as diffusers_logging
from tiny_tokenizers import WORDS as WORDS
from tiny_tokenizers import clip, clip_words, qwen3_vl, qwen_words, t5, t5_words
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.utils import logging as transformers_logging

from gdmd.config.model import DiffusersModel
from gdmd.config.shapes_pipeline import MARKER

SIZE = 32
"""Pixels; the tiny VAEs halve them once; Sana's, which is read without patches, twice."""
SHAPES_TOKENS = 60
"""Caption tokens of the Shapes pipeline of sd3, whose tokenizer reads characters."""
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        **options,
    )


def unet(cross: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=cross,
        **options,
    )


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )


def sd15() -> StableDiffusionPipeline:
    words = clip_words()
    parts = {"vae": vae(), "unet": unet(16), "scheduler": ddim(), "tokenizer": words}
    return StableDiffusionPipeline(
        **parts,
        text_encoder=clip(words, CLIPTextModel),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    words, words_2 = clip_words(), clip_words()
    micro = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return StableDiffusionXLPipeline(
        vae=vae(),
        unet=unet(32, projection_class_embeddings_input_dim=6 * 4 + 16, **micro),
        scheduler=ddim(),
        text_encoder=clip(words, CLIPTextModel),
        text_encoder_2=clip(words_2),
        tokenizer=words,
        tokenizer_2=words_2,
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    words, words_2, words_3 = clip_words(), clip_words(), t5_words()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=SIZE // 2,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(words),
        tokenizer=words,
        text_encoder_2=clip(words_2),
        tokenizer_2=words_2,
        text_encoder_3=t5(words_3),
        tokenizer_3=words_3,
    )


def flux() -> FluxPipeline:
    words, words_2 = clip_words(), t5_words()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(words, CLIPTextModel),
        tokenizer=words,
        text_encoder_2=t5(words_2),
        tokenizer_2=words_2,
    )


def flux2_parts(words: Qwen2Tokenizer, *, guided: bool) -> dict[str, Any]:
    """All but the encoder, three of whose layers stand side by side: 3 x 8 numbers a token."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guided,
    )
    images = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
    )
    torch.nn.init.normal_(images.bn.running_mean, std=0.3)
    torch.nn.init.uniform_(images.bn.running_var, 0.3, 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": images, "scheduler": scheduler, "tokenizer": words}


def flux2() -> Flux2Pipeline:
    """Its own processor needs torchvision; the tokenizer in it does the same for texts."""
    words = qwen_words()
    words.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    text = {"model_type": "mistral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 30, "head_dim": 4}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(words)}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 4, "image_size": 28, "patch_size": 14}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(text_encoder=encoder, **flux2_parts(words, guided=True))


def flux2_klein() -> Flux2KleinPipeline:
    words = qwen_words()
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=True,
        )
    )
    return Flux2KleinPipeline(text_encoder=encoder, **flux2_parts(words, guided=False))


def z_image() -> ZImagePipeline:
    words = qwen_words()
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=encoder,
        tokenizer=words,
    )


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    own = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **own)


def video_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )


def qwen_image() -> QwenImagePipeline:
    words = qwen_words()
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    shared = {"hidden_size": 16, "intermediate_size": 16}
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = shared | {"depth": 1, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=shared | text | {"vocab_size": len(words)}, vision_config=vision)
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    return QwenImagePipeline(
        transformer=transformer, scheduler=qwen_scheduler(), vae=video_vae(), text_encoder=encoder, tokenizer=words
    )


def sana() -> SanaPipeline:
    """Sana with the scheduler of its first release, which uses Euler's method, as gdmd does."""
    words = qwen_words()
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
    )
    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    deep = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(transformer=transformer, scheduler=scheduler, vae=deep, text_encoder=encoder, tokenizer=words)


def krea2() -> Krea2Pipeline:
    words = qwen_words("assistant")  # the end of its template must have 5 tokens
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return Krea2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=video_vae(),
        text_encoder=Qwen3VLModel(qwen3_vl(words)),
        tokenizer=words,
        text_encoder_select_layers=(1, 2),
    )


def qwen_image21() -> QwenImage21Pipeline:
    """Its own processor needs torchvision; Llava's does the same for texts."""
    words = qwen_words("<|image_pad|>")
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    same = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1] * 5, "temperal_downsample": [False] * 4}
    scaling = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    deep = AutoencoderKLQwenImage21(z_dim=4, num_res_blocks=1, **same, **scaling)
    return QwenImage21Pipeline(
        transformer=transformer,
        scheduler=qwen_scheduler(),
        vae=deep,
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl(words)),
        processor=LlavaProcessor(CLIPImageProcessorPil(), words, chat_template=template),
    )


BUILD: Mapping[str, Callable[[], Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "qwen_image21": qwen_image21,
    "sana": sana,
    "krea2": krea2,
}


def save(name: str, folder: Path) -> Path:
    """Save the pipeline of a family in a folder, with weights from seed 0."""
    torch.manual_seed(0)
    pipe = BUILD[name]()
    _fill_zeros(pipe)
    pipe.save_pretrained(folder)
    return folder


def saved(folders: Path, name: str) -> Path:
    """The same pipeline in the subfolder of its name, saved on first use."""
    return folders / name if (folders / name).exists() else save(name, folders / name)


def save_shapes(name: str, folder: Path) -> Path:
    """The same pipeline, marked as one that was trained on the Shapes world."""
    save(name, folder)
    marker = {"family": name, "command": "none", "seed": 0, "steps": 0, "height": SIZE, "width": SIZE}
    tokens = {"max_tokens": SHAPES_TOKENS if name == "sd3" else 0}
    (folder / MARKER).write_text(json.dumps(marker | tokens))
    return folder


def save_with_checker(folder: Path) -> Path:
    """sd15 as published, with a safety checker that flags every image."""
    config = CLIPConfig(
        vision_config={
            **{"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16},
            **{"num_hidden_layers": 1, "num_attention_heads": 2},
        },
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)
    checker.special_care_embeds_weights.data.fill_(5)
    torch.manual_seed(0)
    pipe = sd15()
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(folder)
    return folder


def _fill_zeros(pipe: Any) -> None:
    """Randomize the denoiser's layers that start at zero: they would hide what they are multiplied by."""
    net = pipe.components.get("unet") or pipe.transformer
    for weights in net.parameters():
        if not weights.any():
            torch.nn.init.normal_(weights, std=0.1)


def config(folder: Path, **changes: Any) -> DiffusersModel:
    """The model section of a recipe for a tiny pipeline."""
    small = {"height": SIZE, "width": SIZE, "dtype": "fp32", "lora_rank": 2, "lora_alpha": 4.0, "max_tokens": 256}
    return DiffusersModel(path=str(folder), **(small | changes))
