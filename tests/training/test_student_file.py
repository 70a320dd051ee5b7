"""A student and its fake score in one file (gdmd pretrain student), and runs that start from it or from shapes:dmd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_world import Gdmd
from safetensors.torch import save_file

from gdmd.runs import checkpoint
from gdmd.runs.assets import load_asset, save_asset
from gdmd.runs.run_folder import read_facts
from gdmd.runs.student_file import command_of, part, read_student_file

SECOND = ("loop.seed=1", "--run", "second")


def packed(gdmd: Gdmd) -> Path:
    """A finished run "run" and the file of its student."""
    gdmd.trained()
    finished = gdmd("pretrain", "student", "--run", "run", "--out", "pretrained")
    assert finished.code == 0 and "wrote pretrained/shapes_gdmd.safetensors" in finished.err, finished.err
    return Path("pretrained/shapes_gdmd.safetensors")


def test_the_file_holds_the_ema_student_the_fake_score_and_their_history(gdmd: Gdmd) -> None:
    """fp16 and fp8, each value the nearest one; the history is that of the run, without paths on this machine."""
    file = packed(gdmd)
    saved = checkpoint.load_newest(Path("run/checkpoints"))
    assert saved is not None
    asset, stored = read_student_file(file), load_asset(file).tensors
    for role, source, dtype in (("student", "ema", torch.float16), ("fake", "fake", torch.float8_e4m3fn)):
        own, original = part(asset, role), saved.part(source)
        assert own.keys() == original.keys()
        assert all(torch.equal(own[name], one.to(dtype).float()) for name, one in original.items())
        assert {tensor.dtype for name, tensor in stored.items() if name.startswith(role)} == {dtype}
    facts, history = read_facts(Path("run")), asset.metadata
    assert history["command"] == command_of(facts)
    assert (history["seed"], history["step"], history["updates"]) == (0, 2, 2)
    assert (history["commit"], history["inputs"]) == (facts["commit"], facts["inputs"])


def test_the_recorded_command_contains_no_path() -> None:
    """Neither the path of the program nor that of the run."""
    words = ["/usr/bin/gdmd", "train", "shapes_dmd", "--run", "/tmp/run", "loop.seed=1"]
    assert command_of({"command": words}) == "gdmd train shapes_dmd loop.seed=1"
    assert command_of({}) == "gdmd"


def test_a_run_starts_from_the_file_as_from_the_run(gdmd: Gdmd) -> None:
    """Up to the rounding of the file: at step 1 the student has moved by one update from the packed one."""
    file = packed(gdmd)
    finished = gdmd.train(f"loop.start_from={file}", "loop.steps=1", "loop.lr_student=1e-12", *SECOND)
    assert finished.code == 0 and "fake score start from pretrained/shapes_gdmd.safetensors, step 2 of" in finished.err
    ends = checkpoint.load_newest(Path("second/checkpoints"))
    assert ends is not None
    own = part(read_student_file(file), "student")
    assert all(torch.allclose(tensor, own[name], rtol=0, atol=1e-9) for name, tensor in ends.part("student").items())


def test_a_run_starts_from_the_shipped_student(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.start_from=shapes:dmd", *SECOND)
    assert finished.code == 0 and "fake score start from shapes:dmd, step 1 of `none`" in finished.err
    assert "loop.seed is" not in finished.err
    again = gdmd.train("loop.start_from=shapes:dmd", "loop.seed=0", "--run", "third")
    assert "loop.seed is 0 there, too" in again.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("shapes:sd3", "'shapes:sd3' is not a shipped student; give 'shapes:dmd', the folder of a run"),
        ("missing.safetensors", "asset missing.safetensors is missing"),
        ("vae.safetensors", "vae.safetensors does not hold a student and its fake score"),
        ("bare.safetensors", "bare.safetensors does not hold a student and its fake score"),
    ],
)
def test_other_names_and_files_are_refused_before_the_run_folder(gdmd: Gdmd, given: str, message: str) -> None:
    save_asset("vae.safetensors", {"encoder.weight": torch.ones(2)}, command="gdmd pretrain vae", seed=0)
    save_file({"student.w": torch.ones(2), "fake.w": torch.ones(2)}, "bare.safetensors")
    finished = gdmd.train(f"loop.start_from={given}", *SECOND)
    assert finished.code == 2 and message in finished.err and not Path("second").exists(), finished.err


def test_a_student_of_another_teacher_is_refused(gdmd: Gdmd) -> None:
    """The file holds the teacher's fingerprint."""
    file = packed(gdmd)
    asset = load_asset(gdmd.assets / "shapes_teacher.safetensors")
    other = {name: tensor + 1 for name, tensor in asset.tensors.items()}
    save_asset("teacher.safetensors", other, command="none", seed=0)
    finished = gdmd.train(f"loop.start_from={file}", "model.teacher=teacher.safetensors", *SECOND)
    assert finished.code == 2 and "was trained on another base model" in finished.err, finished.err


def test_different_student_steps_are_reported(gdmd: Gdmd) -> None:
    finished = gdmd.train("loop.start_from=shapes:dmd", "method.student_steps=[1, 0.5]", *SECOND)
    assert finished.code == 0 and "method.student_steps was" in finished.err


def test_packing_needs_a_run_with_a_checkpoint_of_the_shapes_networks(gdmd: Gdmd) -> None:
    gdmd.trained()
    assert "pretrain student needs --run RUN" in gdmd("pretrain", "student").err
    assert "the network to train is vae" in gdmd("pretrain", "vae", "--run", "run").err
    assert "trains nothing" in gdmd("pretrain", "student", "--run", "run", "--seed", "3").err
    config = Path("run/config.yaml")
    text = config.read_text()
    config.write_text(text.replace("kind: shapes\n", "kind: diffusers\n  path: org/sdxl\n"))
    assert "run of org/sdxl, not of the Shapes networks" in gdmd("pretrain", "student", "--run", "run").err
    config.write_text(text)
    for step in Path("run/checkpoints").iterdir():
        (step / "state.json").unlink()
        step.rename(step.with_name(f"gone_{step.name}"))
    assert "has no checkpoint yet" in gdmd("pretrain", "student", "--run", "run").err
