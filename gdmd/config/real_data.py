"""Real images for training a real model, and the cache of their latents."""

from __future__ import annotations

from pydantic import Field, field_validator

from gdmd.config.base import Config, NonNegativeCount


class RealDataConfig(Config):
    """Images with captions: the real samples of DMD2's GAN, and the data for method.student_input = data."""

    source: tuple[str, ...] = Field(
        description="Folders of images with captions (same-stem .txt, .caption or .json; or metadata.jsonl or "
        "metadata.csv with file_name and text), or WebDataset tars (KEY.jpg|png|webp|... next to KEY.txt, KEY.caption "
        "or KEY.json with a caption).",
    )
    latents: str = Field(
        description="Folder for the latents of this data set; `gdmd latents RECIPE` computes them once."
    )
    unreadable: NonNegativeCount = Field(
        default=100,
        description="Number of images that `gdmd latents` may skip, each with a message (damaged, no caption), before "
        "it stops.",
    )

    @field_validator("source", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        """One path may be given without brackets."""
        return (given,) if isinstance(given, str) else given

    @field_validator("source")
    @classmethod
    def _some(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if not given:
            raise ValueError("is empty: give a folder of images with captions, or WebDataset tars")
        if len(set(given)) < len(given):
            raise ValueError(f"each source may be listed once, got {list(given)}")
        return given
