"""gdmd profile on a real model's trunk: which adapter it wears says whose call it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.profiling.bench import Bench, table
from gdmd.types import PromptBatch


def bench_of(folder: Path, family: str, method: dict[str, Any], **model: Any) -> Bench:
    """A tiny pipeline of the family with a batch of two."""
    (folder / "prompts.txt").write_text("\n".join(tiny.WORDS[:2]))
    return Bench(
        RunConfig.model_validate(
            {
                "name": "adapters",
                "model": tiny.config(tiny.save(family, folder / family), **model).model_dump(),
                "method": {"kind": "gdmd", **method},
                "prompts": {"file": str(folder / "prompts.txt")},
                "rewards": [{"kind": "callable", "target": "test_bench_adapters:brightness"}],
                "loop": {"batch_size": 2, "threads": 1},
            }
        )
    )


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("family", ["sd15", "z_image"])  # the second answers with a list
def test_calls_of_adapters_are_told_apart_and_counted_as_the_method_says(tmp_path: Path, family: str) -> None:
    bench = bench_of(tmp_path, family, {"group_size": 2, "gamma": 0.0})
    bench.round(0)
    assert bench.counted == pytest.approx(bench.expected, abs=1e-6)
    calls = {(call["who"], call["backward"]): call["samples"] for call in table(bench.calls)}
    assert calls["fake", True] == calls["student", True] == calls["fake", False] == 4
    assert calls["teacher", False] == 8 and calls["student", False] >= 2
    assert min(bench.times.networks) > 0


@pytest.mark.parametrize(("full", "most"), [("none", 7.7), ("student", 8.7), ("both", 9.7)])
def test_gdmd_at_group_size_4_keeps_to_its_passes_with_adapters_and_with_all_weights(
    tmp_path: Path, full: str, most: float
) -> None:
    """A backward through the frozen trunk is 1 F (gradients of the inputs), through a trained copy 2 F."""
    bench = bench_of(tmp_path, "sd15", {"group_size": 4, "step_draw": "batch"}, full=full)
    bench.round(0)
    bench.round(1)
    said = bench.summary()
    assert said["passes_agree"] and said["student_updates_per_iteration"] == 4
    assert (
        said["mean_passes_per_update"] == pytest.approx(most - 0.075)
        and most - 1 < said["passes_per_update"] < most + 0.4
    )
