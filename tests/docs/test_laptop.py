"""docs/guides/laptop.md: its commands run, and its Python lines draw an image in a process without gdmd."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from local_hub import ROOT
from PIL import Image

from gdmd.cli.app import main
from gdmd.runs.assets import save_asset
from gdmd.shapes.pretrain.miniatures import build_miniature

PAGE = (ROOT / "docs" / "guides" / "laptop.md").read_text(encoding="utf-8")
TRAIN = ("loop.steps=1", "loop.batch_size=2", "method.continuations=2", "model.lora_rank=2", "validation.every=0")
SMALL = {
    "train": (*TRAIN, "eval.per_task=1", "eval.images=2", "eval.teacher_steps=2"),
    "pretrain": ("--steps", "1"),
    "eval": ("--per-task", "1", "-n", "1"),
}
"""What is added to a command to make it short."""


def python(text: str, number: int = 0) -> str:
    """A block of code of a page, whatever its line breaks."""
    code = re.findall(r"```python\n(.*?)```", text, re.S)[number]
    return ast.unparse(ast.parse(code))


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vae = build_miniature("sdxl", 1).vae.state_dict()
    save_asset("pretrained/shapes_kl_vae.safetensors", vae, command="none", seed=1)
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^gdmd (.*)$", PAGE, re.M)]
    assert [words[0] for words in commands] == ["train", "export", "report", "eval", "train", "pretrain", "train"]
    for words in commands:
        with pytest.raises(SystemExit) as end:
            main([*words, *SMALL.get(words[0], ())])
        assert not end.value.code, words
    assert Path("runs/laptop/report.html").is_file() and Path("eval/laptop/compare.html").is_file()
    card = Path("runs/laptop/export/README.md").read_text(encoding="utf-8")
    assert "fill in" not in card, "all parts ship with gdmd"
    assert python(card.replace("THIS_FOLDER", "runs/laptop/export")) == python(PAGE)

    one_line: dict[str, Any] = {}
    exec(python(PAGE, 1), one_line)
    assert one_line["image"].size == (32, 32)

    modules = (
        "import sys; print(*[name for name in sys.modules if name.startswith('gdmd.') and name != 'gdmd._version'])"
    )
    call = [sys.executable, "-c", f"{python(PAGE)}\nimage.save('drawn.png')\n{modules}\n"]
    done = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "" and Image.open("drawn.png").size == (32, 32)
