"""benchmarks/real_size.py on the configs of a tiny pipeline: everything but the size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

from benchmarks import real_size
from gdmd.recipes.read import read_recipe


def test_settings_have_unique_names() -> None:
    names = [setting.name for setting in real_size.settings()]
    assert len(set(names)) == len(names) and names[0] == "sdxl/1024/micro-1+checkpointing"
    assert {name.split("/")[0] for name in names} == {"sdxl", "sd3"}


def test_every_setting_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few() -> Iterator[real_size.Setting]:
        yield real_size.Setting("sd3", tiny.SIZE, batch=2, tiny_decoder=True)

    fewer_calls = ["method.group_size=1", "method.continuations=2", "method.student_steps=[1.0,0.5]"]
    monkeypatch.setattr(real_size, "read_recipe", lambda name, own: read_recipe(name, [*own, *fewer_calls]))
    monkeypatch.setattr(real_size, "settings", few)
    out = tmp_path / "real_size.json"
    arguments = ["--tiny", str(tiny.save("sd3", tmp_path / "sd3")), "--iterations", "1", "--out", str(out)]
    assert real_size.main([*arguments, "--seconds", "0"]) == 0 and not out.exists()
    assert real_size.main(arguments) == 0
    (line,) = json.loads(out.read_text())["settings"].values()
    assert line["source"].startswith("configs in")
    assert 0 < line["measured_tflop"] < line["planned_tflop"]  # fused attention is not counted on a CPU
    assert min(line[name] for name in ("peak_gib", "images_per_s", "overhead", "planned_gib")) > 0
    assert capsys.readouterr().out.count("images/s") == 1
    assert real_size.main(arguments) == 0 and capsys.readouterr().out == ""
    assert real_size.main([*arguments, "--only", "flux"]) == 2 and "no setting starts" in capsys.readouterr().out


def test_out_of_memory_does_not_stop_the_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(real_size, "measured", full)
    line = real_size.attempt(real_size.Setting("sdxl", 1024), None, "cpu", 1.0, 1)
    assert "Tried to allocate 9 GiB" in line["error"]
    assert "out of memory" in real_size.line_of("sdxl", line)
