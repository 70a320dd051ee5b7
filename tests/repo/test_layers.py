"""Imports go strictly down the levels, and packages on one level are blind to each other."""

from __future__ import annotations

import pytest
from source_rules import (
    LEVELS,
    PACKAGE,
    distributed_violations,
    layer_violations,
    pure_violations,
    sources,
    torch_violations,
)

GDMD = sources("gdmd")
PURE = sources("gdmd/diffusion", "gdmd/losses")
NOUNS = {**sources("gdmd/config"), "gdmd/types.py": GDMD["gdmd/types.py"]}


def test_the_checks_see_the_package() -> None:
    assert len(GDMD) > 20
    assert {path.split("/")[1] for path in PURE} == {"diffusion", "losses"}
    assert "gdmd/config/load.py" in NOUNS
    folders = {folder.name for folder in PACKAGE.iterdir() if list(folder.glob("*.py"))}
    assert folders <= LEVELS.keys(), f"packages without a level: {folders - LEVELS.keys()}"


@pytest.mark.parametrize("path", GDMD)
def test_imports_go_strictly_down(path: str) -> None:
    assert not layer_violations(path, GDMD[path])


@pytest.mark.parametrize("path", GDMD)
def test_only_one_file_knows_torch_distributed(path: str) -> None:
    assert not distributed_violations(path, GDMD[path])


@pytest.mark.parametrize("path", PURE)
def test_level_one_is_pure_torch(path: str) -> None:
    assert not pure_violations(path, PURE[path])


@pytest.mark.parametrize("path", NOUNS)
def test_level_zero_imports_no_torch(path: str) -> None:
    assert not torch_violations(path, NOUNS[path])


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("gdmd/losses/dmd.py", "from gdmd.methods.gdmd import Gdmd"),
        ("gdmd/losses/dmd.py", "import gdmd.training.loop"),
        ("gdmd/losses/dmd.py", "from ..methods import gdmd"),
        ("gdmd/losses/dmd.py", "from .. import methods"),
        ("gdmd/losses/__init__.py", "from ..cli.app import main"),
        ("gdmd/losses/dmd.py", "from gdmd import shapes"),
        ("gdmd/methods/gdmd.py", "from gdmd.shapes.rewards import ShapesClip"),
        ("gdmd/methods/gdmd.py", "def f():\n    from ..data import prompts"),
        ("gdmd/methods/gdmd.py", "if TYPE_CHECKING:\n    from gdmd.training.loop import Loop"),
        ("gdmd/config/methods/all.py", "from gdmd.types import Loss"),
        ("gdmd/types.py", "from gdmd.diffusion.rng import SampleRng"),
        ("gdmd/training/loop.py", "importlib.import_module('gdmd.recipes.build')"),
        ("gdmd/losses/dmd.py", "from gdmd.__main__ import main"),
        ("gdmd/losses/dmd.py", "from gdmd.helpers import x"),
        ("gdmd/helpers/x.py", "import math"),
        ("gdmd/__init__.py", "from gdmd.types import Loss"),
    ],
)
def test_an_upward_or_sideways_import_is_found(path: str, line: str) -> None:
    assert len(layer_violations(path, line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("gdmd/methods/gdmd.py", "from gdmd.losses import gdmd"),
        ("gdmd/methods/gdmd.py", "from ..types import Update"),
        ("gdmd/methods/gdmd.py", "from .distillation import Rollout"),
        ("gdmd/cli/app.py", "from gdmd import __version__"),
        ("gdmd/types.py", "if TYPE_CHECKING:\n    from gdmd.diffusion.rng import SampleRng"),
        ("gdmd/losses/dmd.py", "import torch\nfrom math import pi"),
        ("gdmd/__main__.py", "from gdmd.cli.app import main"),
    ],
)
def test_a_downward_import_is_allowed(path: str, line: str) -> None:
    assert not layer_violations(path, line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import barrier",
        "import torch\ntorch.distributed.barrier",
        "from torch.nn.parallel import DistributedDataParallel",
    ],
)
def test_torch_distributed_is_found_elsewhere_and_allowed_in_its_file(line: str) -> None:
    assert distributed_violations("gdmd/training/loop.py", line)
    assert not distributed_violations("gdmd/training/distributed.py", line)
    assert not distributed_violations("gdmd/training/loop.py", "from torch.distributions import Normal")


@pytest.mark.parametrize(
    "line",
    [
        "import numpy as np",
        "from pathlib import Path",
        "class Net(nn.Module): pass",
        "class Net(torch.nn.Module): pass",
        "text = open('x').read()",
        "torch.save(x, 'x')",
    ],
)
def test_an_impure_line_is_found(line: str) -> None:
    assert pure_violations("gdmd/losses/dmd.py", line)
    assert not pure_violations("gdmd/losses/dmd.py", "import math\nimport torch\nfrom gdmd.types import Loss")


def test_torch_in_level_zero_is_found_even_inside_a_function() -> None:
    assert torch_violations("gdmd/config/x.py", "import torch")
    assert torch_violations("gdmd/config/x.py", "def f():\n    from torch import Tensor")
    assert not torch_violations("gdmd/types.py", "if TYPE_CHECKING:\n    from torch import Tensor")
