"""What text encoders read of captions: warnings for long prompts, limits missing from files, cache keys."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from stock_pipelines import shared

from gdmd.config.image_source import read_source
from gdmd.config.run import RunConfig
from gdmd.models.loading import adopt, encoder_identity, open_family
from gdmd.models.student_start import open_start
from gdmd.models.tokens import readers_of
from gdmd.programs.train import prepare
from gdmd.recipes.build_data import vae_identity
from gdmd.sources.open import open_source
from gdmd.types import Cond


def equal(one: Cond, other: Cond) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- long prompts


@pytest.mark.parametrize("name", tiny.BUILD)
def test_prompts_are_reported_as_equal_exactly_if_their_embeddings_are(folders: Path, name: str) -> None:
    encoder = shared(tiny.saved(folders, name)).encoder
    readers = readers_of(encoder.pipe, encoder.cfg.max_tokens)
    last = max(readers, key=lambda reader: reader.room)
    spare = len(last.tokens(["x"])[0]) - last.head - last.tail - 1  # a mark before the first word
    fits = ["x" * (last.room - 1 - spare) + letter for letter in "ab"]
    cut = ["x" * (last.room - spare) + letter for letter in "ab"]
    assert not equal(encoder.encode(fits[:1]), encoder.encode(fits[1:]))
    assert equal(encoder.encode(cut[:1]), encoder.encode(cut[1:]))
    assert last.reaching(fits).keys() == set(fits)
    assert "the same after truncation" not in str(encoder.long_prompts(fits))
    said = str(encoder.long_prompts([*cut, "short", "short"]))
    assert "2 of 3 prompts are longer" in said and "2 different prompts are the same after truncation" in said
    assert f"{last.name} reads {last.room} tokens: 2 longer, up to {last.room + 1}" in said
    assert ("model.max_tokens (now 256)" in said) == (name not in ("sd15", "sdxl"))


@pytest.mark.parametrize("name", tiny.BUILD)
def test_prompts_that_fit_are_not_reported(folders: Path, name: str) -> None:
    encoder = shared(tiny.saved(folders, name)).encoder
    room = min(reader.room for reader in readers_of(encoder.pipe, encoder.cfg.max_tokens))
    assert encoder.long_prompts(["", "a dog", "é" * (room // 4), "x" * (room - 2)]) is None


def test_readers_use_the_default_prompt_length(folders: Path) -> None:
    pipe = shared(tiny.saved(folders, "sana")).pipe
    (reader,) = readers_of(pipe)
    assert reader.room == 298  # of 300 two are the instruction's last token and the first of all
    assert readers_of(shared(tiny.saved(folders, "flux")).pipe)[1].limit == 512


def test_training_warns_once_about_long_prompts(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n" + "x" * 300 + "a\n" + "x" * 300 + "b\n")
    loop = {"steps": 1, "batch_size": 2, "threads": 1}
    for _ in range(2):  # the second run finds all captions on disk, and has no text encoder
        cfg = RunConfig(
            name="tiny",
            model=tiny.config(tiny.saved(folders, "z_image"), embeddings=str(tmp_path / "text")),
            method={"kind": "dmd", "fake_updates": 1},
            loop=loop,
            prompts={"file": str(file)},
            rewards=[],
            validation={"every": 0},
        )
        caplog.clear()
        prepare(cfg)
        (said,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert "2 of 3 prompts are longer" in said and "2 different prompts are the same" in said


def test_sampling_warns_about_long_prompts(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(read_source(f"{tiny.saved(folders, 'sdxl')},dtype=fp32,device=cpu"))
    source.check(["a dog", "x" * 80])
    assert "1 of 2 prompts are longer" in caplog.text and "text_encoder_2 reads 75 tokens: 1 longer" in caplog.text


def test_max_tokens_without_effect(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("sdxl", "sd3"):
        open_family(tiny.config(tiny.saved(folders, name), max_tokens=64))
    said = [one for one in caplog.messages if "max_tokens" in one]
    assert (
        len(said) == 1 and "model.max_tokens = 64 has no effect: the encoders of a StableDiffusionXLPipeline" in said[0]
    )


def test_embedded_guidance_without_effect(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("sdxl", "flux"):
        open_family(tiny.config(tiny.saved(folders, name), embedded_guidance=7.0))
        adopt(open_family(tiny.config(folders / name)).pipe, tiny.config(folders / name, embedded_guidance=7.0))
    said = [one for one in caplog.messages if "embedded_guidance" in one]
    wanted = "model.embedded_guidance = 7 has no effect: this StableDiffusionXLPipeline has no guidance embedding"
    assert len(said) == 2 and all(wanted in one for one in said), "from its folder, and as an open pipeline"


def test_t5_without_effect(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("flux", "sd3"):
        open_family(tiny.config(tiny.saved(folders, name), t5=False))
    (said,) = [one for one in caplog.messages if "model.t5" in one]
    assert "model.t5 = false has no effect: a FluxPipeline is used with all its text encoders" in said


@pytest.mark.parametrize(("name", "most"), [("sd3", 512), ("flux", 512), ("qwen_image", 1024)])
def test_max_tokens_above_the_pipelines_limit(folders: Path, name: str, most: int) -> None:
    with pytest.raises(ValueError, match=f"model.max_tokens = {most + 1}.*at most {most}"):
        open_family(tiny.config(tiny.saved(folders, name), max_tokens=most + 1))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(("name", "given"), [("sd15", 512), ("sdxl", None), ("sd3", 512)])
def test_tokenizer_gets_its_encoders_length(folders: Path, tmp_path: Path, name: str, given: int | None) -> None:
    wanted = shared(tiny.saved(folders, name))
    folder = Path(shutil.copytree(tiny.saved(folders, name), tmp_path / name))
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        config.pop("model_max_length")
        file.write_text(json.dumps(config | ({"model_max_length": given} if given else {})))
    texts = ["a dog", "x" * 100]
    found = open_family(tiny.config(folder))
    assert equal(found.encoder.encode(texts), wanted.encoder.encode(texts))
    late = open_family(tiny.config(folder), encoders=False)
    assert late.encoder.long_prompts(texts) == wanted.encoder.long_prompts(texts) is not None
    source: Any = open_source(read_source(f"{folder},dtype=fp32,device=cpu"))
    assert source.pipe.tokenizer.model_max_length == 77
    assert getattr(source.pipe, "tokenizer_max_length", 77) == 77


# ---------------------------------------------------------------- keys of caches


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Other content of the same size with the same time."""
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(change(content))
    assert file.stat().st_size == before.st_size and file.read_bytes() != content
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("file", "text", "images"),
    [
        ("text_encoder/model.safetensors", True, False),
        ("text_encoder_3/model.safetensors", True, False),
        ("tokenizer_2/tokenizer_config.json", True, False),
        ("vae/diffusion_pytorch_model.safetensors", False, True),
        ("transformer/diffusion_pytorch_model.safetensors", False, False),
    ],
)
def test_cache_key_depends_on_content(folders: Path, tmp_path: Path, file: str, text: bool, images: bool) -> None:
    def identities(folder: Path) -> tuple[str, str]:
        cfg = tiny.config(folder)
        return encoder_identity(open_family(cfg, encoders=False)), vae_identity(cfg)

    before = identities(tiny.saved(folders, "sd3"))
    folder = Path(shutil.copytree(tiny.saved(folders, "sd3"), tmp_path / "elsewhere"))
    assert identities(folder) == before
    rewrite(
        folder / file, lambda content: content.replace(b": 77", b": 76") if b": 77" in content else last_byte(content)
    )
    after = identities(folder)
    assert (after[0] != before[0], after[1] != before[1]) == (text, images)


def test_cache_key_depends_on_settings(folders: Path, tmp_path: Path) -> None:
    folder = tiny.saved(folders, "sd3")
    changes: list[dict[str, Any]] = [{}, {"max_tokens": 128}, {"dtype": "bf16"}, {"t5": False}]
    texts = [encoder_identity(open_family(tiny.config(folder, **one), encoders=False)) for one in changes]
    assert len(set(texts)) == len(changes)
    sizes: list[dict[str, Any]] = [{}, {"height": 64}, {"dtype": "bf16"}, {"decode_tiled": True}]
    assert len({vae_identity(tiny.config(folder, **one)) for one in sizes}) == len(sizes)


def test_cache_key_depends_on_the_empty_prompt_rule(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.saved(folders, "sdxl"), tmp_path / "sdxl"))
    before = encoder_identity(open_family(tiny.config(folder), encoders=False))
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = not index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert encoder_identity(open_family(tiny.config(folder), encoders=False)) != before


def test_cache_key_depends_on_the_unconditional_caption(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = open_family(tiny.config(tiny.saved(folders, "qwen_image")), encoders=False)
    before = encoder_identity(family)
    monkeypatch.setattr(type(family.encoder), "no_caption", "")
    assert encoder_identity(family) != before


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae", "tokenizer"])
def test_image_identity_depends_on_content(folders: Path, tmp_path: Path, part: str) -> None:
    def identity(folder: Path) -> object:
        info = open_source(read_source(f"{folder},dtype=fp32,device=cpu")).info
        return {key: value for key, value in info.identity.items() if key != "where"}

    before = identity(tiny.saved(folders, "sd15"))
    folder = Path(shutil.copytree(tiny.saved(folders, "sd15"), tmp_path / "sd15"))
    assert identity(folder) == before
    file = next(
        file for file in sorted((folder / part).iterdir()) if file.suffix == ".safetensors" or part == "tokenizer"
    )
    rewrite(file, last_byte if file.suffix == ".safetensors" else lambda content: content.replace(b"\n", b" ", 1))
    assert identity(folder) != before


def test_sana_source_uses_the_requested_size(folders: Path) -> None:
    """Sana's call would draw the nearest size of its table, and scale the image."""
    source: Any = open_source(read_source(f"{tiny.saved(folders, 'sana')},dtype=fp32,device=cpu,height=32,width=64"))
    assert source.arguments["use_resolution_binning"] is False
    assert source.info.identity["use_resolution_binning"] is False


def test_embedded_guidance_of_a_student(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An LCM student reads it, although its teacher does not."""
    pipe = tiny.sd15()
    pipe.register_modules(unet=tiny.unet(16, time_cond_proj_dim=9))
    pipe.save_pretrained(tmp_path / "lcm")
    base = tiny.saved(folders, "sd15")
    for student, notes in ((tmp_path / "lcm", 0), (base, 1)):
        open_start(open_family(tiny.config(base, student=str(student), embedded_guidance=7.0)))
        assert sum("embedded_guidance = 7 has no effect" in one for one in caplog.messages) == notes
