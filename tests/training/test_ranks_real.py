"""Two ranks distill a tiny real pipeline through the program: adapters with cached text, and sharded full copies."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from ranks import apart, linear_steps, run_ranks
from rich.console import Console
from torch import Tensor

from gdmd.config.methods.dmd_reward import DmdNftConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.programs.train import create_run
from gdmd.recipes.build import build
from gdmd.runs import checkpoint
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.types import PromptBatch

KINDS: dict[str, dict[str, Any]] = {"adapters": {}, "full": {"full": "both", "checkpointing": True}}


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    return images[:, 0].mean((1, 2))


def recipe(root: Path, kind: str, place: str) -> RunConfig:
    """NFT, which has an old policy: an adapter of its own, or a third copy that must be sharded too."""
    loop = {"steps": 2, "batch_size": 4, "lr_student": 0.3, "lr_fake": 0.3, "log_every": 1, "grid_every": 2}
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "sd3", embeddings=str(root / f"embeddings_{place}"), **KINDS[kind]),
        method=DmdNftConfig(fake_updates=1, images_per_prompt=4, guidance=3.0),
        loop=LoopConfig(**loop, threads=1, ema=0.9, rank_timeout=60, sharding="full" if kind == "full" else "none"),
        prompts={"file": str(root / "prompts.txt")},
        rewards=[{"kind": "callable", "target": "test_ranks_real:brightness"}],
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind alone, then both by one pair of ranks."""
    root, before = tmp_path_factory.mktemp("real"), os.fsync
    os.fsync = lambda handle: None
    tiny.save("sd3", root / "sd3")
    (root / "prompts.txt").write_text("\n".join(tiny.WORDS))

    def all_kinds(place: str, context: DistributedContext = SINGLE_PROCESS) -> None:
        for kind in KINDS:
            folder, console = root / f"{kind}_{place}", Console(file=io.StringIO())
            create_run(recipe(root, kind, place), folder, console, evaluation=True, command=["test"], context=context)

    try:
        with linear_steps():
            all_kinds("alone")
            ended = run_ranks(lambda context: all_kinds("ranks", context), root)
    finally:
        os.fsync = before
    assert [end.code for end in ended] == [0, 0], ended
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_distill_the_same_student_as_one(root: Path, kind: str) -> None:
    alone, ranks = (checkpoint.load_newest(root / f"{kind}_{place}" / "checkpoints") for place in ("alone", "ranks"))
    assert alone is not None and ranks is not None
    begun = build(recipe(root, kind, "alone")).roles
    for part in ("student", "fake", "ema", "old"):
        start = begun.parameters("fake" if part == "fake" else "student")
        found = apart(alone.part(part), ranks.part(part), {name: weights.detach() for name, weights in start.items()})
        assert found < 1e-3, (part, found)


def test_text_is_embedded_once_for_all_ranks(root: Path) -> None:
    count = [len(list((root / f"embeddings_{place}").rglob("shard_*"))) for place in ("alone", "ranks")]
    assert count[0] == count[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_grid_is_drawn_with_all_ranks(root: Path, kind: str) -> None:
    assert [path.name for path in sorted((root / f"{kind}_ranks" / "grids").iterdir())] == [
        "step_000000.png", "step_000002.png"
    ]  # fmt: skip
