"""README.md: its tables are those of the stored results, and "Distill your own model" trains and exports one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SH = "".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
OWN_MODEL = [line for line in SH.splitlines() if line.startswith("gdmd") and ("sdxl" in line or "runs/mine" in line)]


def test_length() -> None:
    assert len(README.splitlines()) <= 140


def test_tables_are_those_of_the_stored_results() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "figures"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    for line in (*readme.markdown(readme.read()), *readme.pipelines_markdown()):
        assert line in README


def cached(hf_home: Path, name: str, commit: str, folder: Path) -> None:
    """The hub's cache after a download of the repository at this commit."""
    place = hf_home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    place.mkdir(parents=True)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())


def test_distill_your_own_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines as tiny
    from tiny_rewards import clip, words_of_clip

    from gdmd.rewards.weights import CLIP_H, CLIP_L, PICKSCORE

    for number, (hub, filled) in enumerate(
        ((CLIP_L, (clip, words_of_clip)), (CLIP_H, (words_of_clip,)), (PICKSCORE, (clip,)))
    ):
        for fill in filled:
            fill(tmp_path / str(number))
        cached(tmp_path / "hf", hub.name, str(hub.revision), tmp_path / str(number))
    tiny.save("sdxl", tmp_path / "sdxl")
    (example,) = re.findall(r"```python\n(# my_rewards.py.*?)```", README, re.S)
    (tmp_path / "my_rewards.py").write_text(example)
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.WORDS[:4]))
    small = [f"model.height={tiny.SIZE}", f"model.width={tiny.SIZE}", "model.lora_rank=2", "loop.steps=1"]
    small += ["loop.batch_size=2", "method.group_size=2", "method.continuations=2", "model.dtype=fp32"]
    commands = []
    for line in OWN_MODEL:
        words = shlex.split(line.replace("/models/sdxl", "sdxl"), comments=True)[1:]
        commands.append([*words, *(small if words[0] == "train" else [])])
    assert [words[0] for words in commands] == ["plan", "train", "export"]
    code = (
        "import json, sys\nfrom gdmd.cli.app import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        assert not end.code, (words, end.code)\n"
    )
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(call, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    validated, row = map(json.loads, (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()[:2])
    assert "validation/teacher/pickscore" in validated
    assert {"reward/my_rewards:warm/target", "reward/pickscore/target"} <= row.keys()
    (exported,) = (tmp_path / "runs" / "mine").rglob("pytorch_lora_weights.safetensors")
    assert (exported.parent / "README.md").is_file()
