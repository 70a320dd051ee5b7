"""Two ranks with compiled blocks train what two ranks without them train: adapters as replicas, full copies under FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from ranks import apart, linear_steps, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.recipes.build import build
from gdmd.training.distributed import DistributedContext
from gdmd.training.role_state import role_states
from gdmd.types import Loss, Update

LR = 0.3
KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"checkpointing": False},
    "copies": {"full": "both", "checkpointing": True},
}
BACKEND = os.environ.get("GDMD_TEST_BACKEND", "aot_eager")
"""aot_eager traces the forward and the backward pass, as inductor does, but writes no code (a minute and a compiler)."""


def recipe(root: Path, kind: str) -> RunConfig:
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "qwen_image", embeddings=str(root / "embeddings"), **KINDS[kind]),
        method=DmdConfig(),
        loop=LoopConfig(steps=1, batch_size=2, lr_student=LR, sharding="full", threads=1),
        prompts={"file": str(root / "prompts.txt")},
    )


def trained(cfg: RunConfig, context: DistributedContext, backend: str | None) -> dict[str, Tensor]:
    """All weights of the student, whole, after two updates."""
    components = build(cfg)
    if backend is not None:
        components.roles.compile(backend)
    components.roles.shard(lambda module: context.shard(module, "full"))
    state, prompts = (
        role_states(components.roles, cfg.loop, context)["student"],
        components.stream.at(0, *context.local_slice(2)),
    )
    noise = SampleRng(0, 0, prompts.index).normal("noise", components.latent_shape)

    def loss(x_t: Tensor) -> Loss:
        x0 = components.roles.student(x_t, torch.full((len(x_t),), 0.5), prompts.cond).x0
        return Loss((x0 - 1).square().mean((1, 2, 3)))

    for _ in range(2):
        state.apply(Update("student", loss, noise))
    return {name: context.full_tensor(own.detach()).clone() for name, own in state.parameters.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds, without and with compiled blocks, by one pair of ranks."""
    root = tmp_path_factory.mktemp("compiled")
    tiny.save("qwen_image", root / "qwen_image")  # one block: one graph
    (root / "prompts.txt").write_text("\n".join(tiny.WORDS))
    components = build(recipe(root, "adapters"))
    components.encoder.prepare([text for group in components.stream.groups for text in group])

    def work(context: DistributedContext) -> None:
        for kind in KINDS:
            for backend in (None, BACKEND):
                before = dynamo.utils.counters["stats"]["unique_graphs"]
                weights = trained(recipe(root, kind), context, backend)
                graphs = dynamo.utils.counters["stats"]["unique_graphs"] - before
                save_file(weights, root / f"{kind}_{backend}_{context.rank}.safetensors", {"graphs": str(graphs)})

    with linear_steps():
        ended = run_ranks(work, root, seconds=200 if BACKEND == "aot_eager" else 900)
    assert [end.code for end in ended] == [0, 0], ended
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_the_same_weights_with_compiled_blocks(root: Path, kind: str) -> None:
    eager, compiled, other = (
        load_file(root / f"{kind}_{backend}_{rank}.safetensors")
        for backend, rank in ((None, 0), (BACKEND, 0), (BACKEND, 1))
    )
    assert eager.keys() == compiled.keys() and eager
    assert all(torch.equal(compiled[name], other[name]) for name in eager)
    start = build(recipe(root, kind)).roles.parameters("student")
    assert apart(eager, compiled, {name: weights.detach() for name, weights in start.items()}) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_were_compiled(root: Path, kind: str) -> None:
    from safetensors import safe_open

    for backend, some in ((None, False), (BACKEND, True)):
        with safe_open(root / f"{kind}_{backend}_0.safetensors", "pt") as opened:
            assert (int(opened.metadata()["graphs"]) > 0) == some, backend
