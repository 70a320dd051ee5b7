"""Quantized weights in a plan, and ``gdmd plan --fit``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from test_plan import numel, peak_of, recipe
from torch import nn

from gdmd.cli.app import app
from gdmd.config.load import load_config
from gdmd.config.run import RunConfig
from gdmd.models.loading import open_family
from gdmd.plan import fit as search
from gdmd.plan.cost_model import GIB, Gpu, gpu_of
from gdmd.plan.estimate import plan
from gdmd.plan.fake_tensors import fake_mode, fake_weights, measure
from gdmd.plan.fit import MARGIN, fit, fits
from gdmd.plan.meta_pipeline import meta_family
from gdmd.plan.quantized_layers import ByteLinear, numbers, quantize_layers
from gdmd.plan.text import fitted

with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs gdmd[8bit]")


def size(tensor: Any) -> int:
    """Bytes of a tensor; for a torchao tensor, those of its parts."""
    parts = [getattr(tensor, name) for name in getattr(tensor, "tensor_data_names", ())] or [tensor]
    return sum(part.numel() * part.itemsize for part in parts)


def size_of(net: nn.Module) -> int:
    return sum(size(tensor) for tensor in (*net.parameters(), *net.buffers()))


@with_torchao
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["sd3", "sdxl", "sana"])
def test_quantized_bytes_are_those_of_the_loaded_network(folders: Path, name: str, how: str, dtype: str) -> None:
    cfg = tiny.config(tiny.saved(folders, name), quantization=how, dtype=dtype)
    planned = meta_family(cfg).family.net
    quantize_layers(planned, cfg.quantization)
    assert size_of(planned) == size_of(open_family(cfg).net) < size_of(meta_family(cfg).family.net)


def test_nf4_is_half_a_byte_and_a_scale_per_64_weights(folders: Path) -> None:
    plain, planned = (meta_family(tiny.config(tiny.saved(folders, "sd3"))).family.net for _ in range(2))
    linear = sum(layer.weight.numel() for layer in plain.modules() if type(layer) is nn.Linear)
    quantize_layers(planned, "nf4")
    blocks = sum(-(-layer.weight.numel() // 64) for layer in plain.modules() if type(layer) is nn.Linear)
    assert size_of(plain) - size_of(planned) == 4 * linear - linear // 2 - 4 * blocks
    assert sum(map(numbers, planned.parameters())) == numel(plain.parameters())


@with_torchao
def test_memory_of_a_quantized_layer() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(512, 2048).requires_grad_(False)
    x = torch.randn(64, 512, requires_grad=True)
    planned = ByteLinear(layer)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    layer(x).sum().backward()  # from here on the gradient exists
    real = peak_of(lambda: layer(x).sum().backward())
    with fake_mode():
        fake_weights(planned)
        given = torch.empty(64, 512, requires_grad=True)
        planned(given).sum().backward()
        held = [given, given.grad, planned.weight, planned.scale, planned.bias]
        assert measure(lambda: planned(given).sum().backward(), held).bytes == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("sd3", ["model.embeddings=embeddings", "loop.micro_batch=1"]), ("sdxl", ["loop.micro_batch=1"])],
)
def test_fit_takes_the_cheapest_changes(
    folders: Path, name: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sd3 needs both changes; for sdxl smaller micro-batches are enough, so embeddings are tried and dropped."""
    monkeypatch.setattr(search, "SMALLEST", 1)  # tiny pipelines
    given = recipe(folders, name, batch=8).model_dump(mode="json")
    large = gpu_of("h100")

    def read(more: Any) -> RunConfig:
        return load_config(RunConfig, given, more)

    target = plan(read(wanted), large, 0.4)
    card = Gpu("small", 1.0, target.total / GIB / (1 - MARGIN) + 1e-9, 32.0, 32.0)
    estimate, kept = fit(read, card, 0.4)
    assert search.overrides(kept) == wanted and fits(estimate)
    assert estimate.total == target.total and all(change.saved > 0 for change in kept)
    assert fitted(estimate, kept, ["NAME"]).endswith(f"  gdmd train NAME {' '.join(wanted)}")


def test_every_change_can_be_read(folders: Path) -> None:
    """All changes apply to this recipe; a reward on the CPU takes no GPU memory, so no change is about it."""
    parts = [{"reward": {"kind": "hps", "device": "cpu"}}, {"reward": {"kind": "pickscore"}}]
    rewards = [{"kind": "clip"}, {"kind": "imagereward", "device": "cpu"}, {"kind": "composite", "parts": parts}]
    cfg = recipe(folders, "sd3", batch=8, checkpointing=False, family="sd3", decode_chunk=8)
    given = cfg.model_dump(mode="json") | {"rewards": rewards, "method": {"kind": "gdmd", "group_size": 2}}
    estimate = plan(load_config(RunConfig, given), gpu_of("12"), 0.4)
    found = search.overrides(list(search.changes(estimate)))
    for change in search.changes(estimate):
        load_config(RunConfig, given, change.settings.split())
    assert found[0] == "model.embeddings=embeddings" and found[-1] == "model.quantization=nf4"
    scorers = [setting.partition("=")[0] for setting in found if setting.startswith("rewards")]
    wanted = ("rewards.0", "rewards.2.parts.1.reward")
    assert scorers == [f"{path}.{field}" for field in ("offload", "dtype") for path in wanted]


def test_every_change_of_a_sharded_recipe_can_be_read(folders: Path) -> None:
    """The recipe has full copies; their 8-bit optimizer state cannot be sharded."""
    given = recipe(folders, "sd3", full="both").model_dump(mode="json")
    given["loop"]["sharding"] = "full"
    found = list(search.changes(plan(load_config(RunConfig, given), gpu_of("12"), 0.4)))
    for change in found:
        load_config(RunConfig, given, change.settings.split())
    assert found


def test_fit_command(capsys: pytest.CaptureFixture[str]) -> None:
    """With less memory than the reserve nothing helps, and the exit code is 1."""
    arguments = ["plan", "shapes_smoke", "loop.batch_size=4", "--gpu", "0.5", "--fit"]
    assert app(arguments, standalone_mode=False) == 1
    assert "does not fit in 0.5 GiB, 95% of a GPU of 0.5 GiB. Use a smaller loop.batch_size" in capsys.readouterr().out
    assert not app(
        ["plan", "shapes_smoke", "loop.batch_size=4", "--gpu", "12", "--fit", "--json"], standalone_mode=False
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["fit"] == {"changes": [], "command": "gdmd train shapes_smoke loop.batch_size=4"}
    assert printed["fits"] and printed["seconds_per_iteration"] is None
    with pytest.raises(ValueError, match="or a number of GiB"):
        gpu_of("0")
    assert gpu_of("24GB") == gpu_of("24 GiB") == gpu_of("24") and gpu_of("H100") == gpu_of("h100")
