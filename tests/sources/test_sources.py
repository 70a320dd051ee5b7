"""Image sources: noise keyed by image, exports, pipelines and their errors."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_world import Gdmd

from gdmd.config.image_source import read_source
from gdmd.rewards.preprocessing import from_pil
from gdmd.sources.base import Source, SourceInfo, image_slots, record_settings
from gdmd.sources.folders import read_images
from gdmd.sources.open import kind_of, open_source

DAMAGED = (
    '{"base": "x", "dtype": "fp32", "merged": false, "scheduler": "x", "arguments": {"num_inference_steps": 4}, '
    '"rewards": [], "step": 1, "without": 3}'
)


def pixels(source: Source, texts: list[str], images: int = 2, batch: int = 100, seed: int = 5) -> torch.Tensor:
    slots = image_slots(texts, images)
    parts = (slots[k : k + batch] for k in range(0, len(slots), batch))
    return from_pil([one for part in parts for one in source.generate(part, seed)])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to one of 256 levels, which another batch or another order of sums may change."""
    return bool(((a - b).abs() < 1.01 / 255).all())


def test_pipeline_settings_of_a_run(gdmd: Gdmd) -> None:
    (gdmd.folder / "run").mkdir()
    (gdmd.folder / "run" / "config.yaml").write_text("name: x")
    with pytest.raises(ValueError, match="is a run, for which steps cannot be set"):
        kind_of(read_source("run,steps=4"))
    (gdmd.folder / "run" / "config.yaml").rename(gdmd.folder / "run" / "gdmd_export.json")
    with pytest.raises(ValueError, match="is an export, for which guidance, steps cannot be set"):
        kind_of(read_source("run,steps=4,guidance=2"))


def test_run_images_do_not_depend_on_the_batch(gdmd: Gdmd) -> None:
    gdmd.trained()
    source = open_source(read_source("run"))
    texts = ["a red ring", "two squares", "a blue circle"]
    whole = pixels(source, texts, images=2)
    assert torch.equal(whole, pixels(source, texts, images=2)) and not torch.equal(whole[0], whole[1])
    assert close(whole, pixels(source, texts, images=2, batch=1))
    assert close(whole[0::2], pixels(source, texts, images=1))  # fewer images are the first ones
    assert not close(whole, pixels(source, texts, images=2, seed=6))
    assert source.info.trained and source.info.nfe == 4 and source.info.step == 2


def test_teacher_source(gdmd: Gdmd) -> None:
    source = open_source(read_source("teacher-4-plain"))
    assert source.info.trained == () and source.info.nfe == 4
    with pytest.raises(ValueError, match="unknown word 'dog'"):
        source.check(["a dog"])


def test_folder_source(gdmd: Gdmd) -> None:
    from PIL import Image

    folder = gdmd.folder / "images"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n{"prompt": "a cat"}\n')
    for number, shade in enumerate((10, 20, 30)):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(folder / f"{number:05d}_0.png")
    source = open_source(read_source("images"))
    images = source.generate(image_slots(["a dog", "a cat", "a cat"], 1), seed=0)
    assert [image.getpixel((0, 0))[0] for image in images] == [20, 10, 30]  # type: ignore[index]
    with pytest.raises(ValueError, match="no images of the prompt 'a bird'"):
        source.check(["a bird"])
    with pytest.raises(ValueError, match="but image 2 is needed; add images, or ask for at most 1 with -n"):
        source.generate(image_slots(["a dog"], 2), seed=0)


CAPTIONS = ["a photo of two red apples", "a blue ring"]


@pytest.mark.parametrize("layout", ["official", "flat"])
def test_image_order_in_a_folder(tmp_path: Path, layout: str) -> None:
    from gdmd.sources.folders import read_images

    names = ["2", "10", "1", "._1"]
    if layout == "official":
        slot = tmp_path / "00000" / "samples"
        slot.mkdir(parents=True)
        (slot.parent / "metadata.jsonl").write_text('{"prompt": "a cat"}')
    else:
        slot, names = tmp_path, [f"00000_{name}" for name in names[:-1]] + ["._00000_1"]
        (slot / "prompts.jsonl").write_text('{"prompt": "a cat"}')
    for name in names:
        (slot / f"{name}.png").write_bytes(b"")
    (row,) = read_images(tmp_path).values()
    assert [image.stem.rpartition("_")[2] for image in row.images] == ["1", "2", "10"]


def pipeline(folders: Path, name: str) -> Path:
    pytest.importorskip("diffusers")
    import tiny_pipelines as tiny

    return tiny.saved(folders, name)


def exported(folders: Path, name: str, target: Path, **changes: Any) -> tuple[Any, Path]:
    """The components of a changed student, and its export, without a training run."""
    import tiny_pipelines as tiny

    from gdmd.config.run import RunConfig
    from gdmd.config.training import LoopConfig
    from gdmd.export.lora import save_lora
    from gdmd.export.pipeline import call_arguments, student_scheduler
    from gdmd.models.loading import open_family
    from gdmd.programs.export import describe
    from gdmd.recipes.build import build

    prompts = folders / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    model = tiny.config(pipeline(folders, name), **changes)
    reward = {"kind": "callable", "target": "operator:add"}
    cfg = RunConfig(name=name, model=model, loop=LoopConfig(), prompts={"file": str(prompts)}, rewards=[reward])
    components = build(cfg, "cpu")
    with torch.no_grad():
        for weights in components.roles.parameters("student").values():
            weights.add_(0.2 * torch.randn_like(weights))
    family, uniform = open_family(model), cfg.method.student_steps
    save_lora(family, components.roles.parameters("student"), target)
    student_scheduler(family, uniform).save_pretrained(target / "scheduler")
    info = describe(cfg, family, call_arguments(family, uniform), 7, merged=False)
    (target / "gdmd_export.json").write_text(json.dumps(info))
    return (cfg, components), target


@pytest.mark.parametrize(
    "name", ["sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "qwen_image21", "sana", "krea2"]
)
def test_export_round_trip(folders: Path, tmp_path: Path, name: str) -> None:
    from gdmd.recipes.open_run import student_row
    from gdmd.sources.runs import RunSource

    pipeline(folders, name)
    (cfg, components), folder = exported(folders, name, tmp_path / "export")
    run = RunSource(SourceInfo(name, "run", "run"), components, student_row(cfg, components))
    source = open_source(read_source(str(folder)))
    expected = pixels(run, CAPTIONS)
    assert close(pixels(source, CAPTIONS), expected)
    assert close(pixels(source, CAPTIONS, batch=1), expected) and not torch.equal(expected[0], expected[1])
    assert (source.info.kind, source.info.step, source.info.nfe) == ("export", 7, 4)
    assert source.info.trained == ("operator:add",)


def test_export_without_t5(folders: Path, tmp_path: Path) -> None:
    from gdmd.export.card import model_card
    from gdmd.recipes.open_run import student_row
    from gdmd.sources.runs import RunSource

    (cfg, components), folder = exported(folders, "sd3", tmp_path / "export", t5=False)
    source: Any = open_source(read_source(str(folder)))
    assert source.pipe.text_encoder_3 is None and source.pipe.tokenizer_3 is None
    run = RunSource(SourceInfo("sd3", "run", "run"), components, student_row(cfg, components))
    assert close(pixels(source, CAPTIONS), pixels(run, CAPTIONS))
    card = model_card(cfg, components.roles.family, {}, {}, merged=False)
    assert "dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)" in card


def test_pipeline_with_lora_scheduler_and_guidance(folders: Path, tmp_path: Path) -> None:
    slot = pipeline(folders, "sdxl")
    _, folder = exported(folders, "sdxl", tmp_path / "export")
    plain = f"{slot},dtype=fp32,steps=4,guidance=0,height=32,width=32"
    lora = f"{plain},lora={folder / 'pytorch_lora_weights.safetensors'}"
    texts = CAPTIONS[:1]
    bare, with_lora, lcm = (open_source(read_source(word)) for word in (plain, lora, f"{lora},scheduler=lcm"))
    alone = pixels(bare, texts, 2)
    assert close(alone, pixels(bare, texts, 2, batch=1))
    assert not close(alone, pixels(with_lora, texts, 2)) and bare.info.identity != with_lora.info.identity
    assert type(lcm.pipe).__name__ == "StableDiffusionXLPipeline"  # type: ignore[attr-defined]
    assert type(lcm.pipe.scheduler).__name__ == "LCMScheduler"  # type: ignore[attr-defined]
    assert close(pixels(lcm, texts, 2), pixels(lcm, texts, 2, batch=1))
    half = open_source(read_source(f"{lora},lora_scale=0.001"))
    assert (pixels(half, texts, 2) - alone).abs().mean() < 0.1 * (pixels(with_lora, texts, 2) - alone).abs().mean()


def test_timesteps_eta_and_shift(folders: Path) -> None:
    unet, flow = pipeline(folders, "sdxl"), pipeline(folders, "sd3")
    small = "dtype=fp32,guidance=1,height=32,width=32"
    texts, seen = CAPTIONS[:1], []

    def opened(word: str) -> Any:
        source: Any = open_source(read_source(word))
        net = source.pipe.unet if hasattr(source.pipe, "unet") else source.pipe.transformer
        seen.clear()
        net.register_forward_pre_hook(
            lambda _, given, named: seen.append(float((named["timestep"] if "timestep" in named else given[1]).max())),
            with_kwargs=True,
        )
        return source

    source = opened(f"{unet},{small},scheduler=lcm,timesteps=999+749+499+249")
    pixels(source, texts, 1)
    assert seen == [999, 749, 499, 249] and source.arguments["num_inference_steps"] == 4
    calm, noisy = (opened(f"{unet},{small},scheduler=tcd,steps=4{more}") for more in ("", ",eta=0.3"))
    assert not close(pixels(calm, texts, 1), pixels(noisy, texts, 1)) and "eta" not in calm.info.identity
    assert close(pixels(noisy, texts, 2), pixels(noisy, texts, 2, batch=1)), "the noise is keyed by image"
    for scheduler in ("flow_euler", "flow_dpm"):
        called = []
        for shift in (1, 6):
            pixels(opened(f"{flow},{small},scheduler={scheduler},shift={shift},steps=4"), texts, 1)
            called.append([step / 1000 for step in seen])
        even, shifted = called
        assert len(even) == 4 and shifted[1:3] == pytest.approx([6 * t / (1 + 5 * t) for t in even[1:3]], abs=0.02)


def test_local_pipeline_needs_no_network(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = pipeline(folders, "sd3")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    source = open_source(read_source(f"{slot},dtype=fp32,steps=1,height=32,width=32"))
    assert len(source.generate(image_slots(CAPTIONS[:1], 1), 0)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (",lora=nowhere.safetensors", "no such file or folder"),
        (",lora=a/b/weights.bin", "only .safetensors files"),
        (",lora=tests/nowhere.safetensors", "no such file or folder"),
        (",base=x", "base cannot be set"),
        (",shift=3", "shift = 3.0 is for flow models, and DDIMScheduler has none"),
        (",scheduler=flow_dpm", "flow_dpm works in StableDiffusion3Pipeline and SanaPipeline"),
        (",timesteps=999+499,steps=4", "steps = 4, but timesteps has 2"),
        (",eta=0.3,scheduler=lcm", "eta is set, but a LCMScheduler does not read it"),
    ],
)
def test_bad_pipeline_settings(folders: Path, settings: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = pipeline(folders, "sdxl")
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=message):
        open_source(read_source(f"{slot}{settings}"))


def test_a_malformed_line_is_named_by_its_own_number(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="line 3: no prompt"):
        read_images(tmp_path)


def test_a_folder_of_thousands_of_images_is_read_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{k}"}}\n' for k in range(2000)))
    for k in range(2000):
        (tmp_path / f"{k:05d}.png").touch()
    began = time.process_time()
    rows = read_images(tmp_path)
    assert time.process_time() - began < 3
    assert [row.images[0].stem for row in rows.values()] == [f"{k:05d}" for k in range(2000)]


def test_size_between_two_patches(tmp_path: Path) -> None:
    """FLUX works on multiples of 16 pixels; diffusers makes an image of 16 x 32 pixels if asked for 24 x 32."""
    import tiny_pipelines
    from diffusers import AutoencoderKL

    pipe = tiny_pipelines.flux()
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
    )
    type(pipe)(**{**pipe.components, "vae": vae}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="height = 24: flux works on multiples of 16 pixels; use 32"):
        open_source(read_source(f"{tmp_path},height=24,width=32"))
    source = open_source(read_source(f"{tmp_path},steps=1,height=32,width=48,dtype=fp32,device=cpu"))
    assert source.generate(image_slots(CAPTIONS[:1], 1), 0)[0].size == (48, 32)


def test_truncated_lora(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(bytes(20))
    with pytest.raises(ValueError, match="cut.safetensors. cannot be read"):
        open_source(read_source(f"{pipeline(folders, 'sdxl')},lora={tmp_path / 'cut.safetensors'}"))


@pytest.mark.parametrize("content", ["{", "[]", '{"base": "x"}', '{"arguments": 3}', DAMAGED])
def test_damaged_export_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "gdmd_export.json").write_text(content)
    with pytest.raises(ValueError, match="gdmd_export.json (cannot be read|lacks|is damaged)"):
        open_source(read_source(str(tmp_path)))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("teachr", "teacher"), ("teacher-4plain", "teacher-4-plain"), ("runs/sdxl-sed0", "runs/sdxl-seed0")],
)
def test_misspelled_source(gdmd: Gdmd, wrong: str, meant: str) -> None:
    Path("runs/sdxl-seed0").mkdir(parents=True)
    for command in (["sample", wrong, "-p", "a ring"], ["eval", wrong], ["eval", "preference", wrong, "-o", "x"]):
        ended = gdmd(*command)
        assert ended.code == 2 and f"does not exist. Did you mean {meant}?" in ended.err, command


def test_missing_source() -> None:
    with pytest.raises(ValueError, match="source ./nowhere: it does not exist. Give a run folder"):
        kind_of(read_source("./nowhere"))


def test_nonfinite_images(folders: Path) -> None:
    source: Any = open_source(read_source(f"{pipeline(folders, 'sd3')},dtype=fp32,steps=1,height=32,width=32"))
    with torch.no_grad():
        next(iter(source.pipe.transformer.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="are not finite"):
        source.generate(image_slots(CAPTIONS[:1], 1), 0)


def scaled(file: Path) -> None:
    """Other weights under the same names, in the same number of bytes."""
    from safetensors.torch import load_file, save_file

    save_file({name: 0.5 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("changed", ["base", "lora"])
def test_export_identity(folders: Path, tmp_path: Path, changed: str) -> None:
    base = Path(shutil.copytree(pipeline(folders, "sd3"), tmp_path / "base"))
    _, folder = exported(folders, "sd3", tmp_path / "export")

    def identity() -> Any:
        return open_source(read_source(f"{folder},base={base}")).info.identity

    first = identity()
    assert identity() == first
    moved = Path(shutil.move(base, tmp_path / "moved"))
    base = moved
    assert identity() == first, "the same weights in another place"
    scaled(
        next((base / "transformer").glob("*.safetensors")) if changed == "base" else next(folder.glob("*.safetensors"))
    )
    assert identity() != first


@pytest.mark.parametrize(
    ("before", "now", "keys"),
    [
        ({"steps": 4}, {"steps": 8}, ["steps"]),
        ({"steps": 4, "shift": 3.0}, {"steps": 4}, ["shift"]),  # a setting that is no longer given
        ({"steps": 4}, {"steps": 4, "shift": 3.0}, ["shift"]),
        ({"guidance": None}, {"guidance": 0.0}, ["guidance"]),  # the pipeline's default is not 0
        ({"guidance": None, "timesteps": []}, {}, []),
    ],
)
def test_image_folder_records_settings(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], keys: list[str]
) -> None:
    record_settings(tmp_path, SourceInfo("x", "pipeline", "x", identity=before), 0, tmp_path)
    info = SourceInfo("x", "pipeline", "x", identity=now)
    if not keys:
        record_settings(tmp_path, info, 0, tmp_path)
        return
    with pytest.raises(ValueError, match=f"{keys[0]} differ"):
        record_settings(tmp_path, info, 0, tmp_path)


class Drawing:
    """A pipeline whose images are its noise."""

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.draw = draw

    def __call__(self, prompt: list[str], **given: Any) -> Any:
        noise = self.draw(torch.zeros(len(prompt), 3, 4, 4))
        return SimpleNamespace(images=noise.sigmoid())


def drawing(draw: Callable[[torch.Tensor], torch.Tensor]) -> Source:
    pytest.importorskip("diffusers")
    from gdmd.sources.pipelines import PipelineSource

    return PipelineSource(SourceInfo("x", "pipeline", "x"), Drawing(draw), {})


def test_randn_like_is_keyed_by_image() -> None:
    source, same = drawing(torch.randn_like), drawing(lambda like: torch.randn(like.shape))
    together = pixels(source, CAPTIONS)
    assert torch.equal(pixels(source, CAPTIONS, batch=1), together) and torch.equal(pixels(same, CAPTIONS), together)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    "draw",
    [
        lambda like: torch.normal(0.0, 1.0, like.shape),
        lambda like: like.clone().normal_(),
        torch.rand_like,
        lambda like: torch.rand(like.shape),
        lambda like: torch.randn_like(like[0]),
        lambda like: torch.randn(like.shape, generator=torch.Generator()),
    ],
)
def test_unkeyed_noise(draw: Any) -> None:
    with pytest.raises(ValueError, match="cannot be keyed by image"):
        pixels(drawing(draw), CAPTIONS)


def test_trained_rewards_in_composites_and_servers() -> None:
    from gdmd.config.describe import trained_rewards
    from gdmd.config.run import RunConfig

    model = {"kind": "diffusers", "path": "org/model"}
    remote = {"kind": "remote", "url": "http://127.0.0.1:8766", "reward": "hps"}
    rewards = [{"kind": "composite", "parts": [{"reward": {"kind": "clip"}}, {"reward": remote}]}]
    cfg = RunConfig.model_validate({"name": "x", "model": model, "rewards": rewards, "loop": {}})
    assert trained_rewards(cfg) == ("composite", "clip", "remote hps", "hps")
    plain = RunConfig.model_validate(cfg.model_dump() | {"method": {"kind": "dmd"}})
    assert trained_rewards(plain) == ()


def test_grid_of_several_sizes(gdmd: Gdmd) -> None:
    from PIL import Image

    Path("images").mkdir()
    for k, size in enumerate([(80, 48), (30, 60)]):
        Image.new("RGB", size, (250, 0, 0)).save(f"images/00000_{k}.png")
    Path("images/prompts.jsonl").write_text('{"prompt": "a cat"}')
    arguments = ("sample", "images", "-p", "a cat", "-n")
    few = gdmd(*arguments, "5")
    assert few.code == 2 and "has 2 images of 'a cat'" in few.err and "ask for at most 2 with -n" in few.err

    def boxes(name: str) -> list[tuple[int, int]]:
        """Width and height of the red areas of a grid, column by column."""
        red = (from_pil([Image.open(name)])[0] - torch.tensor([250 / 255, 0, 0])[:, None, None]).abs().sum(0) < 1e-3
        columns = red.any(0).long()
        edges = (columns.diff().nonzero().flatten() + 1).tolist()
        return [(b - a, int(red[:, a:b].any(1).sum())) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    assert gdmd(*arguments, "2", "-o", "plain.png").code == 0 and boxes("plain.png") == [(80, 48), (30, 60)]
    assert gdmd(*arguments, "2", "-o", "twice.png", "--scale", "2").code == 0
    assert boxes("twice.png") == [(160, 96), (60, 120)]
