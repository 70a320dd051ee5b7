"""benchmarks/real_size.py on the configs of a tiny pipeline: everything but the size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

from benchmarks import real_size
from gdmd.recipes.read import read_recipe


def test_settings_have_names_of_their_own_and_begin_with_the_goals() -> None:
    names = [setting.name for setting in real_size.settings()]
    assert len(set(names)) == len(names) and names[0] == "sdxl/1024/micro-1+checkpointing"
    assert {name.split("/")[0] for name in names} == {"sdxl", "sd3"}
    assert any("compiled" in name for name in names) and any("tiny-decoder" in name for name in names)


def test_every_setting_is_measured_once_and_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = real_size.Setting("sd3", tiny.SIZE, batch=2)

    def few() -> Iterator[real_size.Setting]:
        yield from (small, replace(small, checkpointing=False, tiny_decoder=True))

    fewer_calls = ["method.group_size=1", "method.continuations=2"]
    monkeypatch.setattr(real_size, "read_recipe", lambda name, own: read_recipe(name, [*own, *fewer_calls]))
    monkeypatch.setattr(real_size, "settings", few)
    out = tmp_path / "real_size.json"
    words = ["--tiny", str(tiny.save("sd3", tmp_path / "sd3")), "--iterations", "1", "--out", str(out)]
    assert real_size.main([*words, "--seconds", "0"]) == 0 and not out.exists()
    assert real_size.main(words) == 0
    found = json.loads(out.read_text())
    assert list(found["settings"]) == [setting.name for setting in few()] and found["matrix_tflop_per_s"] > 0
    for line in found["settings"].values():
        assert line["passes_agree"] and line["source"].startswith("configs in")
        assert 0 < line["measured_tflop"] < line["planned_tflop"]  # no fused attention is counted on a CPU
        assert min(line[name] for name in ("peak_gib", "images_per_s", "overhead", "planned_gib")) > 0
    assert capsys.readouterr().out.count("images/s") == 2
    assert real_size.main(words) == 0 and capsys.readouterr().out == ""
    assert real_size.main([*words, "--only", "flux"]) == 2 and "no setting starts so" in capsys.readouterr().out


def test_what_does_not_fit_is_written_down_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(real_size, "measured", full)
    line = real_size.attempt(real_size.Setting("sdxl", 1024), None, "cpu", 1.0, 1)
    assert "Tried to allocate 9 GiB" in line["error"]
    assert "out of memory" in real_size.said("sdxl", line)
