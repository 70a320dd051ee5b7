"""A small world for tests of the program: untrained networks as assets, an empty current folder, tiny runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gdmd.runs import assets
from gdmd.runs.assets import save_asset
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.scorer_networks import KINDS, build_net

TINY = (
    "method.group_size=1",
    "loop.steps=2",
    "loop.batch_size=2",
    "loop.checkpoint_every=1",
    "loop.log_every=1",
    "loop.grid_every=0",
    "loop.threads=1",
    "eval.per_task=1",
    "eval.images=2",
    "eval.teacher_steps=1",
)
"""Overrides of shapes_smoke that make a run a matter of a second."""


@dataclass(frozen=True)
class Finished:
    """What a call of the program left."""

    code: int
    out: str
    err: str


class Gdmd:
    """Calls the program in this process: ``gdmd("eval", "run")``; ``gdmd.train(...)`` is a tiny training run."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], None],
        folder_of_assets: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.main, self.assets, self.capsys = main, folder_of_assets, capsys
        self.folder = tmp_path / "here"
        self.folder.mkdir()
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(assets, "asset_folder", lambda: folder_of_assets)

    def __call__(self, *arguments: str) -> Finished:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            self.main(list(arguments))
        printed = self.capsys.readouterr()
        code = stopped.value.code
        return Finished(code if isinstance(code, int) else 0, printed.out, printed.err)

    def train(self, *arguments: str) -> Finished:
        """A tiny run without evaluation."""
        return self("train", "shapes_smoke", *TINY, *arguments, "--no-eval")


def make_assets(folder: Path) -> Path:
    """Untrained networks under the names of the shipped ones."""
    torch.manual_seed(0)
    nets = {"shapes_teacher": ShapesDit(), "shapes_vae": ShapesVae(), **{kind: build_net(kind) for kind in KINDS}}
    for name, net in nets.items():
        save_asset(folder / f"{name}.safetensors", net.state_dict(), command="none", seed=0)
    return folder


def folder_state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
