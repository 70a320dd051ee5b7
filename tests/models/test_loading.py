"""Opening pipelines: what cannot be loaded as it is gives one clear error, in training, plans and image sources."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import httpx
import huggingface_hub as hub
import tiny_pipelines as tiny
import torch
from fuzzing import Trap
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from gdmd.config.image_source import read_source
from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.config.run import RunConfig
from gdmd.models import loading
from gdmd.models.loading import adopt, open_family
from gdmd.models.lora_files import lora_factors
from gdmd.models.roles import DiffusersRoles
from gdmd.models.scoring_decoder import scoring_codec
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.networks import networks_of
from gdmd.sources.open import open_source

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's pipeline that a test may break."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny.saved(folders, name), tmp_path / name))

    return copy


def rejected(folder: Path, message: str, *, plan: bool = True) -> None:
    """By training, plan and image sources."""
    for load in (open_family, meta_family) if plan else (open_family,):
        with pytest.raises(ValueError, match=f"^model.path .*{message}"):
            load(tiny.config(folder))
    with pytest.raises(ValueError, match=f"^source .*{message}"):
        open_source(read_source(f"{folder},dtype=fp32,device=cpu"))


def rewrite(file: Path, **keys: Any) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# ---------------------------------------------------------------- broken folders


def without_vocabulary(folder: Path, part: str, *kept: str) -> None:
    for file in (folder / part).iterdir():
        file.unlink()
    for name in kept:
        (folder / part / name).write_text("{}")


def rename_to_fp16(folder: Path, part: str) -> None:
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))


def quantize(folder: Path, part: str) -> None:
    rewrite(folder / part / "config.json", quantization_config={"quant_method": "torchao"})


def index(folder: Path, **keys: Any) -> None:
    rewrite(folder / "model_index.json", **keys)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": ("sdxl", lambda f: shutil.rmtree(f / "vae"), "component 'vae' .* has no folder"),
    "no tokenizer folder": ("sdxl", lambda f: shutil.rmtree(f / "tokenizer_2"), "'tokenizer_2' .* has no folder"),
    "not in the index": ("sdxl", lambda f: index(f, unet=[None, None]), "component 'unet' is missing from model_index"),
    "variant of the unet": (
        "sd15",
        lambda f: rename_to_fp16(f, "unet"),
        "'unet' has weight files of the variant fp16 only",
    ),
    "variant of an encoder": ("sd15", lambda f: rename_to_fp16(f, "text_encoder"), "'text_encoder' .*variant=fp16"),
    "quantized unet": ("sd15", lambda f: quantize(f, "unet"), r"component 'unet' is quantized \(torchao\)"),
    "quantized encoder": ("sd15", lambda f: quantize(f, "text_encoder"), "component 'text_encoder' is quantized"),
    "no vocabulary": ("sdxl", lambda f: without_vocabulary(f, "tokenizer"), "tokenizer contains no vocabulary"),
    "half a vocabulary": (
        "sdxl",
        lambda f: without_vocabulary(f, "tokenizer_2", "tokenizer_config.json", "vocab.json"),
        "tokenizer_2 contains no vocabulary",
    ),
    "half a T5": (
        "sd3",
        lambda f: shutil.rmtree(f / "tokenizer_3"),
        "tokenizer_3 is missing, but text_encoder_3 is there",
    ),
    "custom class": ("sdxl", lambda f: index(f, _class_name=["pipeline", "Mine"]), "model_index.json names .*, which"),
    "unknown class": ("sdxl", lambda f: index(f, _class_name="NewestPipeline"), "model_index.json names .*, which"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folder_is_rejected(copied: Callable[[str], Path], kind: str) -> None:
    name, break_it, message = BROKEN[kind]
    folder = copied(name)
    break_it(folder)
    rejected(folder, message)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_start": None}, "cannot be loaded"),
        ("model_index.json", {"unet": ["diffusers", "UNetMagic"]}, "UNetMagic"),
        ("model_index.json", {"scheduler": ["diffusers", "MagicScheduler"]}, "MagicScheduler"),
    ],
)
def test_errors_of_diffusers_become_value_errors(
    copied: Callable[[str], Path], file: str, changes: dict[str, Any], message: str
) -> None:
    folder = copied("sdxl")
    rewrite(folder / file, **changes)
    for load in (
        lambda: open_family(tiny.config(folder)),
        lambda: meta_family(tiny.config(folder)),
        lambda: open_source(read_source(f"{folder},dtype=fp32")),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_missing_and_damaged_weights(copied: Callable[[str], Path]) -> None:
    """transformers raises other errors where diffusers has ValueError and OSError."""
    folder = copied("sd15")
    config, weights = folder / "text_encoder" / "config.json", folder / "text_encoder" / "model.safetensors"
    whole = config.read_text()
    rewrite(config, intermediate_size=99)
    rejected(folder, "cannot be loaded: .*mismatched_sizes", plan=False)
    config.write_text(whole)
    content = weights.read_bytes()
    weights.write_bytes(content[:2000])
    rejected(folder, "cannot be loaded: .*deserializing header", plan=False)
    weights.write_bytes(content)
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="cannot be loaded.*diffusion_pytorch_model"):
        open_family(tiny.config(folder))


def test_sd3_may_lack_its_t5(copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("sd3")
    for part in ("tokenizer_3", "text_encoder_3"):
        shutil.rmtree(folder / part)
    assert open_family(tiny.config(folder)).pipe.text_encoder_3 is None
    assert caplog.text.count("text_encoder_3 has no folder, so captions are encoded without it") == 1
    caplog.clear()
    open_family(tiny.config(folder, t5=False))
    index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    open_family(tiny.config(folder))
    assert caplog.text == ""


def test_variant_is_loaded_by_its_option(copied: Callable[[str], Path]) -> None:
    folder = copied("sd15")
    before = meta_family(tiny.config(folder)).encoders
    rename_to_fp16(folder, "unet")
    rename_to_fp16(folder, "text_encoder")
    assert meta_family(tiny.config(folder, variant="fp16")).encoders == before
    open_family(tiny.config(folder, variant="fp16"))
    open_source(read_source(f"{folder},dtype=fp32,variant=fp16,device=cpu"))


# ---------------------------------------------------------------- pickles, and suggestions that must work


def test_pickles_are_not_read(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder, mark = copied("sd15"), tmp_path / "ran"
    family = open_family(tiny.config(folder, scoring_decoder=tiny_decoder(tmp_path / "tiny", 2)))
    scoring_codec(family)
    for file in (folder / "unet" / WEIGHTS, tmp_path / "tiny" / WEIGHTS):
        file.with_suffix(".bin").write_bytes(pickle.dumps(Trap(mark)))
        file.unlink()
    rejected(folder, "component 'unet' are pickles.*not read.*safetensors")
    with pytest.raises(ValueError, match="no AutoencoderTiny can be loaded.*safetensors"):
        scoring_codec(family)
    assert not mark.exists()


def test_the_suggested_conversion_of_pickles_works(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("sd15")
    file = folder / "unet" / WEIGHTS
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    rejected(folder, r"DiffusionPipeline.from_pretrained\(FOLDER\).save_pretrained\(OTHER_FOLDER\)")
    diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None).save_pretrained(tmp_path / "other")
    open_family(tiny.config(tmp_path / "other"))


def test_the_suggested_conversion_of_image_pipelines_works(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("sdxl")
    for named in ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLImg2ImgPipeline"):
        index(folder, _class_name=named)
        rejected(folder, r"starts from an image.*: StableDiffusionXLPipeline.from_pretrained\(FOLDER\)")
    diffusers.StableDiffusionXLPipeline.from_pretrained(folder).save_pretrained(tmp_path / "other")
    open_family(tiny.config(tmp_path / "other"))


# ---------------------------------------------------------------- scoring decoders


def tiny_decoder(folder: Path, sides: int, channels: int = 4) -> str:
    """An AutoencoderTiny that decodes a latent position to 2^(sides - 1) pixels a side."""
    widths, blocks = (8,) * sides, (1,) * sides
    decoder = diffusers.AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    )  # fmt: skip
    decoder.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "decoder", "message"),
    [
        ("sd15", None, "^model.scoring_decoder .*no such folder.*holds config.json"),
        ("sd15", (4, 4), "decodes a latent position to 8 x 8 pixels.*sd15 is 2 x 2"),
        ("sd15", (2, 16), "decodes 16 channels, but latents of sd15 have 4"),
        ("flux2", (2, 4), "decodes latents of flux2 .*sd15, sdxl, sd3, flux, z_image.*model.decode_tiled"),
    ],
)
def test_scoring_decoder_that_does_not_fit(
    copied: Callable[[str], Path], tmp_path: Path, name: str, decoder: tuple[int, int] | None, message: str
) -> None:
    path = str(tmp_path / "gone") if decoder is None else tiny_decoder(tmp_path / "tiny", *decoder)
    model = tiny.config(copied(name), scoring_decoder=path)
    run = RunConfig(name="x", model=model, loop={}, rewards=[{"kind": "clip"}])
    for load in (lambda: scoring_codec(open_family(model)), lambda: networks_of(run)):
        with pytest.raises(ValueError, match=message):
            load()


# ---------------------------------------------------------------- paths, hub ids and the network


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (("pytorch_lora_weights.safetensors",), ".", "It is a LoRA: give its base model"),
        (("adapter_config.json", "adapter_model.safetensors"), ".", "It is a LoRA"),
        (("dogs.safetensors",), "dogs.safetensors", "It is a LoRA"),
        (("config.yaml", "metrics.jsonl"), ".", "It is a gdmd run folder"),
        (("sdxl.ckpt",), "sdxl.ckpt", "sdxl.ckpt is a single-file checkpoint.*from_single_file.*save_pretrained"),
        (("model_index.json", "unet/config.json"), "unet", "Give .*[^t]$"),
        (("model_index.json",), "model_index.json", "Give .*"),
        (("snapshots/1a2b/model_index.json",), ".", "Give .*1a2b"),
        (("notes.txt",), ".", "not a diffusers pipeline: model_index.json is missing.$"),
        ((), "gone", "there is no such folder, and it is not a hub id"),
    ],
)
def test_other_things_at_the_path(tmp_path: Path, files: tuple[str, ...], given: str, message: str) -> None:
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


def test_wrong_or_unknown_family(copied: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family sd3.*model.family = sdxl"):
        open_family(tiny.config(copied("sd3"), family="sdxl"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="'WanPipeline', which has no adapter here; supported: .*FluxPipeline"):
        open_family(tiny.config(tmp_path))


OPEN: dict[str, Callable[[], Any]] = {
    "model.path 'org/model'": lambda: open_family(DiffusersModel(path="org/model", revision="v9")),
    "source 'org/model'": lambda: open_source(read_source("org/model,revision=v9")),
}


def response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize("what", OPEN)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda: errors.GatedRepoError("no", response=response(403)),
            "access is gated; accept its terms.*hf auth login",
        ),
        (lambda: errors.RevisionNotFoundError("no", response=response(404)), "it has no revision 'v9'"),
        (lambda: errors.RepositoryNotFoundError("no", response=response(404)), "the hub has no such id"),
        (lambda: errors.RemoteEntryNotFoundError("no", response=response(404)), "it has no file model_index.json"),
        (lambda: errors.LocalEntryNotFoundError("no"), "not in the cache, and the hub cannot be reached"),
        (lambda: errors.HfHubHTTPError("too many", response=response(429)), r"the hub cannot be read \(too many"),
    ],
)
def test_hub_errors_say_what_to_do(
    what: str, error: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error()

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=f"^{what}.*{message}"):
        OPEN[what]()


@pytest.mark.parametrize("what", OPEN)
def test_missing_library_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, find_spec = tmp_path / "model_index.json", importlib.util.find_spec
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(file))
    parts = dict.fromkeys(("transformer", "vae", "text_encoder", "scheduler"), ["diffusers", "Part"])
    parts |= {"tokenizer": ["transformers", "PixtralProcessor"]}
    file.write_text(json.dumps({"_class_name": "Flux2Pipeline", **parts}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    with pytest.raises(ValueError, match=rf"^{what}: component 'tokenizer' \(PixtralProcessor\) needs torchvision"):
        OPEN[what]()


def test_local_folder_needs_no_network(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a local folder used the network")

    folder = copied("sd3")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    open_family(tiny.config(folder))


def test_a_revision_of_a_folder_is_not_ignored_silently(
    copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("sd15")
    family = open_family(tiny.config(folder, revision="v1"))
    assert (
        f"model.path '{folder}' is not a hub id but on this machine, so its revision 'v1' has no effect" in caplog.text
    )
    source = read_source(f"{folder},revision=v1,device=cpu")
    with pytest.raises(ValueError, match=rf"revision=v1 is for a hub id, but {folder} is a folder; leave it out"):
        open_source(source)
    save_file({f"unet.x.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}, folder / "lora.safetensors")
    with pytest.raises(ValueError, match="0 of its 1 layers"):
        lora_factors(family.pipe, LoraFile(path=str(folder / "lora.safetensors"), revision="v2"))
    assert "so its revision 'v2' has no effect" in caplog.text


def test_open_pipeline_with_a_lora_is_refused_until_it_is_fused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """The roles' adapters take the place of any other: the teacher would be the model without its LoRA."""
    folder, file = copied("sd15"), tmp_path / "pytorch_lora_weights.safetensors"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = pipe.unet.get_submodule(layer).weight.shape
    pair = {"A": torch.ones(1, into), "B": torch.ones(out, 1)}
    save_file({f"unet.{layer}.lora_{part}.weight": value for part, value in pair.items()}, file)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="has a LoRA in unet as separate adapters"):
        adopt(pipe, tiny.config(folder))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = adopt(pipe, tiny.config(folder)).net.get_submodule(layer).weight
    plain = open_family(tiny.config(folder)).net.get_submodule(layer).weight
    assert torch.allclose(fused - plain, torch.ones(out, into), atol=1e-5)
    DiffusersRoles(adopt(pipe, tiny.config(folder)))
    assert adopt(pipe, tiny.config(folder)).name == "sd15", "a second training on the same pipeline"


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_open_pipeline_with_fused_projections_is_refused(name: str, copied: Callable[[str], Path]) -> None:
    """Its attention no longer calls to_q, to_k and to_v, whose adapters would never be trained."""
    folder = copied(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    (pipe.components.get("unet") or pipe.transformer).fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"has fused projections \(.*to_qkv\), .* without fuse_qkv_projections"):
        adopt(pipe, tiny.config(folder))


def test_open_pipeline_with_freeu_is_refused(copied: Callable[[str], Path]) -> None:
    """It is a setting of the module, which neither a full copy nor an exported student has."""
    folder = copied("sd15")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has FreeU on.* call disable_freeu\(\)"):
        adopt(pipe, tiny.config(folder))
    pipe.disable_freeu()
    assert adopt(pipe, tiny.config(folder)).name == "sd15"


def test_loading_is_pinned(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fail(path: str, **options: Any) -> None:
        calls.append({"path": path, **options})
        raise OSError("not now")

    folder = copied("sd15")
    family = open_family(tiny.config(folder, scoring_decoder="org/taesd", scoring_decoder_revision="c0ffee"))
    monkeypatch.setattr(loading, "_hub_index", lambda *_: folder / loading.INDEX)
    monkeypatch.setattr(loading, "unreachable", lambda *_: "")
    monkeypatch.setattr("gdmd.models.scoring_decoder.unreachable", lambda *_: "")
    for kind in (diffusers.StableDiffusionPipeline, diffusers.AutoencoderTiny):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    for path in ("org/sd15", str(folder)):
        with pytest.raises(ValueError, match="cannot be loaded: not now"):
            open_family(tiny.config(path, revision="abc", variant="fp16", dtype="bf16"))
    with pytest.raises(ValueError, match="no AutoencoderTiny can be loaded: not now"):
        scoring_codec(family)
    remote, local, decoder = calls
    for one in (remote, local):
        assert one["variant"] == "fp16" and one["dtype"] == torch.bfloat16 and one["use_safetensors"]
    assert remote["revision"] == "abc" and not remote["local_files_only"]
    assert "revision" not in local and local["local_files_only"]
    assert decoder["revision"] == "c0ffee" and not decoder["local_files_only"]
