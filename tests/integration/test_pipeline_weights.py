"""Weights of real models are read from safetensors only, wherever they come from."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny  # noqa: E402
import torch  # noqa: E402

from gdmd.backbones import pipelines  # noqa: E402
from gdmd.backbones.pipelines import open_family, scoring_codec  # noqa: E402
from gdmd.config.model import DiffusersModel  # noqa: E402
from gdmd.config.run import RunConfig  # noqa: E402
from gdmd.config.sources import read_source  # noqa: E402
from gdmd.programs.plan_networks import networks_of  # noqa: E402
from gdmd.programs.sources import open_source  # noqa: E402


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


def test_what_is_loaded_is_pinned_and_a_folder_never_asks_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(path: str, **options: Any) -> None:
        asked.append({"path": path, **options})
        raise OSError("not now")

    folder = tiny.save("sd15", tmp_path / "sd15")
    family = open_family(tiny.config(folder, scoring_decoder="org/taesd", scoring_decoder_revision="c0ffee"))
    monkeypatch.setattr(pipelines, "_hub_index", lambda *_: folder / pipelines.INDEX)
    monkeypatch.setattr(pipelines, "unreachable", lambda *_: "")
    for kind in (diffusers.StableDiffusionPipeline, diffusers.AutoencoderTiny):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    for path in ("org/sd15", str(folder)):
        with pytest.raises(ValueError, match="cannot be loaded: not now"):
            open_family(tiny.config(path, revision="abc", variant="fp16", dtype="bf16"))
    with pytest.raises(ValueError, match="no AutoencoderTiny can be loaded: not now"):
        scoring_codec(family)
    hub, local, decoder = asked
    for one in (hub, local):
        assert one["variant"] == "fp16" and one["dtype"] == torch.bfloat16 and one["use_safetensors"]
    assert hub["revision"] == "abc" and not hub["local_files_only"]
    assert "revision" not in local and local["local_files_only"]
    assert decoder["revision"] == "c0ffee" and not decoder["local_files_only"]


def tiny_decoder(folder: Path, sides: int, channels: int = 4) -> str:
    """An AutoencoderTiny that makes 2^(sides - 1) pixels of the side of a latent position."""
    widths, blocks = (8,) * sides, (1,) * sides
    decoder = diffusers.AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    )  # fmt: skip
    decoder.save_pretrained(folder)
    return str(folder)


def run_of(model: DiffusersModel) -> RunConfig:
    return RunConfig(name="x", model=model, loop={}, rewards=[{"kind": "clip"}])


def test_a_scoring_decoder_of_other_latents_is_refused_by_run_and_plan(tmp_path: Path) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    absent = tiny.config(folder, scoring_decoder=str(tmp_path / "gone"))
    for look in (lambda: scoring_codec(open_family(absent)), lambda: networks_of(run_of(absent))):
        with pytest.raises(ValueError, match="^model.scoring_decoder .*no such folder.*holds config.json"):
            look()
    for decoder, message in (
        (tiny_decoder(tmp_path / "8", 4), r"makes 8 x 8 pixels of a latent position.*sd15 has 2 x 2"),
        (tiny_decoder(tmp_path / "16", 2, channels=16), "decodes 16 channels, but latents of sd15 have 4"),
    ):
        model = tiny.config(folder, scoring_decoder=decoder)
        with pytest.raises(ValueError, match=message):
            scoring_codec(open_family(model))
        with pytest.raises(ValueError, match=message):
            networks_of(run_of(model))


@pytest.mark.parametrize("name", ["flux2", "flux2_klein", "qwen_image", "sana"])
def test_a_family_without_tiny_decoders_says_so(tmp_path: Path, name: str) -> None:
    folder, decoder = tiny.save(name, tmp_path / name), tiny_decoder(tmp_path / "tiny", 2)
    model = tiny.config(folder, scoring_decoder=decoder)
    message = f"no AutoencoderTiny decodes latents of {name} .*sd15, sdxl, sd3, flux, z_image.*model.decode_tiled"
    with pytest.raises(ValueError, match=message):
        scoring_codec(open_family(model))
    with pytest.raises(ValueError, match=message):
        networks_of(run_of(model))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_folder_of_another_variant_names_it(tmp_path: Path, part: str) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match=f"'{part}' has only weight files of the variant fp16; set model.variant=fp16"):
        open_family(tiny.config(folder))
    with pytest.raises(ValueError, match=f"'{part}' has only weight files of the variant fp16; set variant=fp16"):
        open_source(read_source(f"{folder},dtype=fp32"))
    assert open_family(tiny.config(folder, variant="fp16")).net is not None
    open_source(read_source(f"{folder},dtype=fp32,variant=fp16,device=cpu"))


@pytest.mark.parametrize(("part", "method"), [("unet", "bitsandbytes"), ("text_encoder", "torchao")])
def test_a_quantized_component_is_one_clear_error(tmp_path: Path, part: str, method: str) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    for load in (lambda: open_family(tiny.config(folder)), lambda: open_source(read_source(f"{folder},dtype=fp32"))):
        with pytest.raises(ValueError, match=rf"component '{part}' is quantized \({method}\)"):
            load()
