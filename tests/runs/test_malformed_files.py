"""Checkpoints, assets, metrics and image folders that are damaged or malicious: noticed, skipped, never executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import CASES, Trap, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st

from gdmd.io import RunError
from gdmd.runs import assets, checkpoint
from gdmd.runs.run_folder import read_facts, read_metrics

FILES = ("state.json", "student.safetensors", "optimizer.safetensors")
PARTS = {"student": {"w": torch.arange(6.0)}, "optimizer": {"m": torch.zeros(3), "n": torch.tensor(1)}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good checkpoints in good/, to be copied."""
    folder = tmp_path_factory.mktemp("files")
    for step in (1, 2):
        checkpoint.save(folder / "good", step, PARTS, {"updates": step})
    return folder


def fresh(work: Path) -> Path:
    shutil.rmtree(work / "run", ignore_errors=True)
    shutil.copytree(work / "good", work / "run")
    return work / "run"


def resign(folder: Path, body: Any) -> None:
    """Write state.json with a correct checksum: damage that no checksum shows."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(body | {"sha256": digest}))


@CASES
@given(
    name=st.sampled_from(FILES), how=st.sampled_from(["cut", "flip", "grow", "lose", "noise"]), where=st.floats(0, 1)
)
def test_any_damage_is_noticed(name: str, how: str, where: float, work: Path) -> None:
    run = fresh(work)
    file = run / "step_000002" / name
    content = bytearray(file.read_bytes())
    place = int(where * (len(content) - 1))
    if how == "lose":
        file.unlink()
    else:
        flipped = content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        changed = {"cut": content[:place], "flip": flipped, "grow": content + b"x", "noise": os.urandom(len(content))}
        file.write_bytes(bytes(changed[how]))
    found = checkpoint.load_newest(run)
    assert found is not None and found.step == 1 and torch.equal(found.part("student")["w"], PARTS["student"]["w"])
    (message,) = found.messages
    assert name in message and "step 2 was skipped" in message
    shutil.rmtree(run / "step_000001")
    with pytest.raises(RunError, match="no checkpoint in"):
        checkpoint.load_newest(run)


@CASES
@given(
    changes=st.dictionaries(st.sampled_from(["format", "step", "files", "state", "more"]), JSON, min_size=1),
    lost=st.sets(st.sampled_from(["step", "files", "state"]), max_size=1),
)
def test_signed_state_with_wrong_content(changes: dict[str, Any], lost: set[str], work: Path) -> None:
    run = fresh(work)
    body = json.loads((run / "step_000002" / "state.json").read_text())
    del body["sha256"]
    resign(run / "step_000002", {key: value for key, value in (body | changes).items() if key not in lost})
    refusal(lambda: checkpoint.load_newest(run))


@pytest.mark.parametrize(
    "name", ["../../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "x.pt", ""]
)
def test_no_file_outside_the_checkpoint(name: str, work: Path) -> None:
    run = fresh(work)
    body = json.loads((run / "step_000002" / "state.json").read_text())
    del body["sha256"]
    (work / "outside.safetensors").write_bytes((run / "step_000002" / "student.safetensors").read_bytes())
    resign(run / "step_000002", body | {"files": {name: body["files"]["student.safetensors"]}})
    found = checkpoint.load_newest(run)
    assert found is not None and found.step == 1 and "outside its folder" in found.messages[0]


def test_deeply_nested_state(work: Path) -> None:
    run = fresh(work)
    (run / "step_000002" / "state.json").write_text("[" * 100_000)
    found = checkpoint.load_newest(run)
    assert found is not None and found.step == 1


@CASES
@given(content=st.binary() | mutated([assets.asset_path("shapes_vae").read_bytes()[:600]], st.binary(max_size=8)))
def test_signed_part_of_any_bytes(content: bytes, work: Path) -> None:
    run = fresh(work)
    file = run / "step_000002" / "student.safetensors"
    file.write_bytes(content)
    body = json.loads((run / "step_000002" / "state.json").read_text())
    del body["sha256"]
    body["files"][file.name] = hashlib.sha256(content).hexdigest()
    resign(run / "step_000002", body)
    refusal(lambda: checkpoint.load(run / "step_000002"))
    refusal(lambda: assets.load_asset(file))


def possible(name: str) -> bool:
    return "/" not in name and "\0" not in name and len(name.encode("utf-8", "surrogatepass")) < 200


names = st.text("0123456789²٣_ -+x.", max_size=9) | st.text(max_size=9)


@CASES
@given(name=names.filter(possible).filter(lambda name: not any(0xD800 <= ord(c) < 0xE000 for c in name)))
def test_names_that_count_as_checkpoints(name: str, work: Path) -> None:
    run = fresh(work)
    (run / f"step_{name}").mkdir(exist_ok=True)
    assert [f"step_{step:06d}" for step in checkpoint.steps(run)] == sorted(
        entry.name for entry in run.iterdir() if (run / f"step_{checkpoint_number(entry.name):06d}").name == entry.name
    )
    found = checkpoint.load_newest(run)
    assert found is not None and found.step == 2


def checkpoint_number(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def test_pickles_are_not_loaded(work: Path, tmp_path: Path) -> None:
    from gdmd.shapes.rewards import from_asset

    mark, trap = tmp_path / "ran", tmp_path / "shapes_clip.safetensors"
    for content in (pickle.dumps(Trap(mark)), b"\x80\x02" + pickle.dumps(Trap(mark))):
        trap.write_bytes(content)
        with pytest.raises(RunError, match="corrupt"):
            assets.load_asset(trap)
        with pytest.raises(ValueError, match="cannot be read"):
            from_asset(trap)
        run = fresh(work)
        shutil.copy(trap, run / "step_000002" / "student.safetensors")
        body = json.loads((run / "step_000002" / "state.json").read_text())
        del body["sha256"]
        resign(run / "step_000002", body | {"files": {"student.safetensors": hashlib.sha256(content).hexdigest()}})
        with pytest.raises(checkpoint.DamagedCheckpoint, match="cannot be read"):
            checkpoint.load(run / "step_000002")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # noqa: S301 (the trap works)
    assert mark.exists()


ROWS = [b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n']
BITS = st.sampled_from([b"Infinity", b"NaN", b"[" * 3000, b"9" * 5000, b"\xff", b"\n", b"{}", b"\0", b'"', b"1e999"])


@CASES
@given(content=mutated(ROWS, BITS | st.binary(max_size=4)))
def test_damaged_metrics_and_facts(content: bytes, work: Path) -> None:
    (work / "metrics.jsonl").write_bytes(content)
    (work / "run.json").write_bytes(content)
    refusal(lambda: read_metrics(work))
    refusal(lambda: read_facts(work))
