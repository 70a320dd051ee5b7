"""``gdmd rewards fetch`` from a local hub: the weights can be used, and a failure is a one-line error."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from local_hub import gdmd, hub

pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")

from test_conversion import WIDTH, OpenClip, save_pt, wild
from tiny_rewards import TASK, clip, prompt_batch, random_images, words_of_clip
from tiny_vlms import geneval2_parts, tiny_geneval2

from gdmd.programs import reward_tools
from gdmd.rewards import convert
from gdmd.rewards.geneval2 import GenEval2
from gdmd.rewards.pickscore import PickScore


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny repositories of CLIP, PickScore and HPSv2."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    clip(root / "openai" / "clip-vit-large-patch14")
    words_of_clip(root / "openai" / "clip-vit-large-patch14")
    words_of_clip(root / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    clip(root / "yuvalkirstain" / "PickScore_v1")
    tensors = wild(OpenClip()).float().state_dict() | {"positional_embedding": torch.randn(77, WIDTH)}
    (root / "xswu" / "HPSv2").mkdir(parents=True)
    save_pt(root / "xswu" / "HPSv2" / "HPS_v2.1_compressed.pt", {"state_dict": tensors})
    return root


def test_fetch_converts_and_verifies_once(published: Path, tmp_path: Path) -> None:
    with hub(published) as (address, asked):
        done = gdmd(tmp_path, address, "rewards", "fetch", "hps")
        assert done.returncode == 0, done.stderr
        assert any("697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2.1_compressed.pt" in path for path in asked)
    ready = tmp_path / "rewards" / "hps"
    assert "converted and verified" in done.stderr and f"ready: {ready}" in done.stderr
    assert json.loads((ready / "converted.json").read_text())["file"] == "HPS_v2.1_compressed.pt"
    again = gdmd(tmp_path, None, "rewards", "fetch", "hps")
    assert again.returncode == 0 and "is already converted" in again.stderr
    facts = json.loads((ready / "converted.json").read_text())
    assert facts["revision"] == "697403c78157020a1ae59d23f111aa58ced35b0a"
    (ready / "converted.json").write_text(json.dumps(facts | {"revision": "b" * 40}))  # of an earlier version of gdmd
    older = gdmd(tmp_path, None, "rewards", "fetch", "hps")
    assert older.returncode == 2 and "at bbbbbbbbbbbb, and the pinned revision is 697403c78157" in older.stderr


def test_fetched_weights_are_found_offline(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(published) as (address, _):
        done = gdmd(tmp_path, address, "rewards", "fetch", "pickscore")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    scores = PickScore().score(random_images(1), prompt_batch(["a bad"]))
    assert scores.isfinite().all()


def test_fetch_into_a_folder(published: Path, tmp_path: Path) -> None:
    with hub(published) as (address, _):
        done = gdmd(tmp_path, address, "rewards", "fetch", "pickscore", "-o", "mine")
    assert done.returncode == 0 and "{kind: pickscore, path: mine}" in done.stderr, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {
        one.name for one in (tmp_path / "mine").iterdir()
    }
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["projection_dim"] == 16  # of the model, not of the tokenizer


def test_fetch_of_a_model_in_several_files(tmp_path: Path) -> None:
    """All files that the index names; one that is missing afterwards is an error."""
    place = tmp_path / "hub" / "Qwen" / "Qwen3-VL-8B-Instruct"
    net, words = geneval2_parts()
    net.save_pretrained(place, max_shard_size="40KB")
    words.save_pretrained(place)
    (first, *more) = sorted(place.glob("model-*.safetensors"))
    assert more
    with hub(tmp_path / "hub") as (address, _):
        done = gdmd(tmp_path, address, "rewards", "fetch", "geneval2", "-o", "mine")
        assert done.returncode == 0 and "{kind: geneval2, path: mine}" in done.stderr, done.stderr
        first.unlink()
        broken = gdmd(tmp_path, address, "rewards", "fetch", "geneval2", "-o", "other")
    scores = GenEval2(path=str(tmp_path / "mine"), dtype="fp32").score(random_images(1), prompt_batch(["a"], [TASK]))
    torch.testing.assert_close(scores, tiny_geneval2().score(random_images(1), prompt_batch(["a"], [TASK])))
    assert broken.returncode == 2 and f"has no {first.name}" in broken.stderr, broken.stderr


def test_unreachable_hub_is_reported_without_retries(tmp_path: Path) -> None:
    with hub(tmp_path) as (address, _):
        pass  # a port that is closed now
    start = time.monotonic()
    done = gdmd(tmp_path, address, "rewards", "fetch", "hps")
    assert done.returncode == 2 and time.monotonic() - start < 20  # six attempts pause for 23 s between them
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot fetch xswu/HPSv2@697403c78157: the hub cannot be reached") and address in line
    assert "Check the network" in line


def test_weights_without_a_finite_score_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = wild(OpenClip()).float().state_dict() | {"positional_embedding": torch.full((77, WIDTH), torch.nan)}
    file = save_pt(tmp_path / "HPS_v2.1_compressed.pt", {"state_dict": tensors})
    words_of_clip(tmp_path / "tokenizer")
    local = partial(convert.convert, tokenizer=str(tmp_path / "tokenizer"))
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path / "rewards"))
    monkeypatch.setattr(convert, "convert", local)
    monkeypatch.setattr(reward_tools, "_file", lambda *_: file)
    with pytest.raises(ValueError, match="hps gave a score that is not finite"):
        reward_tools.fetch("hps")
    assert not (tmp_path / "rewards" / "hps").exists()


@pytest.mark.parametrize(
    ("gated", "words"),
    [((), "it has no file HPS_v2.1_compressed.pt"), (("xswu/HPSv2",), "access is gated; accept its terms")],
)
def test_missing_file_and_gated_repository(gated: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "hub" / "xswu" / "HPSv2").mkdir(parents=True)
    with hub(tmp_path / "hub", gated) as (address, _):
        done = gdmd(tmp_path, address, "rewards", "fetch", "hps")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and words in line and "Traceback" not in line
