"""Small pipelines of diffusers' own classes, to be trained on the Shapes world: what ``gdmd pretrain pipeline`` builds.

Every part is seeded and needs no download. The text encoders stay random: an embedding that tells words and positions
apart is all that a network needs to learn what they mean. The VAEs of all families have the same shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gdmd.shapes.grammar import catalog

SIZE = 32
"""Pixels along a side of an image."""
CHANNELS = 8
"""Channels of a latent, whose side is a quarter of the image's."""
GRID = SIZE // 4
CLIP_TOKENS = 10
"""Positions of the CLIP encoders: a caption of seven words, the start and the end."""
QWEN_TOKENS = 12
"""Tokens of a Qwen prompt: the caption in its template."""
WORD_SCALE = 1.0
"""Standard deviation of word and position embeddings. CLIP's own 0.02 would leave less signal than the layers add."""
_WIDTH = 32  # of the text encoders


@dataclass(frozen=True)
class Miniature:
    """A small pipeline of one family. ``build``: new, with random weights from torch's generator.

    max_tokens: model.max_tokens, which is max_sequence_length of the pipeline's call; 0 = the call has none. For SD3 without
    T5 it is the number of zero rows after the CLIP embeddings. steps, seed, restart: of the shipped pipeline.
    """

    family: str
    build: Callable[[], Any]
    max_tokens: int
    steps: int
    seed: int
    restart: int = 0
    lr: float = 2e-3


def _clip_words() -> Any:
    """A CLIP tokenizer trained on the captions: one token a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(_words(), trainer)
    pieces = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in pieces["merges"]]
    made = ["".join(pair) for pair in merges]
    table = [*letters, *(letter + "</w>" for letter in letters), *made, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: row for row, piece in enumerate(dict.fromkeys(table))},
        merges=merges,
        model_max_length=CLIP_TOKENS,
    )


def _qwen_words() -> Any:
    """A Qwen tokenizer trained on the captions, with a chat template that is short."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([*_words(), *(f" {word}" for word in _words())], trainer)
    pieces = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in pieces["merges"]]
    special = ["<|im_start|>", "<|im_end|>"]
    table = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>", *special]
    words = Qwen2Tokenizer(
        vocab={piece: row for row, piece in enumerate(dict.fromkeys(table))},
        merges=merges,
        additional_special_tokens=special,
    )
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return words


def _diffusers() -> Any:
    """diffusers, imported when it is needed; its classes have no types."""
    import diffusers

    return diffusers


def _words() -> list[str]:
    """Every word of the language, each once."""
    return sorted({word for caption in catalog().captions for word in caption.text.split()})


def _clip(words: Any, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    _spread(encoder)
    return encoder


def _spread(encoder: nn.Module) -> None:
    """Embeddings of WORD_SCALE."""
    for module in encoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=WORD_SCALE)


def _vae(kind: type, **options: Any) -> Any:
    """A KL-VAE. Its latents get a standard deviation of 1 in training, so that every family can leave them as they are."""
    options = {"scaling_factor": 1.0} | options if kind.__name__ == "AutoencoderKL" else options
    return kind(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def sd3() -> Any:
    """StableDiffusion3Pipeline without T5: velocity, shift 3, an MMDiT with RMS-normalized queries and keys."""
    kit = _diffusers()

    words = _clip_words()
    transformer = kit.SD3Transformer2DModel(
        sample_size=GRID,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=22,
        num_attention_heads=4,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=88,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=GRID // 2,
        qk_norm="rms_norm",
    )
    return kit.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=kit.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(kit.AutoencoderKL, shift_factor=0.0),
        text_encoder=_clip(words, projected=True),
        tokenizer=words,
        text_encoder_2=_clip(words, projected=True),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sdxl() -> Any:
    """StableDiffusionXLPipeline: eps on SDXL's betas, a UNet with micro-conditioning, an empty prompt of zeros."""
    kit = _diffusers()

    words = _clip_words()
    time = 8  # numbers a micro-condition
    unet = kit.UNet2DConditionModel(
        sample_size=GRID,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(40, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),  # the number of heads, in spite of its name
        use_linear_projection=True,
        transformer_layers_per_block=1,
        cross_attention_dim=2 * _WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + _WIDTH,
    )
    scheduler = kit.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    return kit.StableDiffusionXLPipeline(
        vae=_vae(kit.AutoencoderKL),
        unet=unet,
        scheduler=scheduler,
        text_encoder=_clip(words, projected=False),
        tokenizer=words,
        text_encoder_2=_clip(words, projected=True),
        tokenizer_2=words,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def flux2_klein() -> Any:
    """Flux2KleinPipeline: velocity on packed latents, an encoder of Qwen3 whose layers 9, 18 and 27 are read."""
    kit = _diffusers()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words, width = _qwen_words(), 16
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    _spread(encoder)
    transformer = kit.Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=96,
        axes_dims_rope=(4, 8, 8, 4),
        guidance_embeds=False,
    )
    return kit.Flux2KleinPipeline(
        transformer=transformer,
        scheduler=kit.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(kit.AutoencoderKLFlux2),
        text_encoder=encoder,
        tokenizer=words,
    )


MINIATURES: Mapping[str, Miniature] = {
    one.family: one
    for one in (
        Miniature("sd3", sd3, 1, 14000, 3, restart=8000),
        Miniature("sdxl", sdxl, 0, 8000, 4),
        Miniature("flux2_klein", flux2_klein, QWEN_TOKENS, 14000, 5, restart=8000),
    )
}


def build_miniature(family: str, seed: int) -> Any:
    """A new pipeline of ``family`` with random weights from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MINIATURES[family].build()
