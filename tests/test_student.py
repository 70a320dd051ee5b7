"""What ``load_student`` says about folders that contain no student for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import Gdmd

from gdmd.student import load_student


def test_run_of_the_shapes_networks(gdmd: Gdmd) -> None:
    with pytest.raises(ValueError, match="a run of the Shapes world, .*; generate images with `gdmd sample .*run`"):
        load_student(gdmd.trained())


def test_folders_and_ids_without_a_student(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it holds neither config.yaml nor gdmd_export.json\..* Give"):
        load_student(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    for inside in ("checkpoints", "checkpoints/step_000001"):
        with pytest.raises(ValueError, match=rf"nor gdmd_export.json\. Did you mean {tmp_path}\? Give"):
            load_student(tmp_path / inside)
    with pytest.raises(ValueError, match=r"it does not exist\. .*Give a run folder, .* or the hub id"):
        load_student(tmp_path / "nothing")
    with pytest.raises(ValueError, match="org/student: no such folder, and it is not in the cache"):
        load_student("org/student")


def test_a_device_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used \(.*gpu.*\); give cpu"):
        load_student(tmp_path, device="gpu")
