"""Two ranks distill tiny real pipelines as one process does: adapters, sharded copies, a GAN head, compiled blocks."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from ranks import apart, cheap_linear_steps, run_ranks  # noqa: F401
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDNFTConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd2 import Dmd2
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.programs.train import TrainSettings, create_run
from gdmd.recipes.build import build
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.loop import train
from gdmd.training.role_state import role_states
from gdmd.types import Loss, PromptBatch, Update

pytestmark = pytest.mark.usefixtures("cheap_linear_steps")

NFT: dict[str, dict[str, Any]] = {"adapters": {}, "full": {"full": "both", "checkpointing": True}}
GAN: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl full": ("sdxl", {"full": "both"}),
    "z_image fake": ("z_image", {"full": "fake"}),
}
COMPILED: dict[str, dict[str, Any]] = {
    "adapters": {"checkpointing": False},
    "copies": {"full": "both", "checkpointing": True},
}
BACKEND = os.environ.get("GDMD_TEST_BACKEND", "aot_eager")
"""aot_eager traces the forward and the backward pass, as inductor does, but writes no code (a minute and a compiler)."""


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    return images[:, 0].mean((1, 2))


def greenness(images: Tensor, prompts: PromptBatch) -> Tensor:
    return images[:, 1].mean((1, 2))


GREENNESS = {"kind": "callable", "target": "test_ranks_families:greenness"}


def distill_nft(root: Path, kind: str, place: str, context: DistributedContext = SINGLE_PROCESS) -> None:
    """By the program, with cached text and sample images."""
    console = Console(file=io.StringIO())
    cfg = nft_recipe(root, kind, place)
    create_run(cfg, root / f"{kind}_{place}", ["test"], TrainSettings(console, context))


def nft_recipe(root: Path, kind: str, place: str) -> RunConfig:
    """NFT has an old policy: a separate adapter, or a third copy that must be sharded too."""
    loop = {"steps": 2, "batch_size": 4, "lr_student": 0.3, "lr_fake": 0.3, "log_every": 1}
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "sd3", embeddings=str(root / f"embeddings_{place}"), **NFT[kind]),
        method=DMDNFTConfig(fake_updates=1, images_per_prompt=4, guidance=3.0),
        loop=LoopConfig(**loop, threads=1, ema=0.9, rank_timeout=60, sharding="full" if kind == "full" else "none"),
        prompts={"file": str(root / "prompts.txt")},
        rewards=[{"kind": "callable", "target": "test_ranks_families:brightness"}],
        validation={"every": 2, "prompts": tiny.WORDS[:2], "images": 2, "scorers": [GREENNESS]},
        eval={"teacher_steps": 2},
    )


def gan_roles(root: Path, kind: str) -> DiffusersRoles:
    name, changes = GAN[kind]
    return DiffusersRoles(open_family(tiny.config(root / name, **changes)), head_seed=3)


def distill_gan(root: Path, kind: str, place: str, context: DistributedContext = SINGLE_PROCESS) -> None:
    """DMD2 with a GAN head on the fake score's features."""
    folder, changes = root / f"{kind}_{place}", GAN[kind][1]
    context.on_main(lambda: create(folder, {}).path.name)
    roles = gan_roles(root, kind)
    stream = PromptStream([list(tiny.WORDS)], roles.family.encoder, 2, 0, 1)
    cfg = DMD2Config(fake_updates=1, head_weight=1.0, gan_weight=1.0, guidance=3.0)
    shape = roles.family.latent_shape
    real = lambda prompts, rng: 2 + rng.normal("real", shape)  # noqa: E731
    method = Dmd2(cfg, roles, shape, roles.family.native, real, critic=roles.critic)
    loop = {"steps": 2, "batch_size": 2, "lr_student": 0.1, "lr_fake": 0.1, "log_every": 1}
    sharding = "full" if "full" in changes else "none"
    loop_cfg = LoopConfig(**loop, threads=1, rank_timeout=60, sharding=sharding)  # type: ignore[arg-type]
    train(method, roles, stream, loop_cfg, open_run(folder), context=context)


def compiled_recipe(root: Path, kind: str) -> RunConfig:
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "qwen_image", embeddings=str(root / "embeddings_compiled"), **COMPILED[kind]),
        method=DMDConfig(),
        loop=LoopConfig(steps=1, batch_size=2, lr_student=0.3, sharding="full", threads=1),
        prompts={"file": str(root / "prompts.txt")},
    )


def train_compiled(root: Path, kind: str, backend: str | None, context: DistributedContext) -> None:
    """Saves all weights of the student after two updates, and how many graphs were compiled."""
    cfg, before = compiled_recipe(root, kind), dynamo.utils.counters["stats"]["unique_graphs"]
    components = build(cfg)
    if backend is not None:
        components.roles.compile(backend)
    components.roles.shard(lambda module: context.shard(module, "full"))
    state = role_states(components.roles, cfg.loop, context)["student"]
    prompts = components.stream.at(0, *context.local_slice(2))
    noise = SampleRng(0, 0, prompts.index).normal("noise", components.latent_shape)

    def loss(x_t: Tensor) -> Loss:
        x0 = components.roles.student(x_t, torch.full((len(x_t),), 0.5), prompts.cond).x0
        return Loss((x0 - 1).square().mean((1, 2, 3)))

    for _ in range(2):
        state.apply(Update("student", loss, noise))
    weights = {name: context.full_tensor(own.detach()).clone() for name, own in state.parameters.items()}
    graphs = dynamo.utils.counters["stats"]["unique_graphs"] - before
    save_file(weights, root / f"{kind}_{backend}_{context.rank}.safetensors", {"graphs": str(graphs)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything alone where that is compared, then all by one pair of ranks."""
    root = tmp_path_factory.mktemp("families")
    for name in ("sd3", "sdxl", "z_image", "qwen_image"):  # qwen_image has one block: one graph
        tiny.save(name, root / name)
    (root / "prompts.txt").write_text("\n".join(tiny.WORDS))
    components = build(compiled_recipe(root, "adapters"))
    components.encoder.prepare([text for group in components.stream.groups for text in group])
    for kind in NFT:
        distill_nft(root, kind, "alone")
    for kind in GAN:
        distill_gan(root, kind, "alone")

    def work(context: DistributedContext) -> None:
        for kind in NFT:
            distill_nft(root, kind, "ranks", context)
        for kind in GAN:
            distill_gan(root, kind, "ranks", context)
        for kind in COMPILED:
            for backend in (None, BACKEND):
                train_compiled(root, kind, backend, context)

    ended = run_ranks(work, root, seconds=400 if BACKEND == "aot_eager" else 900)
    assert [end.code for end in ended] == [0, 0], ended
    return root


def saved(root: Path, kind: str) -> list[checkpoint.Checkpoint]:
    found = [checkpoint.load_newest(root / f"{kind}_{place}" / "checkpoints") for place in ("alone", "ranks")]
    assert found[0] is not None and found[1] is not None
    return found


@pytest.mark.parametrize("kind", NFT)
def test_nft_of_two_ranks_equals_one(root: Path, kind: str) -> None:
    """Weights, EMA and old policy; validation scores; text is encoded once for all of them."""
    alone, ranks = saved(root, kind)
    begun = build(nft_recipe(root, kind, "alone")).roles
    for part in ("student", "fake", "ema", "old"):
        start = begun.parameters("fake" if part == "fake" else "student")
        found = apart(alone.part(part), ranks.part(part), {name: weights.detach() for name, weights in start.items()})
        assert found < 1e-3, (part, found)
    grids = [path.name for path in sorted((root / f"{kind}_ranks" / "grids").iterdir())]
    assert grids == ["step_000000.png", "step_000002.png", "teacher.safetensors"]
    alone_rows, rows = (read_metrics(root / f"{kind}_{place}") for place in ("alone", "ranks"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, other in zip(rows, alone_rows, strict=True):
        scores = {key: value for key, value in row.items() if key.startswith("validation/")}
        assert scores == pytest.approx({key: other[key] for key in scores}, abs=2e-3)
        assert len(scores) == {0: 4, 1: 0, 2: 2}[row["step"]]
    count = [len(list((root / f"embeddings_{place}").rglob("shard_*"))) for place in ("alone", "ranks")]
    assert count[0] == count[1] > 0


@pytest.mark.parametrize("kind", GAN)
def test_gan_of_two_ranks_equals_one(root: Path, kind: str) -> None:
    alone, ranks = saved(root, kind)
    assert "gan_head.conv.weight" in alone.part("fake")
    begun = gan_roles(root, kind)
    for part in ("student", "fake"):
        start = {name: weights.detach() for name, weights in begun.parameters(part).items()}
        found = apart(alone.part(part), ranks.part(part), start)
        assert found < 1e-3, (part, found)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_blocks_train_the_same_weights(root: Path, kind: str) -> None:
    files = [root / f"{kind}_{backend}_{rank}.safetensors" for backend, rank in ((None, 0), (BACKEND, 0), (BACKEND, 1))]
    eager, compiled, other = (load_file(file) for file in files)
    assert eager.keys() == compiled.keys() and eager
    assert all(torch.equal(compiled[name], other[name]) for name in eager)
    start = build(compiled_recipe(root, kind)).roles.parameters("student")
    assert apart(eager, compiled, {name: weights.detach() for name, weights in start.items()}) < 1e-3
    for file, some in zip(files, (False, True, True), strict=True):
        with safe_open(file, "pt") as opened:
            assert (int(opened.metadata()["graphs"]) > 0) == some, file
