"""README.md: its commands are accepted as they are printed, and those for a model of one's own train and export one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from local_hub import ROOT
from typer.main import get_command

from gdmd.cli.app import app
from gdmd.config.run import RunConfig
from gdmd.recipes.read import read_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("gdmd")
]
OWN_MODEL = [line for line in LINES if "sdxl" in line or "runs/mine" in line]


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_accepted(line: str) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    given = command.commands[name].make_context(name, words).params
    if name in ("train", "plan"):
        recipe, *overrides = given.get("words") or [given["recipe"], *given["overrides"]]
        assert isinstance(read_recipe(recipe, overrides), RunConfig)


def cached(hf_home: Path, name: str, commit: str, folder: Path) -> None:
    """The hub's cache after a download of the repository at this commit."""
    place = hf_home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    place.mkdir(parents=True)
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())


def test_the_commands_for_your_own_model_train_and_export_it_with_the_rewards_as_published(tmp_path: Path) -> None:
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
    row = json.loads((tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward/clip/target", "reward/pickscore/target"} <= row.keys()
    (exported,) = (tmp_path / "runs" / "mine").rglob("pytorch_lora_weights.safetensors")
    assert (exported.parent / "README.md").is_file()
