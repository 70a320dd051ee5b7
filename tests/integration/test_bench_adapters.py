"""gdmd bench on a real model's trunk: which adapter it wears says whose call it is."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny  # noqa: E402

from gdmd.config.run import RunConfig  # noqa: E402
from gdmd.programs.bench import Bench, table  # noqa: E402


@pytest.mark.parametrize("family", ["sd15", "z_image"])  # the second answers with a list
def test_calls_of_adapters_are_told_apart_and_counted_as_the_method_says(tmp_path: Path, family: str) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.WORDS[:2]))
    cfg = RunConfig.model_validate(
        {
            "name": "adapters",
            "model": tiny.config(tiny.save(family, tmp_path / family)).model_dump(),
            "method": {"kind": "gdmd", "group_size": 2, "gamma": 0.0},
            "prompts": {"file": str(tmp_path / "prompts.txt")},
            "loop": {"batch_size": 2, "threads": 1},
        }
    )
    bench = Bench(cfg)
    bench.round(0)
    assert bench.counted == pytest.approx(bench.expected, abs=1e-6)
    calls = {(call["who"], call["backward"]): call["samples"] for call in table(bench.calls)}
    assert calls["fake", True] == calls["student", True] == calls["fake", False] == 4
    assert calls["teacher", False] == 8 and calls["student", False] >= 2
    assert min(bench.times.networks) > 0
