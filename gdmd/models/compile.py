"""torch.compile for the repeated blocks of a network: blocks of the same structure share one graph.

The rest of the network, activation checkpointing and hooks (FSDP2's too) stay outside of the graphs. The active adapter is
a guard, so every role has separate graphs: 2 to 3 for calls without gradient and as many for calls with one.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

MAX_GRAPHS = 64
"""Largest number of graphs per kind of block: roles x (with and without gradient) x batch sizes x kinds of block."""


def compile_blocks(net: nn.Module, names: Collection[str], backend: str = "inductor") -> int:
    """Compile the forward of every module whose class is in ``names``, in place; returns their number.

    No module is added or replaced, so the names of weights stay the same. Shapes are static, so that a block recomputed
    in the backward pass finds the graph of its forward pass. More than MAX_GRAPHS graphs and graph breaks are errors,
    not a silent fallback to eager mode.
    """
    import torch._dynamo as dynamo

    blocks: list[Any] = [module for module in net.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"model.compile is on, but {type(net).__name__} has none of the blocks {sorted(names)} (Family.blocks); "
            "set model.compile = false"
        )
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_GRAPHS)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
    return len(blocks)


def require_compiler(device: str) -> None:
    """ValueError if torch.compile's backend is missing: Triton on a GPU, a C++ compiler on a CPU."""
    from importlib.util import find_spec

    if device.startswith("cpu"):
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        found, what = shutil.which(compiler) is not None, f"a C++ compiler ({compiler}; CXX names another)"
    else:
        found, what = find_spec("triton") is not None, "Triton (it comes with torch for CUDA on Linux)"
    if not found:
        raise ValueError(
            f"model.compile is on, and torch.compile needs {what}, which was not found; install it or set "
            "model.compile = false"
        )
