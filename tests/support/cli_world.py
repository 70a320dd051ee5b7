"""Fixtures for tests of the program: untrained networks as assets, an empty current folder, tiny runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gdmd.cli.app import main
from gdmd.io import content_hash
from gdmd.recipes.read import read_recipe
from gdmd.runs import assets
from gdmd.runs.assets import save_asset
from gdmd.runs.student_file import ROLES
from gdmd.shapes.networks import ShapesDit, ShapesVae
from gdmd.shapes.scorer_networks import KINDS, build_net

TINY = (
    "method.group_size=1",
    "loop.steps=2",
    "loop.batch_size=2",
    "loop.checkpoint_every=1",
    "loop.log_every=1",
    "validation.every=0",
    "loop.threads=1",
    "eval.per_task=1",
    "eval.images=2",
    "eval.teacher_steps=1",
)
"""Overrides of shapes_smoke that make a run take about a second."""


def run_gdmd(*arguments: object) -> None:
    """Call the program in this process; it must exit with 0."""
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    assert not ended.value.code


@dataclass(frozen=True)
class Finished:
    """The result of a call."""

    code: int
    out: str
    err: str


class Gdmd:
    """Calls the program in this process: ``gdmd("eval", "run")``; ``gdmd.train(...)`` trains a tiny run."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], None],
        folder_of_assets: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        cache: Path | None = None,
    ) -> None:
        self.main, self.assets, self.capsys, self.cache = main, folder_of_assets, capsys, cache
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
        """Train a tiny run without evaluation."""
        return self("train", "shapes_smoke", *TINY, *arguments, "--no-eval")

    def trained(self, *overrides: str, run: str = "run") -> Path:
        """A copy of a finished tiny run, which is trained once per session."""
        assert self.cache is not None
        known = self.cache / content_hash(*overrides)
        if not known.exists():
            finished = self.train(*overrides, "--run", str(known))
            assert finished.code == 0, finished.err
        return Path(shutil.copytree(known, run))


@pytest.fixture(scope="session")
def shared_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained networks in place of the shipped ones; tests only read them."""
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def gdmd(
    shared_assets: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Gdmd:
    """The program in an empty current folder, with untrained networks in place of the shipped ones."""
    cache = tmp_path_factory.getbasetemp() / "trained"
    return Gdmd(main, shared_assets, tmp_path, monkeypatch, capsys, cache)


def make_assets(folder: Path) -> Path:
    """Untrained networks under the names of the shipped ones."""
    torch.manual_seed(0)
    nets = {"shapes_teacher": ShapesDit(), "shapes_vae": ShapesVae(), **{kind: build_net(kind) for kind in KINDS}}
    for name, net in nets.items():
        save_asset(folder / f"{name}.safetensors", net.state_dict(), command="none", seed=0)
    both = {f"{role}.{name}": own for role in ROLES for name, own in nets["shapes_teacher"].state_dict().items()}
    facts = {"step": 1, "updates": 4, "inputs": {}, "config": read_recipe("shapes_dmd").model_dump(mode="json")}
    save_asset(folder / "shapes_dmd.safetensors", both, command="none", seed=0, metadata=facts)
    return folder


def folder_state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
