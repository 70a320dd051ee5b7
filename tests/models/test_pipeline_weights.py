"""Pipelines that cannot be loaded as they are: pickles, variants, quantized or missing parts, other things at the path."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file, save_file

from gdmd.config.image_source import read_source
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.models import loading
from gdmd.models.loading import open_family, scoring_codec
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.networks import networks_of
from gdmd.sources.open import open_source


def refused(folder: Path, message: str, **model: Any) -> None:
    """By training, plan and image sources."""
    for load in (open_family, meta_family):
        with pytest.raises(ValueError, match=f"^model.path .*{message}"):
            load(tiny.config(folder, **model))
    with pytest.raises(ValueError, match=f"^source .*{message}"):
        open_source(read_source(f"{folder},dtype=fp32,device=cpu"))


def rewritten(file: Path, **keys: Any) -> None:
    """Other values of some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def trapped(file: Path, mark: Path) -> None:
    """Replace a safetensors file by a pickle under the name that diffusers would load."""
    file.with_suffix(".bin").write_bytes(pickle.dumps(Trap(mark)))
    file.unlink()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder, mark = tiny.save("sd15", tmp_path / "sd15"), tmp_path / "ran"
    trapped(folder / "unet" / "diffusion_pytorch_model.safetensors", mark)
    refused(folder, "component 'unet' are pickles.*not read.*safetensors")
    assert not mark.exists()


def test_pickled_scoring_decoder_is_not_read(tmp_path: Path) -> None:
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


def test_loading_is_pinned_and_folders_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(path: str, **options: Any) -> None:
        asked.append({"path": path, **options})
        raise OSError("not now")

    folder = tiny.save("sd15", tmp_path / "sd15")
    family = open_family(tiny.config(folder, scoring_decoder="org/taesd", scoring_decoder_revision="c0ffee"))
    monkeypatch.setattr(loading, "_hub_index", lambda *_: folder / loading.INDEX)
    monkeypatch.setattr(loading, "unreachable", lambda *_: "")
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
    """An AutoencoderTiny that decodes a latent position to 2^(sides - 1) pixels a side."""
    widths, blocks = (8,) * sides, (1,) * sides
    decoder = diffusers.AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    )  # fmt: skip
    decoder.save_pretrained(folder)
    return str(folder)


def run_of(model: DiffusersModel) -> RunConfig:
    return RunConfig(name="x", model=model, loop={}, rewards=[{"kind": "clip"}])


def test_scoring_decoder_of_other_latents(tmp_path: Path) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    absent = tiny.config(folder, scoring_decoder=str(tmp_path / "gone"))
    for look in (lambda: scoring_codec(open_family(absent)), lambda: networks_of(run_of(absent))):
        with pytest.raises(ValueError, match="^model.scoring_decoder .*no such folder.*holds config.json"):
            look()
    for decoder, message in (
        (tiny_decoder(tmp_path / "8", 4), r"decodes a latent position to 8 x 8 pixels.*sd15 is 2 x 2"),
        (tiny_decoder(tmp_path / "16", 2, channels=16), "decodes 16 channels, but latents of sd15 have 4"),
    ):
        model = tiny.config(folder, scoring_decoder=decoder)
        with pytest.raises(ValueError, match=message):
            scoring_codec(open_family(model))
        with pytest.raises(ValueError, match=message):
            networks_of(run_of(model))


@pytest.mark.parametrize("name", ["flux2", "sana"])
def test_family_without_tiny_decoders(tmp_path: Path, name: str) -> None:
    folder, decoder = tiny.save(name, tmp_path / name), tiny_decoder(tmp_path / "tiny", 2)
    model = tiny.config(folder, scoring_decoder=decoder)
    message = f"no AutoencoderTiny decodes latents of {name} .*sd15, sdxl, sd3, flux, z_image.*model.decode_tiled"
    with pytest.raises(ValueError, match=message):
        scoring_codec(open_family(model))
    with pytest.raises(ValueError, match=message):
        networks_of(run_of(model))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_other_variant_is_named(tmp_path: Path, part: str) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    refused(folder, f"'{part}' has weight files of the variant fp16 only; set (model.)?variant=fp16")
    meta_family(tiny.config(folder, variant="fp16"))
    assert open_family(tiny.config(folder, variant="fp16")).net is not None
    open_source(read_source(f"{folder},dtype=fp32,variant=fp16,device=cpu"))


@pytest.mark.parametrize(("part", "method"), [("unet", "bitsandbytes"), ("text_encoder", "torchao")])
def test_quantized_component(tmp_path: Path, part: str, method: str) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    refused(folder, rf"component '{part}' is quantized \({method}\)")


def test_the_suggested_conversion_of_pickles_works(tmp_path: Path) -> None:
    folder = tiny.save("sd15", tmp_path / "sd15")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refused(folder, r"DiffusionPipeline.from_pretrained\(FOLDER\).save_pretrained\(OTHER_FOLDER\)")
    diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None).save_pretrained(tmp_path / "other")
    open_family(tiny.config(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "part", "kept"),
    [
        ("sdxl", "tokenizer", ()),
        ("sdxl", "tokenizer_2", ("tokenizer_config.json", "vocab.json")),
        ("sd3", "tokenizer_3", ("tokenizer_config.json",)),
        ("qwen_image", "tokenizer", ("tokenizer_config.json",)),
    ],
)
def test_tokenizer_without_vocabulary(tmp_path: Path, name: str, part: str, kept: tuple[str, ...]) -> None:
    """transformers reads it as an empty one: all captions would be the same."""
    folder = tiny.save(name, tmp_path / name)
    for file in (folder / part).iterdir():
        file.unlink()
    for other in kept:
        (folder / part / other).write_text("{}")
    refused(folder, f"{part} contains no vocabulary")


def test_component_without_folder(tmp_path: Path) -> None:
    """diffusers would read it from the folder above, a tokenizer as an empty one."""
    folder = tiny.save("sdxl", tmp_path / "sdxl")
    shutil.rmtree(folder / "tokenizer_2")
    refused(folder, "component 'tokenizer_2' .CLIPTokenizer. has no folder")
    rewritten(folder / "model_index.json", tokenizer_2=[None, None])
    refused(folder, "component 'tokenizer_2' is missing from model_index.json")


def test_sd3_without_all_or_half_of_its_t5(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.save("sd3", tmp_path / "sd3")
    shutil.rmtree(folder / "tokenizer_3")
    refused(folder, "tokenizer_3 is missing, but text_encoder_3 is there")
    open_family(tiny.config(folder, t5=False))
    assert "text_encoder_3" not in caplog.text
    shutil.rmtree(folder / "text_encoder_3")
    assert open_family(tiny.config(folder)).pipe.text_encoder_3 is None
    assert caplog.text.count("text_encoder_3 has no folder, so captions are encoded without it") == 1
    caplog.clear()
    open_family(tiny.config(folder, t5=False))
    rewritten(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    open_family(tiny.config(folder))
    assert caplog.text == ""


@pytest.mark.parametrize("named", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline"])
def test_image_to_image_pipeline_suggests_the_conversion(tmp_path: Path, named: str) -> None:
    folder = tiny.save("sdxl", tmp_path / "sdxl")
    rewritten(folder / "model_index.json", _class_name=named)
    refused(folder, r"starts from an image.*: StableDiffusionXLPipeline.from_pretrained\(FOLDER\)")
    diffusers.StableDiffusionXLPipeline.from_pretrained(folder).save_pretrained(tmp_path / "other")
    open_family(tiny.config(tmp_path / "other"))


@pytest.mark.parametrize("named", [["pipeline", "Mine"], "NewestPipeline", None])
def test_unknown_pipeline_class(tmp_path: Path, named: Any) -> None:
    folder = tiny.save("sdxl", tmp_path / "sdxl")
    rewritten(folder / "model_index.json", _class_name=named)
    refused(folder, r"model_index.json names (the pipeline class )?\[?.*, which")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_start": None}, "cannot be loaded"),
        ("model_index.json", {"unet": ["diffusers", "UNetMagic"]}, "UNetMagic"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "MagicScheduler"]},
            "MagicScheduler",
        ),
    ],
)
def test_diffusers_errors_are_one_error(tmp_path: Path, file: str, changes: dict[str, Any], message: str) -> None:
    folder = tiny.save("sdxl", tmp_path / "sdxl")
    rewritten(folder / file, **changes)
    for load in (
        lambda: open_family(tiny.config(folder)),
        lambda: meta_family(tiny.config(folder)),
        lambda: open_source(read_source(f"{folder},dtype=fp32")),
    ):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (("pytorch_lora_weights.safetensors",), ".", "It is a LoRA: give its base model"),
        (("adapter_config.json", "adapter_model.safetensors"), ".", "It is a LoRA"),
        (("dogs.safetensors",), "dogs.safetensors", "It is a LoRA"),
        (("config.yaml", "metrics.jsonl"), ".", "It is a gdmd run folder"),
        (("sdxl.ckpt",), "sdxl.ckpt", "sdxl.ckpt is a single-file checkpoint"),
        (("model_index.json", "unet/config.json"), "unet", "Give .*[^t]$"),
        (("model_index.json",), "model_index.json", "Give .*"),
        (("snapshots/1a2b/model_index.json",), ".", "Give .*1a2b"),
        (("notes.txt",), ".", "not a diffusers pipeline: model_index.json is missing.$"),
    ],
)
def test_other_things_at_the_path_are_recognized(
    tmp_path: Path, files: tuple[str, ...], given: str, message: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    if files == ("dogs.safetensors",):
        save_file({"lora_unet_down.lora_down.weight": torch.zeros(1)}, tmp_path / files[0])
    for load in (open_family, meta_family):
        with pytest.raises(ValueError, match=message):
            load(DiffusersModel(path=str(tmp_path / given)))


def test_url_suggests_its_id() -> None:
    for given in ("https://huggingface.co/org/name", "huggingface.co/org/name/tree/main", "https://hf.co/org/name"):
        with pytest.raises(ValueError, match="Give the id: org/name$"):
            meta_family(DiffusersModel(path=given))


def test_plan_counts_the_loaded_text_encoders(tmp_path: Path) -> None:
    folder = tiny.save("sdxl", tmp_path / "sdxl")
    alone = meta_family(tiny.config(folder)).encoders
    for file in folder.glob("text_encoder*/*.safetensors"):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    assert {meta_family(tiny.config(folder, variant=variant)).encoders for variant in (None, "fp16")} == {alone}
