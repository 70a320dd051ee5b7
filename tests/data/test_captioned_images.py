"""Folders and tars of captioned images: what is read, what is passed over by name, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.run import RunConfig
from gdmd.data import image_files
from gdmd.data import latent_cache as real_latents
from gdmd.data.captioned_images import Captioned, Unusable, captioned_images, pixels
from gdmd.data.latent_cache import INDEX, SHARD, LatentStore
from gdmd.diffusion.rng import SampleRng
from gdmd.sources.folders import read_image, read_images
from gdmd.study import prepare
from gdmd.types import PromptBatch


def png(red: int, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 20, 30)).save(file, "PNG")
    return file.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return file.getvalue()


GOOD = tar([("a.png", png(1)), ("a.txt", b"one"), ("b.json", b'{"caption": "two"}'), ("b.png", png(2))])


def found(source: Path) -> list[Captioned | Unusable]:
    return list(captioned_images(source))


def read(source: Path) -> list[tuple[str, int]]:
    """(caption, red) of what can be used."""
    return [(f.caption, int(pixels(f.content, 8, 8)[0, 0, 0])) for f in found(source) if isinstance(f, Captioned)]


def test_folder_jsonl_and_tar_give_the_same_images(tmp_path: Path) -> None:
    beside, listed = tmp_path / "beside" / "deep", tmp_path / "listed"
    for folder in (beside, listed):
        folder.mkdir(parents=True)
        for name, red in (("a", 1), ("b", 2)):
            (folder / f"{name}.png").write_bytes(png(red))
    (beside / "a.txt").write_text("one\n")
    (beside / "b.txt").write_text("two")
    lines = ['{"file_name": "a.png", "text": "one"}', '{"file_name": "b.png", "text": "two"}']
    (listed / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.tar").write_bytes(GOOD)
    wanted = [("one", 1), ("two", 2)]
    assert read(tmp_path / "beside") == read(listed) == read(tmp_path / "t.tar") == wanted


def test_what_has_no_caption_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.tar").write_bytes(tar([("x/b.png", png(2)), ("x/c.png", png(2)), ("x/c.txt", b" ")]))
    assert found(tmp_path)[0] == Unusable("a.png", "has no caption a.txt")
    first, second = found(tmp_path / "t.tar")
    assert "t.tar/x/b.png" in str(first) and "no caption" in str(first) and "empty" in str(second)


def test_a_line_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "one"}')
    with pytest.raises(ValueError, match="leads out of the folder"):
        found(tmp_path / "d")


def test_names_of_a_tar_write_nothing_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    (inner / "t.tar").write_bytes(tar([("../../x.png", png(1)), ("../../x.txt", b"one")]))
    assert read(inner / "t.tar") == [("one", 1)]
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "t.tar"]
    (inner / "t.tar").write_bytes(GOOD[:1600])
    with pytest.raises(ValueError, match="truncated, damaged"):
        found(inner / "t.tar")


def test_an_image_is_turned_upright_covers_the_size_and_is_cropped_at_the_center() -> None:
    picture = Image.new("RGB", (30, 10))
    picture.paste((200, 0, 0), (10, 0, 20, 10))
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 3  # upside down
    picture.paste((0, 200, 0), (10, 0, 20, 2))
    picture.save(file, "PNG", exif=turned)
    square = pixels(file.getvalue(), 10, 10)
    assert square.dtype == torch.uint8 and square.shape == (3, 10, 10)
    assert (square[0, :8] == 200).all() and (square[1, 8:] == 200).all()


def tif(values: np.ndarray) -> bytes:
    return stored(Image.fromarray(values), "TIFF")


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def painted(mode: str, clear: Any, ink: Any) -> Image.Image:
    """16 x 16: ``clear``, with a square of ``ink`` in the middle."""
    image = Image.new(mode, (16, 16), clear)
    image.paste(ink, (4, 4, 12, 12))
    return image


def indexed(clear: Any = 0) -> bytes:
    """Color 0 of the palette (magenta) is transparent, color 1 is red."""
    image = painted("P", 0, 1)
    image.putpalette([255, 0, 255, 200, 40, 40])
    return stored(image, transparency=clear)


def animated(kind: str) -> bytes:
    first, second = painted("RGB", WHITE, RED), painted("RGB", "black", "black")
    options = {"lossless": True} if kind == "WEBP" else {}
    return stored(first, kind, save_all=True, append_images=[second], **options)


RAMP = np.tile(np.arange(16) * 4369, (16, 1))  # 0 ... 65535, which is 17 levels of 8 bits a column
WHITE, RED, GRAY = (255, 255, 255), (200, 40, 40), (136, 136, 136)
TURNED = Image.Exif()
TURNED[0x0112] = 6
AS_SEEN: dict[str, tuple[bytes, Any, Any]] = {
    "16-bit gray": (stored(Image.fromarray(RAMP.astype(np.uint16))), (0, 0, 0), GRAY),
    "16-bit gray, white transparent": (stored(Image.fromarray(RAMP.astype(np.uint16)), transparency=0), WHITE, GRAY),
    "16-bit TIFF": (tif(RAMP.astype(np.uint16)), (0, 0, 0), GRAY),
    "32-bit TIFF of 16-bit values": (tif(RAMP.astype(np.int32)), (0, 0, 0), GRAY),
    "float TIFF up to 1": (tif((RAMP / 65535).astype(np.float32)), (0, 0, 0), GRAY),
    "float TIFF up to 255": (tif((RAMP / 257).astype(np.float32)), (0, 0, 0), GRAY),
    "float TIFF up to 65535": (tif(RAMP.astype(np.float32)), (0, 0, 0), GRAY),
    "hidden color": (stored(painted("RGBA", (255, 0, 255, 0), (*RED, 255))), WHITE, RED),
    "half transparent": (stored(painted("RGBA", (0, 0, 0, 51), (*RED, 255))), (204, 204, 204), RED),
    "gray with alpha": (stored(painted("LA", (0, 0), (136, 255))), WHITE, GRAY),
    "palette": (indexed(), WHITE, RED),
    "palette with alpha": (indexed(bytes([0, 255])), WHITE, RED),
    "a transparent color": (stored(painted("RGB", "magenta", RED), transparency=(255, 0, 255)), WHITE, RED),
    "a transparent gray": (stored(painted("L", 9, 136), transparency=9), WHITE, GRAY),
    "opaque RGBA": (stored(painted("RGBA", (0, 0, 0, 255), (*RED, 255))), (0, 0, 0), RED),
    "1 bit": (stored(painted("1", 1, 0)), WHITE, (0, 0, 0)),
    "CMYK": (stored(painted("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "JPEG", quality=100), WHITE, (255, 0, 0)),
    "GIF": (stored(painted("RGB", WHITE, RED), "GIF"), WHITE, RED),
    **{f"animated {kind}": (animated(kind), WHITE, RED) for kind in ("GIF", "WEBP", "PNG")},
}


@pytest.mark.parametrize("name", AS_SEEN)
def test_an_image_is_read_as_a_viewer_shows_it_by_training_scorers_and_study(name: str, tmp_path: Path) -> None:
    content, corner, middle = AS_SEEN[name]
    file = tmp_path / "a.png"
    file.write_bytes(content)
    trained = pixels(content, 16, 16).permute(1, 2, 0).numpy()
    for seen in (trained, np.array(read_image(file)), np.array(prepare._open(file))):
        assert seen.shape == (16, 16, 3) and seen.dtype == np.uint8
        assert np.abs(seen[0, 0].astype(int) - corner).max() <= 1 and np.abs(seen[8, 8].astype(int) - middle).max() <= 1


def test_a_converted_image_is_reported_once_and_an_opaque_one_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_noted", set())
    for name in ("opaque RGBA", "16-bit gray", "1 bit"):
        pixels(AS_SEEN[name][0], 8, 8)
    assert not caplog.messages
    for name in ("hidden color", "palette", "float TIFF up to 255", "animated GIF"):
        for _ in range(2):
            pixels(AS_SEEN[name][0], 8, 8, f"{name}.png")
    said = [message.split(" (further")[0] for message in caplog.messages]
    assert said == [
        "hidden color.png has transparent pixels: they are shown on white",
        "float TIFF up to 255.png holds floating-point numbers from 0 to 255: 255 is read as white",
        "animated GIF.png is an animation or holds several pages: its first image is used",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70000, np.int32), "values run from 70000 to 70000"),
        (np.full((4, 4), -0.5, np.float32), "values run from -0.5"),
        (np.full((4, 4), np.nan, np.float32), "values run from nan"),
    ],
)
def test_values_without_a_known_white_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(tif(values), 4, 4)


def test_a_scored_photo_is_turned_upright(tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 16), RED)
    wide.paste((0, 0, 0), (0, 0, 16, 16))
    wide.save(tmp_path / "a.png", exif=TURNED)  # rotated by 90 degrees: black above red
    seen = np.array(read_image(tmp_path / "a.png"))
    assert seen.shape == (32, 16, 3) and tuple(seen[0, 0]) == (0, 0, 0) and tuple(seen[31, 15]) == RED
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read: cannot be decoded"):
        read_image(tmp_path / "cut.png")


def test_an_image_of_a_format_that_cannot_be_read_is_named_and_not_left_out(tmp_path: Path) -> None:
    for name in ("a.heic", "b.tif"):
        (tmp_path / name).write_bytes(b"...." if name == "a.heic" else tif(RAMP.astype(np.uint16)))
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    made = store(tmp_path, tmp_path).prepare((8, 8), lambda: doubled, 1)
    assert [(bad.name, bad.why) for bad in made.unusable] == [
        ("a.heic", "is not a JPEG, PNG, WebP, GIF, TIFF or BMP file")
    ]
    assert made.images == 1


@CASES
@given(content=mutated([GOOD], st.binary(max_size=6) | st.just(b"\0" * 512) | st.just(b"\xff" * 12)))
def test_a_tar_of_any_bytes_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.tar"
    file.write_bytes(content)
    refusal(lambda: found(file))


@CASES
@given(content=mutated([png(3)], st.binary(max_size=9)))
def test_an_image_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    refusal(lambda: pixels(content, 8, 8))


def doubled(images: torch.Tensor) -> torch.Tensor:
    return 2 * images


def store(root: Path, source: Path, identity: str = "vae") -> LatentStore:
    return LatentStore(root / "latents", identity, (str(source),), "a VAE")


def drawn(texts: Sequence[str]) -> tuple[PromptBatch, SampleRng]:
    """A batch of these captions, and the generator with which a store draws its images."""
    index = torch.arange(len(texts))
    return PromptBatch(index, tuple(texts), index, {}, {}), SampleRng(0, 0, index)


def never() -> None:
    raise AssertionError("the encoder was asked")


def many(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(png(i))
        (folder / f"{i:03d}.txt").write_text(f"caption {i // 2}")
    return folder


def test_a_kill_keeps_finished_shards_and_a_second_run_encodes_nothing(tmp_path: Path) -> None:
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


def test_all_images_of_a_caption_are_drawn_by_sample_alone(tmp_path: Path) -> None:
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


def test_other_vaes_and_other_sources_are_refused(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 2)
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    with pytest.raises(ValueError, match="no finished latents of a VAE; run `gdmd latents`"):
        store(tmp_path, source, "another").open()
    with pytest.raises(ValueError, match="made of "):
        store(tmp_path, tmp_path).open()
    (shard,) = (tmp_path / "latents").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        store(tmp_path, source)


def test_a_flipped_bit_in_a_latent_is_an_error_and_not_another_image(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 2)
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    (shard,) = (tmp_path / "latents").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    index = torch.zeros(1, dtype=torch.long)
    drawn_by = [SampleRng(seed, 0, index) for seed in range(20)]  # both images of the caption are drawn
    latents = store(tmp_path, source).open()
    with pytest.raises(ValueError, match=f"{shard.name}: damaged.*row 1"):
        [latents(PromptBatch(index, ("caption 0",), index, {}, {}), rng) for rng in drawn_by]


def test_damaged_images_are_named_and_too_many_stop(tmp_path: Path) -> None:
    source = many(tmp_path / "images", 4)
    (source / "001.png").write_bytes(png(1)[:-30])
    (source / "002.png").write_bytes(b"no image")
    made = store(tmp_path, source).prepare((8, 8), lambda: doubled, 2)
    assert [bad.name for bad in made.unusable] == ["001.png", "002.png"] and made.images == 2
    with pytest.raises(ValueError, match=r"more than real_data.unreadable = 1.*002.png"):
        store(tmp_path, source).prepare((8, 8), lambda: doubled, 1)


def test_real_data_that_nobody_reads_is_refused() -> None:
    given_data = {"source": "images", "latents": "cache"}
    model = {"kind": "diffusers", "path": "x"}
    loop = {"steps": 1, "batch_size": 2}
    with pytest.raises(ValueError, match="reads no real images"):
        RunConfig(name="a", model=model, method=DmdConfig(), real_data=given_data, loop=loop, rewards=[])
    with pytest.raises(ValueError, match="Shapes world"):
        RunConfig(name="a", method=DmdConfig(student_input="data"), real_data=given_data, loop=loop)
    read_it = RunConfig(
        name="a", model=model, method=DmdConfig(student_input="data"), real_data=given_data, loop=loop, rewards=[]
    )
    assert read_it.real_data is not None and read_it.real_data.source == ("images",)


def test_a_deleted_shard_is_computed_again_beside_the_others(tmp_path: Path) -> None:
    source = many(tmp_path / "images", SHARD + 2)
    store(tmp_path, source).prepare((8, 8), lambda: doubled, 0)
    max((tmp_path / "latents").rglob("shard_*"), key=lambda file: file.stat().st_size).unlink()  # that of SHARD images
    with pytest.raises(ValueError, match=f"latents of {SHARD} images are missing"):
        store(tmp_path, source).open()
    assert store(tmp_path, source).prepare((8, 8), lambda: doubled, 0).encoded == SHARD
    latents = store(tmp_path, source).open()
    index = torch.zeros(1, dtype=torch.long)
    drawn = latents(PromptBatch(index, (f"caption {SHARD // 2}",), index, {}, {}), SampleRng(0, 0, index))
    assert round(float(drawn[0, 0, 0, 0]) * 255 / 2) in (SHARD, SHARD + 1)


def test_latents_of_images_whose_decoding_changed_are_computed_again(tmp_path: Path, caplog: Any) -> None:
    """A store as the first version wrote it: known by the bytes of the files alone, no "decoding" in its index."""
    source = tmp_path / "images"
    source.mkdir()
    contents = {"plain": png(9), "gray": AS_SEEN["16-bit gray"][0], "clear": AS_SEEN["hidden color"][0]}
    for name, content in contents.items():
        (source / f"{name}.png").write_bytes(content)
        (source / f"{name}.txt").write_text(name)
    old = store(tmp_path, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_latents, "plain", lambda content: True)
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
    source.rename(tmp_path / "elsewhere")  # nothing to look at: said, not refused
    store(tmp_path, source).open()
    assert "clipped 16-bit images" in caplog.text


def test_the_fingerprint_of_latents_is_that_of_images_and_captions(tmp_path: Path) -> None:
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


def test_folders_as_people_have_them(tmp_path: Path) -> None:
    """Other endings of captions, linked folders (one of them upwards), hidden files of macOS and notebooks."""
    images = tmp_path / "images"
    (images / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (images / "link").symlink_to(tmp_path / "far")
    (images / "loop").symlink_to(images)
    for place in ("a.png", "b.png", "._a.png", ".ipynb_checkpoints/a.png", "link/c.png"):
        (images / place).write_bytes(png(3))
    (images / "a.caption").write_text("one")
    (images / "b.json").write_text('{"prompt": "two"}')
    (images / "link/c.txt").write_text("three")
    assert read(images) == [("one", 3), ("two", 3), ("three", 3)] and len(found(images)) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text,note\na.png,"one, red",x\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "one, red"}\n'),
    ],
)
def test_tables_of_captions_as_the_hub_has_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / name).write_text(content)
    assert read(tmp_path) == [("one, red", 1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.tar.gz", "unpack other archives"),
        ("nowhere", "does not exist; check the path"),
        ("shards-*.tar", "patterns are not expanded: list the files"),
    ],
)
def test_a_source_that_cannot_be_read_says_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        found(tmp_path / name)


def test_a_folder_of_tars_says_to_list_them(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"list them, as in real_data.source=\[.*t.tar, ...\]"):
        store(tmp_path, tmp_path).prepare((8, 8), lambda: torch.zeros_like, 0)


def test_latents_may_lie_in_the_folder_of_images_and_a_shard_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("one")
    own = store(tmp_path, tmp_path)
    own.prepare((8, 8), lambda: torch.zeros_like, 0)
    latents = own.open()
    assert latents(*drawn(["one"])).shape == (1, 3, 8, 8)
    next(own.folder.glob("shard_*")).unlink()
    with pytest.raises(ValueError, match="shard_.*: cannot be read .no such file.*gdmd latents"):
        latents(*drawn(["one"]))


def test_hidden_files_beside_scored_images_are_not_read(tmp_path: Path) -> None:
    """macOS writes them into archives."""
    samples = tmp_path / "00000" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a ring"}\n')
    (samples / "0000.png").write_bytes(png(1))
    (samples / "._0000.png").write_bytes(b"Mac OS X")
    (row,) = read_images(tmp_path).values()
    assert [image.name for image in row.images] == ["0000.png"]


def test_images_may_be_moved_or_named_in_another_way_and_not_be_others(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    many(tmp_path / "images", 2)
    store(tmp_path, Path("images")).prepare((8, 8), lambda: doubled, 0)
    store(tmp_path, tmp_path / "images").open()
    (tmp_path / "images").rename("far")
    store(tmp_path, Path("far")).open()
    store(tmp_path, Path("images")).open()  # they are gone, the latents are not
    shutil.copytree("far", "other", copy_function=shutil.copyfile)
    for message, source in (("made of 'images', but real_data.source is 'other'", "other"), ("made of", "nowhere")):
        with pytest.raises(ValueError, match=message):
            store(tmp_path, Path(source)).open()
