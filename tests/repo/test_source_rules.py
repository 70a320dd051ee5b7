"""House rules that a reader would otherwise have to check by eye; each check is shown a bad example too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source_rules import (
    PACKAGE,
    ROOT,
    docstring_violations,
    safety_violations,
    sources,
    weight_violations,
)

PRODUCT = sources("gdmd", "examples", "benchmarks")
DOCUMENTED = sources("gdmd/losses", "gdmd/diffusion")
MEGABYTE = 1_000_000


@pytest.mark.parametrize("path", PRODUCT)
def test_nothing_is_pickled_and_no_nan_becomes_a_number(path: str) -> None:
    assert not safety_violations(path, PRODUCT[path])


@pytest.mark.parametrize("path", DOCUMENTED)
def test_public_functions_of_the_mathematics_are_documented(path: str) -> None:
    assert not docstring_violations(path, DOCUMENTED[path])


def test_the_shipped_assets_weigh_at_most_12_megabytes() -> None:
    assert not weight_violations(PACKAGE / "assets", 12 * MEGABYTE)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "torch.load('x')",
        "from torch import load",
        "torch.save(x, 'x')",
        "f(weights_only=False)",
        "np.load('x', allow_pickle=True)",
        "torch.nan_to_num(x)",
        "x.nan_to_num_(0)",
        "from torch import nan_to_num",
    ],
)
def test_pickle_and_nan_to_num_are_found(line: str) -> None:
    assert safety_violations("x.py", line)


def test_a_third_partys_file_is_read_in_one_place_only_and_as_tensors_only() -> None:
    line = "torch.load('x', weights_only=True)"
    assert not safety_violations("gdmd/rewards/convert.py", line)
    assert safety_violations("gdmd/rewards/clip.py", line)
    assert safety_violations("gdmd/rewards/convert.py", "torch.load('x')")


def test_safe_loading_is_not_flagged() -> None:
    safe = (
        "from safetensors.torch import load_file\nload_file('x')\nf(weights_only=True)\nnp.load(p, allow_pickle=False)"
    )
    assert not safety_violations("x.py", safe)


def test_a_public_function_without_a_docstring_is_found() -> None:
    assert docstring_violations("x.py", "def loss(x): return x") == ["x.py:1: loss has no docstring"]
    assert docstring_violations("x.py", "class Rng:\n    x = 1") == ["x.py:1: Rng has no docstring"]
    assert not docstring_violations(
        "x.py", "def _helper(x): return x\ndef loss(x):\n    'Mean.'\nclass _A:\n    def f(): 1"
    )


def test_a_heavy_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.safetensors", "inner/b.json", "unfinished.part"):
        (tmp_path / name).write_bytes(bytes(60))
    assert not weight_violations(tmp_path, 120)
    assert weight_violations(tmp_path, 119) == [f"{tmp_path.name} weighs 120 bytes, at most 119"]


def test_nothing_tells_to_install_from_a_package_index_where_gdmd_is_not() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    texts = {**PRODUCT, **{str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages}}
    assert [path for path, text in texts.items() if re.search(r"pip install '?gdmd", text)] == []
