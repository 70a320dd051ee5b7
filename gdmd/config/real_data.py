"""Real images of a real model: where they are, and where their latents are kept."""

from __future__ import annotations

from pydantic import Field, field_validator

from gdmd.config.base import Config, NonNegativeCount


class RealDataConfig(Config):
    """Images with captions for a GAN's real side (DMD2) and for x_tau = re-noised real latents (student_input: data)."""

    source: tuple[str, ...] = Field(
        description="A folder of images with captions (same-stem .txt, .caption or .json; or metadata.jsonl or metadata.csv "
        "with file_name and text), or WebDataset tars (KEY.jpg|png|webp|... beside KEY.txt, KEY.caption or KEY.json with a "
        "caption).",
    )
    latents: str = Field(
        description="Folder of the latents of this one data set; `gdmd latents RECIPE` computes them once."
    )
    unreadable: NonNegativeCount = Field(
        default=100,
        description="Images that `gdmd latents` may pass over, each named (damaged, no caption); one more stops it.",
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
