"""Weights of real models are read from safetensors only, wherever they come from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny  # noqa: E402

from gdmd.backbones.pipelines import open_family, scoring_codec  # noqa: E402


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trapped(file: Path, mark: Path) -> None:
    """Put a pickle under the other name that diffusers knows in the place of a safetensors file."""
    file.with_suffix(".bin").write_bytes(pickle.dumps(Trap(mark)))
    file.unlink()


def test_a_pickle_in_the_place_of_a_pipelines_weights_is_refused_unread(tmp_path: Path) -> None:
    folder, mark = tiny.save("sd15", tmp_path / "sd15"), tmp_path / "ran"
    trapped(folder / "unet" / "diffusion_pytorch_model.safetensors", mark)
    with pytest.raises(ValueError, match="cannot be loaded.*safetensors"):
        open_family(tiny.config(folder))
    assert not mark.exists()


def test_a_pickle_in_the_place_of_a_scoring_decoder_is_refused_unread(tmp_path: Path) -> None:
    folder, mark = tiny.save("sd15", tmp_path / "sd15"), tmp_path / "ran"
    decoder = diffusers.AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    decoder.save_pretrained(tmp_path / "tiny")
    family = open_family(tiny.config(folder, scoring_decoder=str(tmp_path / "tiny")))
    scoring_codec(family)
    trapped(tmp_path / "tiny" / "diffusion_pytorch_model.safetensors", mark)
    with pytest.raises(ValueError, match="no AutoencoderTiny can be loaded.*safetensors"):
        scoring_codec(family)
    assert not mark.exists()
