"""Offloaded weights in a plan: the memory that they leave, and the copies that an iteration really makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from hidden_weights import hide

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.models.loading import open_family
from gdmd.plan.cost_model import LINK_EFFICIENCY, Transfers, gpu_of
from gdmd.plan.estimate import TrainingPlan, plan
from gdmd.plan.text import described
from gdmd.recipes.build import build
from gdmd.runs.run_folder import create
from gdmd.training.loop import train

GPU = gpu_of("rtx5070")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipelines")
    (place / "prompts.txt").write_text("\n".join(tiny.WORDS))
    for name in ("sd3", "sdxl"):
        tiny.save(name, place / name)
    return place


def recipe(folders: Path, name: str = "sd3", **model: Any) -> RunConfig:
    """A recipe with one student step, so that every iteration makes the same calls."""
    return RunConfig(
        name="tiny",
        model=tiny.config(folders / name, forward_chunk=2, **model),
        method=DMDConfig(fake_updates=2, guidance=3.0, student_steps=1),
        loop=LoopConfig(steps=1, batch_size=4, micro_batch=2, lr_student=1e-3, lr_fake=1e-3, threads=1),
        prompts={"file": str(folders / "prompts.txt")},
        rewards=[],
        validation={"every": 0},
    )


def planned(folders: Path, name: str = "sd3", **model: Any) -> TrainingPlan:
    return plan(recipe(folders, name, **model), GPU, 0.4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_planned_copies_are_those_of_an_iteration(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    cfg = recipe(folders, offload="base", checkpointing=checkpointing)
    found = plan(cfg, GPU, 0.4).cost.transfers
    copied = hide(monkeypatch)
    components = build(cfg, "cpu")
    train(components.method, components.roles, components.stream, cfg.loop, create(tmp_path / "run", {}))
    (kind,) = components.roles.family.blocks  # type: ignore[union-attr]
    blocks = [block for block in components.roles.backbone.net.modules() if type(block).__name__ == kind]  # type: ignore[union-attr]
    calls = (found.bytes(cfg.loop.batch_size) - 2 * found.encoders) / found.blocks
    assert copied.count(kind) == calls * len(blocks) > 0
    weights = sum(w.numel() * w.element_size() for b in blocks for n, w in b.named_parameters() if ".lora_" not in n)
    assert found.blocks == weights
    assert found.prompt_batches == 2
    assert copied.count("T5EncoderModel") == 3, "the prompts of two fake updates, and once the empty caption"


def test_memory_that_is_left(folders: Path) -> None:
    """With the base model offloaded its two largest blocks are counted: one computes, the next is being copied."""
    none, idle, base = (planned(folders, "sdxl", offload=how).cost for how in ("none", "idle", "base"))
    assert none.transfers.bytes(4) == 0 < idle.transfers.bytes(4) < base.transfers.bytes(4)
    encoders = none.static["text encoders"]
    assert (idle.static["text encoders"], idle.static["decoder"], idle.transfers.encoders) == (0, 0, encoders)
    assert idle.peaks(4)["embedding the prompts"] == encoders > 0
    unet = open_family(tiny.config(folders / "sdxl")).net
    blocks = [block for block in unet.modules() if type(block).__name__ == "BasicTransformerBlock"]
    away = sorted(sum(w.numel() * w.element_size() for w in block.parameters()) for block in blocks)[:-2]
    assert len(away) > 0 and base.static["base model"] == none.static["base model"] - sum(away)
    cached = planned(folders, "sdxl", offload="idle", embeddings="somewhere").cost
    assert cached.transfers.encoders == 0 and "embedding the prompts" not in cached.peaks(4)


def test_seconds_of_the_copies(folders: Path) -> None:
    one, other = planned(folders, offload="base"), planned(folders)
    seconds = one.cost.transfers.bytes(4) / (64e9 * LINK_EFFICIENCY)
    assert one.cost.copying(4, GPU) == seconds and one.seconds == pytest.approx(other.seconds + seconds)
    assert "of offloaded weights (80% of 64 GB/s, PCIe x16)" in described(one, [])
    assert "offloaded" not in described(other, [])


def test_transfers_by_hand() -> None:
    """5 + 8 / 2 calls without gradient, 3 in each of 4 micro-batches; 6 images, two a call; 1 + 4 scorings."""
    calls = {"calls": [(5.0, 1.0), (1.0, 1.0)], "calls_with_grad": 3.0, "chunk": 2, "micro": 2}
    scored = {"decoded": 0.75, "decode_chunk": 2, "scorings": 1.0, "scorings_with_grad": 1.0}
    found = Transfers(blocks=1000, encoders=7, decoder=100, rewards=10, **calls, **scored)  # type: ignore[arg-type]
    assert found.bytes(8) == 1000 * (5 + 4 + 12) + 7 + 100 * 3 + 10 * 5
