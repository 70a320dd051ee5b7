"""The shipped VAE and teacher are what the documentation says: the checker survives the VAE, guidance helps."""

import json

import pytest
import torch

from gdmd.config.shapes_pipeline import PIPELINES, PREFIX, read_shapes_pipeline, shipped_pipelines
from gdmd.diffusion.generate import images_of, teacher_sampler
from gdmd.io import weights_fingerprint
from gdmd.programs.doctor import SUMS, checksums
from gdmd.recipes.build import build
from gdmd.recipes.read import read_recipe
from gdmd.runs.assets import asset_folder, asset_path, load_asset
from gdmd.runs.student_file import ROLES, SHIPPED, part, read_student_file
from gdmd.shapes.check import shapeseval, summarize
from gdmd.shapes.grammar import catalog, draw_rows, fixed_rows
from gdmd.shapes.pretrain.scorer_data import draw_negatives, may_be_true
from gdmd.shapes.render import draw_scenes, render
from gdmd.shapes.roles import ShapesCodec, load_dit, load_vae

NAMES = ("shapes_vae", "shapes_teacher", "shapes_clip", "shapes_clip_heldout", "shapes_pref")


def _rebuilt(images: torch.Tensor) -> torch.Tensor:
    codec = ShapesCodec(load_vae(load_asset(asset_path("shapes_vae")).tensors))
    with torch.no_grad():
        return codec.decode(codec.encode(images)).clamp(0, 1)


def test_vae_reconstructions_pass() -> None:
    generator = torch.Generator().manual_seed(11)
    rows = draw_rows(600, generator)
    rebuilt = _rebuilt(render(draw_scenes(rows, generator)))
    assert shapeseval(rebuilt, rows).float().mean() >= 0.97


def test_reconstructed_hard_negatives_fail() -> None:
    generator = torch.Generator().manual_seed(12)
    rows = draw_rows(300, generator)
    scenes = draw_scenes(draw_negatives(rows, generator), generator)
    wrong = ~may_be_true(scenes, rows).diagonal()
    assert wrong.sum() > 240 and shapeseval(_rebuilt(render(scenes)), rows)[wrong].float().mean() <= 0.01


def test_guided_teacher_beats_four_steps() -> None:
    rows = fixed_rows("eval", 12)
    texts = [catalog().captions[row].text for row in rows.tolist()]
    components = build(read_recipe("shapes"), "cpu")

    def overall(steps: int, guidance: float) -> float:
        images = images_of(teacher_sampler(components, steps, guidance), components, texts, 3)
        return summarize(shapeseval(images, rows), catalog().task[rows])["overall"]

    assert overall(15, 5.0) > overall(4, 1.0) + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_shipped_networks_record_their_command_and_seed(name: str) -> None:
    metadata = load_asset(asset_path(name)).metadata
    assert metadata["command"].startswith("gdmd pretrain")
    assert isinstance(metadata["seed"], int)


def test_shipped_student() -> None:
    """shapes:dmd: its history, and networks that fit the teacher of the package."""
    asset = read_student_file(asset_path(SHIPPED["dmd"]))
    facts = asset.metadata
    assert facts["command"].startswith("gdmd train shapes_dmd loop.seed=1") and (facts["seed"], facts["updates"]) == (
        1,
        4000,
    )
    assert len(facts["commit"]) == 40 and facts["config"]["method"]["kind"] == "dmd"
    own = facts["inputs"]["model.teacher"]["fingerprint"]
    assert own == f"sha256:{weights_fingerprint(asset_path('shapes_teacher'))}"
    for role in ROLES:
        load_dit(part(asset, role), role)


def test_checksums() -> None:
    """python tools/checksums.py writes them."""
    assert json.loads((asset_folder() / SUMS).read_text(encoding="utf-8")) == checksums(asset_folder())


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_record_their_command(name: str) -> None:
    trained = read_shapes_pipeline(f"{PREFIX}{name}")
    assert trained is not None and trained.family == name
    assert trained.command == f"gdmd pretrain pipeline {name} --steps {trained.steps} --seed {trained.seed}"
    assert sum(file.stat().st_size for file in (PIPELINES / name).rglob("*.safetensors")) <= 3e6


def test_channels_last_is_exact() -> None:
    plain = load_vae(load_asset(asset_path("shapes_vae")).tensors).eval().double()
    codec = ShapesCodec(load_vae(load_asset(asset_path("shapes_vae")).tensors))
    images = render(draw_scenes(draw_rows(5, torch.Generator().manual_seed(13)), torch.Generator().manual_seed(14)))
    with torch.no_grad():
        latents = codec.encode(images)
        decoded = codec.decode(latents)
        torch.testing.assert_close(latents.double(), plain.encode(images.double()), rtol=0, atol=1e-5)
        torch.testing.assert_close(decoded.double(), plain.decode(latents.double()), rtol=0, atol=1e-5)
    assert latents.is_contiguous() and decoded.is_contiguous()
    assert codec.vae.decoder[0].weight.is_contiguous(memory_format=torch.channels_last)
