"""docs/guides/turbo.md: the commands on the miniature run at a tiny budget, and its numbers are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from local_hub import ROOT

from gdmd.cli.app import main
from gdmd.models.timesteps import FlowTimesteps
from gdmd.recipes.read import read_recipe

PAGE = (ROOT / "docs" / "guides" / "turbo.md").read_text(encoding="utf-8")
SMALL = {
    "train": ("loop.steps=1", "loop.batch_size=2", "method.continuations=2", "validation.every=0", "eval.per_task=1")
    + ("eval.images=2", "eval.teacher_steps=2", "loop.threads=1"),
    "eval": ("--per-task", "1", "-n", "1"),
}
"""What is added to a command to make it short."""


def test_commands_on_the_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"```sh\n(.*?)```", PAGE, re.S)[0].replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [words[0] for words in commands] == ["train", "export", "train", "eval", "export"]
    for words in commands:
        with pytest.raises(SystemExit) as end:
            main([*words, *SMALL.get(words[0], ())])
        assert not end.value.code, words
    assert Path("eval/turbo/compare.html").is_file()
    card = Path("runs/aligned/export/README.md").read_text(encoding="utf-8")
    assert "| student starts as | runs/turbo/distilled |" in card and "The scheduler is deterministic" in card


def test_table_of_recipes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) .*\| (\d), `(\w+)` \|$", PAGE, re.M)
    assert len(rows) == 3
    for name, start, steps, sampler in rows:
        cfg = read_recipe(name)
        given = cfg.model.student or cfg.model.student_lora.path  # type: ignore[union-attr]
        assert start == "SDXL" or given == start
        assert (len(cfg.method.student_steps), cfg.method.student_sampler) == (int(steps), sampler)


def test_times_of_sd3() -> None:
    (steps,) = re.findall(r"method.student_steps=\[([\d.,]+)\]", PAGE)
    times = FlowTimesteps(shift=3.0).student([float(u) for u in steps.split(",")])
    assert times == pytest.approx((1, 0.858, 0.602, 0.00892), abs=5e-4)
