"""Tokens in environment variables are never written to a run, an export, a card or the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from cli_world import run_gdmd
from huggingface_hub import get_token

from gdmd.types import PromptBatch

SECRETS = {
    "HF_TOKEN": "hf_AToKenThatNobodyElseKnowsAndNobodyShould",
    "GDMD_REWARD_TOKEN": "another-token-that-nobody-else-knows",
    "GDMD_STUDY_TOKEN": "a-third-token-that-nobody-else-knows",
}


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


def test_tokens_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    assert get_token() == SECRETS["HF_TOKEN"]  # what the hub's library would send
    pipeline, run = tiny.save("sd3", tmp_path / "sd3"), tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.WORDS))
    recipe = {
        "name": "tiny",
        "model": tiny.config(pipeline).model_dump(mode="json"),
        "method": {"kind": "gdmd", "group_size": 1, "guidance": 3.0},
        "loop": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "log_every": 1, "threads": 1},
        "validation": {"every": 1},
        "eval": {"teacher_steps": 2},
        "prompts": {"file": str(tmp_path / "prompts.txt")},
        "rewards": [{"kind": "callable", "target": "test_tokens:brightness"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_gdmd("train", str(tmp_path / "recipe.yaml"), "--run", str(run), "--no-eval")
    run_gdmd("export", str(run))
    run_gdmd("doctor")
    assert (run / "export" / "README.md").is_file()
    printed = "".join(capfd.readouterr())
    assert "gdmd" in printed
    for secret in SECRETS.values():
        assert secret not in printed
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert not [file for file in files if secret.encode() in file.read_bytes()]
