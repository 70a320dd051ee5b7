"""Latents of real images on disk: computed once, drawn by sample, and never those of other images or VAEs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import png

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import RunConfig
from gdmd.data import latent_cache
from gdmd.data.latent_cache import INDEX, LatentStore
from gdmd.data.shards import SHARD
from gdmd.diffusion.rng import SampleRng
from gdmd.types import PromptBatch


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.tile(np.arange(16, dtype=np.uint16) * 4369, (16, 1))).save(file, "PNG")
    return file.getvalue()


def transparent() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (255, 0, 255, 0)).save(file, "PNG")
    return file.getvalue()


def doubled(images: torch.Tensor) -> torch.Tensor:
    return 2 * images


def store(root: Path, source: Path, identity: str = "vae") -> LatentStore:
    return LatentStore(root / "latents", identity, (str(source),), "a VAE")


def drawn(texts: Sequence[str]) -> tuple[PromptBatch, SampleRng]:
    """A batch of these captions, and the generator with which a store draws its images."""
    index = torch.arange(len(texts))
    return PromptBatch(index, tuple(texts), index, {}, {}), SampleRng(0, 0, index)


def never() -> None:
    raise AssertionError("the encoder was called")


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(png(i))
        (folder / f"{i:03d}.txt").write_text(f"caption {i // 2}")
    return folder


def test_interruption_keeps_finished_shards(tmp_path: Path) -> None:
    source, calls = many(tmp_path / "images", SHARD + 4), []

    def dying(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if sum(calls) > SHARD:
            raise KeyboardInterrupt
        return doubled(images)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, source).prepare((8, 8), lambda: dying, 0)
    with pytest.raises(ValueError, match="gdmd latents"):
        store(tmp_path, source).open()
    again = store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    assert (again.images, again.encoded, again.captions) == (SHARD + 4, 4, SHARD // 2 + 2)
    assert store(tmp_path, source).prepare((8, 8), never, 0).encoded == 0  # type: ignore[arg-type]


def test_draws_depend_on_the_sample_only(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 4)
    made = store(tmp_path, source)
    made.prepare((8, 8), lambda: doubled, 0)
    latents = store(tmp_path, source).open()
    index = torch.arange(40)
    text = tuple(f"caption {i % 2}" for i in range(40))

    def at(start: int, stop: int) -> torch.Tensor:
        part = index[start:stop]
        batch = PromptBatch(part, text[start:stop], part, {}, {})
        return latents(batch, SampleRng(5, 7, part))

    whole = at(0, 40)
    assert torch.equal(whole, torch.cat([at(0, 7), at(7, 40)]))
    red = (whole[:, 0, 0, 0] * 255 / 2).round().long()
    assert set(red[0::2].tolist()) == {0, 1} and set(red[1::2].tolist()) == {2, 3}
    with pytest.raises(ValueError, match=r"2 of 3 prompts have no image.*'x', 'y'"):
        latents.check(["x", "caption 1", "y"])


def test_prompts_of_several_lines_are_captions(tmp_path: Path) -> None:
    """Prompts keep the line breaks of the same text, with which captions are stored as one line."""
    source = many(tmp_path / "images", 2)
    for number in range(2):
        (source / f"{number:03d}.txt").write_text("a red  circle\non a table\n")
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    latents, prompts = store(tmp_path, source).open(), ["a red  circle\non a table", "a red circle on a table"]
    latents.check(prompts)
    assert latents(*drawn(prompts)).shape == (2, 3, 8, 8)


def test_other_vaes_and_sources_are_errors(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 2)
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    with pytest.raises(ValueError, match="no complete latents of a VAE; run `gdmd latents`"):
        store(tmp_path, source, "another").open()
    with pytest.raises(ValueError, match="computed from "):
        store(tmp_path, tmp_path).open()


def test_damaged_images_are_reported_up_to_a_limit(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 4)
    (source / "001.png").write_bytes(png(1)[:-30])
    (source / "002.png").write_bytes(b"no image")
    made = store(tmp_path, source).prepare((8, 8), lambda: doubled, 2)
    assert [bad.name for bad in made.unusable] == ["001.png", "002.png"] and made.images == 2
    with pytest.raises(ValueError, match=r"more than real_data.unreadable = 1.*002.png"):
        store(tmp_path, source).prepare((8, 8), lambda: doubled, 1)


def test_unused_real_data_is_an_error() -> None:
    given_data = {"source": "images", "latents": "cache"}
    model = {"kind": "diffusers", "path": "x"}
    loop = {"steps": 1, "batch_size": 2}
    with pytest.raises(ValueError, match="reads no real images"):
        RunConfig(name="a", model=model, method=DMDConfig(), real_data=given_data, loop=loop, rewards=[])
    with pytest.raises(ValueError, match="Shapes world"):
        RunConfig(name="a", method=DMDConfig(student_input="data"), real_data=given_data, loop=loop)
    read_it = RunConfig(
        name="a", model=model, method=DMDConfig(student_input="data"), real_data=given_data, loop=loop, rewards=[]
    )
    assert read_it.real_data is not None and read_it.real_data.source == ("images",)


def test_deleted_shard_is_computed_again(tmp_path: Path) -> None:
    source = many(tmp_path / "images", SHARD + 2)
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    max((tmp_path / "latents").rglob("shard_*"), key=lambda file: file.stat().st_size).unlink()  # that of SHARD images
    with pytest.raises(ValueError, match=f"latents of {SHARD} images are missing"):
        store(tmp_path, source).open()
    assert store(tmp_path, source).prepare((8, 8), lambda: doubled, 0).encoded == SHARD
    latents = store(tmp_path, source).open()(*drawn([f"caption {SHARD // 2}"]))
    assert round(float(latents[0, 0, 0, 0]) * 255 / 2) in (SHARD, SHARD + 1)


def test_images_whose_decoding_changed_are_encoded_again(tmp_path: Path, caplog: Any) -> None:
    """The first version's store has the hashes of files alone as keys, and no "decoding" in its index."""
    source = tmp_path / "images"
    source.mkdir()
    contents = {"plain": png(9), "gray": sixteen_bits(), "clear": transparent()}
    for name, content in contents.items():
        (source / f"{name}.png").write_bytes(content)
        (source / f"{name}.txt").write_text(name)
    old = store(tmp_path, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "plain", lambda content: True)
        assert old.prepare((8, 8), lambda: torch.zeros_like, 0).encoded == 3
    index = json.loads((old.folder / INDEX).read_text())
    (old.folder / INDEX).write_text(json.dumps({key: value for key, value in index.items() if key != "decoding"}))
    with pytest.raises(ValueError, match="clipped 16-bit images.*run `gdmd latents`.*only such images"):
        store(tmp_path, source).open()
    assert store(tmp_path, source).prepare((8, 8), lambda: torch.ones_like, 0).encoded == 2
    latents = store(tmp_path, source).open()
    seen = {text: float(latents(*drawn([text]))[0, 0, 0, 0]) for text in contents}
    assert seen == {"plain": 0, "gray": 1, "clear": 1}
    (old.folder / INDEX).write_text(json.dumps({key: value for key, value in index.items() if key != "decoding"}))
    source.rename(tmp_path / "elsewhere")  # nothing to compare with: a warning
    store(tmp_path, source).open()
    assert "clipped 16-bit images" in caplog.text


def test_fingerprint(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    (source / "a.png").write_bytes(png(1))
    (source / "a.txt").write_text("one")
    found = []
    for change in (
        lambda: None,
        lambda: os.utime(source / "a.png", (1, 1)),
        lambda: (source / "a.txt").write_text("two"),
    ):
        change()
        own = store(tmp_path, source)
        own.prepare((8, 8), lambda: torch.zeros_like, 0)
        found.append(own.fingerprint())
    assert found[0] == found[1] != found[2] and store(tmp_path, source, "another VAE").fingerprint() is None


def test_images_of_other_formats_are_reported(tmp_path: Path) -> None:
    for name in ("a.heic", "b.tif"):
        (tmp_path / name).write_bytes(b"...." if name == "a.heic" else sixteen_bits())
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    made = store(tmp_path, tmp_path).prepare((8, 8), lambda: doubled, 1)
    assert [(bad.name, bad.why) for bad in made.unusable] == [
        ("a.heic", "is not a JPEG, PNG, WebP, GIF, TIFF or BMP file")
    ]
    assert made.images == 1


def test_folder_of_tars(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"list them, as in real_data.source=\[.*t.tar, ...\]"):
        store(tmp_path, tmp_path).prepare((8, 8), lambda: torch.zeros_like, 0)


def test_latents_in_the_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("one")
    own = store(tmp_path, tmp_path)
    own.prepare((8, 8), lambda: torch.zeros_like, 0)
    latents = own.open()
    assert latents(*drawn(["one"])).shape == (1, 3, 8, 8)


def test_moved_images(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    many(tmp_path / "images", 2)
    store(tmp_path, Path("images")).prepare((8, 8), lambda: doubled, 0)
    store(tmp_path, tmp_path / "images").open()
    (tmp_path / "images").rename("far")
    store(tmp_path, Path("far")).open()
    store(tmp_path, Path("images")).open()  # they are gone, the latents are not
    shutil.copytree("far", "other", copy_function=shutil.copyfile)
    for message, source in (
        ("computed from 'images', but real_data.source is 'other'", "other"),
        ("computed from", "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            store(tmp_path, Path(source)).open()
