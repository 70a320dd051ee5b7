"""Real models: which diffusers pipeline is distilled, at what size, and how its roles are stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount, Positive, Probability

FamilyName = Literal["sd15", "sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "sana"]
Pixels = Annotated[Count, Field(multiple_of=8)]
"""A side of an image; the families' latents are at least eight times smaller."""


class DiffusersModel(Config):
    """A text-to-image pipeline in diffusers' format: a folder, or the id of one on a model hub."""

    kind: Literal["diffusers"] = "diffusers"
    path: str = Field(description="Folder with model_index.json (never touches the network), or a hub id ORG/NAME.")
    family: FamilyName | None = Field(
        default=None, description="What the pipeline must be; default: read from its model_index.json."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; pin a commit to repeat.")
    variant: str | None = Field(default=None, description='Variant of the weight files, for example "fp16".')
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Of the frozen weights and of the computation; trained weights are always fp32."
    )
    height: Pixels = Field(default=1024, description="Image height in pixels.")
    width: Pixels = Field(default=1024, description="Image width in pixels.")
    full: Literal["none", "student", "fake", "both"] = Field(
        default="none",
        description="Roles trained with all their weights, each a separate copy; the others are adapters on one trunk.",
    )
    lora_rank: Count = Field(default=64, description="Rank of student and fake adapters (arXiv 2605.26108: 32 to 64).")
    lora_alpha: Positive = Field(default=64.0, description="Adapters are scaled by lora_alpha / lora_rank.")
    lora_targets: tuple[str, ...] = Field(
        default=(), description="Ends of the names of the linear layers with adapters; empty = the family's own."
    )
    checkpointing: bool = Field(
        default=True, description="Recompute activations in the backward pass: less memory, a third more time."
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the repeated blocks for training: faster steps after minutes of compiling. "
        "Needs Triton on a GPU, a C++ compiler on a CPU.",
    )
    forward_chunk: NonNegativeCount = Field(
        default=8,
        description="Largest batch of one network call without gradient (guidance doubles the rows); 0 = no limit. "
        "Above it roll-outs and scores are made in parts: their memory no longer grows with loop.batch_size.",
    )
    t5: bool = Field(default=True, description="SD3: load the T5 encoder; false saves 9 GB and costs spelled text.")
    max_tokens: NonNegativeCount = Field(
        default=0, description="Caption tokens of the long text encoder; 0 = the family's default."
    )
    embeddings: str | None = Field(
        default=None,
        description="Folder of text embeddings: all prompts are embedded there once, then the encoders are unloaded. "
        "null = embed every batch, encoders in memory.",
    )
    embedded_guidance: NonNegative = Field(
        default=3.5,
        description="Guidance fed to a network that reads it (FLUX.1-dev, FLUX.2-dev, LCM UNets); others ignore it.",
    )
    guidance_rescale: Probability = Field(
        default=0.0,
        description="UNets: rescaled guidance, 0 = off (arXiv 2305.08891: 0.7 for models with zero terminal SNR).",
    )
    distilled: bool | None = Field(
        default=None,
        description="Whether the base is a few-step or guidance-distilled model, which is refused as a teacher with "
        "guidance; null = detected from its files and its name.",
    )
    decode_chunk: Count = Field(default=1, description="Images per call of the VAE; more is faster and takes memory.")
    scoring_decoder: str | None = Field(
        default=None,
        description="Folder or hub id of an AutoencoderTiny through which rewards see latents: less memory, rougher.",
    )
    scoring_decoder_revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub id in scoring_decoder; pin a commit to repeat."
    )
    scoring_check: NonNegativeCount = Field(
        default=8,
        description="Teacher samples on which a run with a scoring_decoder first measures how each reward differs "
        "from that through the VAE (RUN/scoring_decoder.json); at most a batch, 0 = none.",
    )
    decode_tiled: bool = Field(
        default=False, description="Decode in overlapping tiles of 512 pixels: less memory, small seams."
    )
