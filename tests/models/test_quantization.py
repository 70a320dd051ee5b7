"""A quantized frozen base: errors, the measured error of int8, gradients of both roles, and a run up to its export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from torch import Tensor, nn

from gdmd.config.image_source import read_source
from gdmd.config.load import ConfigError
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.programs.export import export_run
from gdmd.programs.train import TrainSettings, create_run, prepare, resume_run, run_training
from gdmd.recipes.read import read_recipe
from gdmd.rewards.preprocessing import from_pil
from gdmd.runs import checkpoint
from gdmd.sources.base import image_slots
from gdmd.sources.open import open_source
from gdmd.types import Role

with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs gdmd[8bit]")
MINIATURES = ("shapes_sd3", "shapes_sdxl")
ROLES: tuple[Role, Role] = ("student", "fake")


def miniature(name: str, how: str) -> Family:
    return open_family(read_recipe(name, [f"model.quantization={how}"]).model)  # type: ignore[arg-type]


def states(family: Family, count: int = 4) -> tuple[Tensor, Tensor, Any]:
    noise = torch.randn(count, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    texts = ["a red cube", "two blue circles", "a green triangle", "three red squares"]
    return noise, torch.linspace(0.1, 0.9, count), family.encoder.encode(texts[:count])


def test_full_students_cannot_be_quantized() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization = int8 needs full = none, got full = student.*model.full=none"
    ):
        read_recipe("shapes_sd3", ["model.quantization=int8", "model.full=student"])


@pytest.mark.parametrize(("how", "command"), [("int8", r"pip install .*8bit"), ("nf4", "pip install bitsandbytes")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, how: str, command: str) -> None:
    monkeypatch.setattr("gdmd.models.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"model.quantization = {how} needs .*not installed; do: {command}"):
        miniature("shapes_sd3", how)


def test_nf4_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdmd.models.quantization.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="nf4 needs a GPU, got device cpu; set model.quantization=int8"):
        miniature("shapes_sd3", "nf4")


@with_torchao
@pytest.mark.parametrize(("how", "most"), [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize("name", MINIATURES)
def test_teacher_stays_close(name: str, how: str, most: float) -> None:
    """Measured: int8 0.014 and 0.008 of x0 (SD3, SDXL), fp8 0.052 and 0.037."""
    plain, quantized = miniature(name, "none"), miniature(name, how)
    kinds = {type(part): type(part.weight).__name__ for part in quantized.net.modules() if hasattr(part, "weight")}
    assert kinds[nn.Linear].endswith("8Tensor") and kinds[nn.Conv2d] == "Parameter"
    at = states(plain)
    with torch.no_grad():
        expected, found = (family.predict(family.net, *at).x0 for family in (plain, quantized))
    assert 0 < (found - expected).norm() / expected.norm() < most


@with_torchao
@pytest.mark.parametrize("name", MINIATURES)
def test_adapters_train_on_a_quantized_base(name: str) -> None:
    """Gradients equal those on a plain network with the same rounded weights, with and without checkpointing."""
    quantized, rounded = miniature(name, "int8"), miniature(name, "none")
    layers = dict(rounded.net.named_modules())
    for key, layer in quantized.net.named_modules():
        if type(layer) is nn.Linear:
            layers[key].weight.data = layer.weight.dequantize()
    roles, reference = DiffusersRoles(quantized), DiffusersRoles(rounded)
    at = states(rounded)
    with torch.no_grad():
        teacher = roles.teacher(*at).x0
    for role in ROLES:
        generator = torch.Generator().manual_seed(7)
        for weights, same in zip(roles.parameters(role).values(), reference.parameters(role).values(), strict=True):
            weights.data += 0.02 * torch.randn(weights.shape, generator=generator)
            same.data.copy_(weights)
    expected = gradients(reference)
    for on in (False, True):
        roles.set_checkpointing(on=on)
        for found, wanted in zip(gradients(roles), expected, strict=True):
            assert found.dtype == torch.float32
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item() + 1e-9)
    with torch.no_grad():
        assert torch.equal(roles.teacher(*at).x0, teacher)


def gradients(roles: DiffusersRoles) -> list[Tensor]:
    """Of one loss of each role, the fake score's last: they must not affect each other."""
    at, found = states(roles.family), []
    for role in ROLES:
        getattr(roles, role)(*at).x0.square().mean().backward()
    for role in ROLES:
        for weights in roles.parameters(role).values():
            assert weights.grad is not None
            found.append(weights.grad)
            weights.grad = None
    return found


@with_torchao
@pytest.mark.parametrize("name", MINIATURES)
def test_run_resumes_exactly_and_exports_to_the_original_base(name: str, tmp_path: Path) -> None:
    settings = ["model.quantization=int8", "model.checkpointing=true", "loop.batch_size=2", "loop.checkpoint_every=1"]
    settings += ["method.continuations=2", "validation.every=0", "loop.threads=1", "loop.lr_schedule=constant"]
    two, one = (read_recipe(name, [*settings, f"loop.steps={steps}"]) for steps in (2, 1))
    for cfg, run in ((two, "whole"), (one, "parts")):
        create_run(cfg, tmp_path / run, ["gdmd", "train"], TrainSettings(evaluation=False))
    cfg, opened = resume_run(tmp_path / "parts", None, ["loop.steps=2"])
    run_training(cfg, opened, prepare(cfg), TrainSettings(evaluation=False))
    whole, parts = (checkpoint.load_newest(tmp_path / run / "checkpoints") for run in ("whole", "parts"))
    assert whole is not None and parts is not None
    for role in ROLES:
        assert all(torch.equal(value, parts.part(role)[key]) for key, value in whole.part(role).items())

    for merged in (True, False):
        export_run(tmp_path / "whole", merged=merged)
    kind, part = ("UNet2DConditionModel", "unet") if name == "shapes_sdxl" else ("SD3Transformer2DModel", "transformer")
    net = getattr(diffusers, kind).from_pretrained(tmp_path / "whole" / "export-merged", subfolder=part)
    assert {type(weights) for weights in net.parameters()} == {nn.Parameter}
    lora, whole_pipeline = (
        from_pil(open_source(read_source(str(tmp_path / "whole" / folder))).generate(image_slots(["a red cube"], 2), 3))
        for folder in ("export", "export-merged")
    )
    assert (lora - whole_pipeline).abs().max() < 1.01 / 255
