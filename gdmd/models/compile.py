"""torch.compile for the repeated blocks of a network: one graph serves all blocks that are built alike.

What stays outside a graph: the rest of the network, activation checkpointing, and hooks (those of FSDP2 too). What a
block wears is read when it is called and guarded, so that every role has graphs of its own: 2 to 3 in a call without
gradient, as many in one with.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

GRAPHS = 64
"""Most graphs of one kind of block: roles x (with and without gradient) x batch sizes x kinds of block."""


def compile_blocks(net: nn.Module, names: Collection[str], backend: str = "inductor") -> int:
    """Compile the forward of every module whose class is in ``names``, in place; says how many there are.

    No module is added or replaced: names of weights stay. Shapes are static, so that a block that is recomputed in
    the backward pass finds the graph of its forward pass. More than GRAPHS graphs, or code that does not fit in one,
    is an error and no silent return to eager mode.
    """
    import torch._dynamo as dynamo

    blocks: list[Any] = [module for module in net.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"model.compile is on, but {type(net).__name__} holds none of the blocks {sorted(names)} (Family.blocks); "
            "set model.compile = false"
        )
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
    return len(blocks)


def require_compiler(device: str) -> None:
    """ValueError where torch.compile has nothing to compile with: Triton on a GPU, a C++ compiler on a CPU."""
    from importlib.util import find_spec

    if device.startswith("cpu"):
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        found, what = shutil.which(compiler) is not None, f"a C++ compiler ({compiler}; CXX names another)"
    else:
        found, what = find_spec("triton") is not None, "Triton (it comes with torch for CUDA on Linux)"
    if not found:
        raise ValueError(
            f"model.compile is on, and torch.compile needs {what}, which is not here; install it or set "
            "model.compile = false"
        )
