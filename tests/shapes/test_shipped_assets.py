"""The shipped VAE and teacher are what the documentation says: the checker survives the VAE, guidance helps."""

import json
from functools import lru_cache

import pytest
import torch

from gdmd.diffusion.generate import images_of, teacher_sampler
from gdmd.recipes.build import Components, build
from gdmd.recipes.read import read_recipe
from gdmd.runs.assets import asset_folder, asset_path, load_asset
from gdmd.shapes.check import shapeseval, summarize
from gdmd.shapes.grammar import catalog, draw_rows, fixed_rows
from gdmd.shapes.pretrain.scorer_data import draw_negatives, may_be_true
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.roles import ShapesCodec, load_vae

NAMES = ("shapes_vae", "shapes_teacher", "shapes_clip", "shapes_clip_heldout", "shapes_pref")


@lru_cache(maxsize=1)
def _lab() -> Components:
    return build(read_recipe("shapes"), "cpu")


def _rebuilt(images: torch.Tensor) -> torch.Tensor:
    codec = ShapesCodec(load_vae(load_asset(asset_path("shapes_vae")).tensors))
    with torch.no_grad():
        return codec.decode(codec.encode(images)).clamp(0, 1)


def test_at_least_97_percent_of_vae_reconstructions_are_read_as_correct() -> None:
    generator = torch.Generator().manual_seed(11)
    rows = draw_rows(1200, generator)
    rebuilt = _rebuilt(render(draw_scenes(rows, generator)))
    assert shapeseval(rebuilt, rows).float().mean() >= 0.97


def test_at_most_1_percent_of_reconstructed_hard_negatives_pass() -> None:
    generator = torch.Generator().manual_seed(12)
    rows = draw_rows(600, generator)
    scenes = draw_scenes(draw_negatives(rows, generator), generator)
    wrong = ~may_be_true(scenes, rows).diagonal()
    assert wrong.sum() > 480 and shapeseval(_rebuilt(render(scenes)), rows)[wrong].float().mean() <= 0.01


def test_the_teacher_with_guidance_is_far_better_than_its_plain_four_steps() -> None:
    rows = fixed_rows("eval", 25)
    texts = [catalog().captions[row].text for row in rows.tolist()]
    task = catalog().task[rows]
    long, short = (
        summarize(shapeseval(images_of(teacher_sampler(_lab(), steps, guidance), _lab(), texts, 3), rows), task)
        for steps, guidance in ((25, 5.0), (4, 1.0))
    )
    assert long["overall"] > short["overall"] + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_every_asset_names_its_command_and_seed(name: str) -> None:
    metadata = load_asset(asset_path(name)).metadata
    assert metadata["command"].startswith("gdmd pretrain")
    assert isinstance(metadata["seed"], int)


def test_the_sums_that_doctor_compares_with_are_those_of_the_shipped_files() -> None:
    import hashlib

    sums = json.loads((asset_folder() / "sha256.json").read_text(encoding="utf-8"))
    assert sorted(sums) == sorted(f"{name}.safetensors" for name in NAMES)
    for name, digest in sums.items():
        assert hashlib.sha256((asset_folder() / name).read_bytes()).hexdigest() == digest


def test_channels_last_changes_the_speed_of_the_codec_and_nothing_else() -> None:
    plain = load_vae(load_asset(asset_path("shapes_vae")).tensors).eval().double()
    codec = ShapesCodec(load_vae(load_asset(asset_path("shapes_vae")).tensors))
    images = render(draw_scenes(draw_rows(5, torch.Generator().manual_seed(13)), torch.Generator().manual_seed(14)))
    with torch.no_grad():
        latents = codec.encode(images)
        pictures = codec.decode(latents)
        torch.testing.assert_close(latents.double(), plain.encode(images.double()), rtol=0, atol=1e-5)
        torch.testing.assert_close(pictures.double(), plain.decode(latents.double()), rtol=0, atol=1e-5)
    assert latents.is_contiguous() and pictures.is_contiguous()
    assert codec.vae.decoder[0].weight.is_contiguous(memory_format=torch.channels_last)
