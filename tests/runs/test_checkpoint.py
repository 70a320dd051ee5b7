"""Checkpoints are complete or absent, verify, and fall back; assets carry their history and fail clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import full_disk

from gdmd.io import RunError
from gdmd.runs import assets, checkpoint

PARTS = {
    "student": {"a.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)},
    "ema": {"a.weight": torch.full((2, 3), 0.5, dtype=torch.bfloat16)},
    "old": {},
}


def save_steps(folder: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        checkpoint.save(folder, step, PARTS, {"updates": step}, keep)


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    save_steps(tmp_path, 12)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.path.name, loaded.state, loaded.messages) == (12, "step_000012", {"updates": 12}, ())
    for part, named in PARTS.items():
        assert loaded.part(part).keys() == named.keys()
        for name, tensor in named.items():
            assert loaded.part(part)[name].dtype == tensor.dtype
            assert torch.equal(loaded.part(part)[name], tensor)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    checkpoint.save(tmp_path, 1, {"student": {"x": base[::2], "y": base}}, {})
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None and torch.equal(loaded.part("student")["x"], base[::2])


def test_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "absent") is None


def test_rotation(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10, 15, 20, keep=2)
    assert checkpoint.steps(tmp_path) == [15, 20]
    save_steps(tmp_path, 25, keep=0)
    assert checkpoint.steps(tmp_path) == [15, 20, 25]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {"student": {"new": torch.ones(1)}}, {})
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None and set(loaded.part("student")) == {"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000005"]


@pytest.mark.parametrize("name", ["student.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["damaged", "missing", "truncated"])
def test_bad_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str, how: str) -> None:
    save_steps(tmp_path, 5, 10)
    file = tmp_path / "step_000010" / name
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:20])
    else:
        damage(file)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None and loaded.step == 5
    assert len(loaded.messages) == 1 and str(file) in loaded.messages[0] and "step 10" in loaded.messages[0]
    newest, damaged = checkpoint.newest_intact(tmp_path)
    assert newest == 5 and len(damaged) == 1 and str(file) in damaged[0]
    shutil.rmtree(tmp_path / "step_000005")
    assert checkpoint.newest_intact(tmp_path) == (None, damaged)


def test_edited_state_json(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    file = tmp_path / "step_000005" / "state.json"
    file.write_text(file.read_text().replace('"updates": 5', '"updates": 6'))
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"state\.json is damaged"):
        checkpoint.load(tmp_path / "step_000005")


def test_renamed_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    (tmp_path / "step_000010").rename(tmp_path / "step_000012")
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None and loaded.step == 5
    with pytest.raises(RunError, match="step_000012 holds step 10, so it was renamed: call it step_000010"):
        checkpoint.load_chosen(tmp_path, "12")


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    for step in ("step_000005", "step_000010"):
        damage(tmp_path / step / "student.safetensors")
    with pytest.raises(RunError, match=r"step_000010/student.*step_000005/student.*Restore one, or start a new run"):
        checkpoint.load_newest(tmp_path)


def test_later_format_is_an_error(tmp_path: Path, monkeypatch) -> None:
    save_steps(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    save_steps(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(RunError, match="has format 3, not 1"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("moment", ["first file", "state.json", "rename"])
def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    save_steps(tmp_path, 5)

    target = {"first file": "_sha256", "state.json": "_digest", "rename": "_fsync"}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, target, full_disk)
        with pytest.raises(RunError, match=r"step_000010: No space left.*of step 5 is intact\. Free some disk space"):
            save_steps(tmp_path, 10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000005"]
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None and loaded.step == 5


def test_io_error_inside_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match=r"No space left on device.*Free some disk space"):
        save_steps(tmp_path, 10)


def test_leftovers_of_a_killed_save(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    shutil.copytree(tmp_path / "step_000005", tmp_path / ".step_000010.partial")
    assert checkpoint.steps(tmp_path) == [5]
    save_steps(tmp_path, 15)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000005", "step_000015"]


def test_checkpoints_after_a_step_are_set_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10, 15)
    moved = checkpoint.set_aside_after(tmp_path, 5)
    assert [path.name for path in moved] == ["step_000010.damaged", "step_000015.damaged"]
    assert checkpoint.steps(tmp_path) == [5]


def test_asset_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "vae.safetensors"
    weights = {"w": torch.randn(3)}
    assets.save_asset(path, weights, command=["gdmd", "pretrain", "vae"], seed=4, metadata={"width": 32, "ok": True})
    asset = assets.load_asset(path)
    assert torch.equal(asset.tensors["w"], weights["w"])
    assert asset.metadata == {"command": "gdmd pretrain vae", "seed": 4, "width": 32, "ok": True}
    assert [entry.name for entry in path.parent.iterdir()] == ["vae.safetensors"]


def test_missing_or_corrupt_asset(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    with pytest.raises(RunError, match=r"vae\.safetensors is missing.*gdmd pretrain"):
        assets.load_asset(path)
    assets.save_asset(path, {"w": torch.randn(30)}, command="x", seed=0)
    for content in (b"", b"not safetensors", path.read_bytes()[:-8]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"vae\.safetensors is corrupt.*gdmd pretrain"):
            assets.load_asset(path)


def test_unwritable_asset(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the asset"):
        assets.save_asset(tmp_path / "file" / "vae.safetensors", {"w": torch.zeros(1)}, command="x", seed=0)


def test_asset_path() -> None:
    assert assets.asset_path("shapes_vae") == assets.asset_folder() / "shapes_vae.safetensors"
    assert (assets.asset_folder().parent / "types.py").is_file()


def test_state_json_has_a_sha256_per_file(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    body = json.loads((tmp_path / "step_000005" / "state.json").read_text())
    assert set(body["files"]) == {"student.safetensors", "ema.safetensors"}
    assert all(len(digest) == 64 for digest in [body["sha256"], *body["files"].values()])
