"""DMD2's GAN on real families by two ranks: sharded full copies, and adapters beside one, learn what one process learns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from ranks import apart, linear_steps, run_ranks

from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.methods.dmd2 import Dmd2
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.loop import train

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl full": ("sdxl", {"full": "both"}),
    "z_image fake": ("z_image", {"full": "fake"}),
}


def roles_of(root: Path, kind: str) -> DiffusersRoles:
    name, changes = KINDS[kind]
    return DiffusersRoles(open_family(tiny.config(root / name, **changes)), head_seed=3)


def distill(root: Path, kind: str, place: str, context: DistributedContext = SINGLE_PROCESS) -> None:
    folder, changes = root / f"{kind}_{place}", KINDS[kind][1]
    context.on_main(lambda: create(folder, {}).path.name)
    roles = roles_of(root, kind)
    stream = PromptStream([list(tiny.WORDS)], roles.family.encoder, 2, 0, 1)
    cfg = Dmd2Config(fake_updates=1, head_weight=1.0, gan_weight=1.0, guidance=3.0)
    shape = roles.family.latent_shape
    real = lambda prompts, rng: 2 + rng.normal("real", shape)  # noqa: E731
    method = Dmd2(cfg, roles, shape, roles.family.native, real, critic=roles.critic)
    loop = {"steps": 2, "batch_size": 2, "lr_student": 0.1, "lr_fake": 0.1, "log_every": 1, "grid_every": 0}
    sharding = "full" if "full" in changes else "none"
    train(
        method, roles, stream, LoopConfig(**loop, threads=1, rank_timeout=60, sharding=sharding),  # type: ignore[arg-type]
        open_run(folder), context=context,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind alone, then all by one pair of ranks."""
    root, before = tmp_path_factory.mktemp("judged"), os.fsync
    os.fsync = lambda handle: None
    for name, _ in KINDS.values():
        if not (root / name).exists():
            tiny.save(name, root / name)

    def all_kinds(place: str, context: DistributedContext = SINGLE_PROCESS) -> None:
        for kind in KINDS:
            distill(root, kind, place, context)

    try:
        with linear_steps():
            all_kinds("alone")
            ended = run_ranks(lambda context: all_kinds("ranks", context), root)
    finally:
        os.fsync = before
    assert [end.code for end in ended] == [0, 0], ended
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_the_head_and_both_roles_as_one_process(root: Path, kind: str) -> None:
    alone, ranks = (checkpoint.load_newest(root / f"{kind}_{place}" / "checkpoints") for place in ("alone", "ranks"))
    assert alone is not None and ranks is not None
    assert "gan_head.conv.weight" in alone.part("fake")
    begun = roles_of(root, kind)
    for part in ("student", "fake"):
        start = {name: weights.detach() for name, weights in begun.parameters(part).items()}
        found = apart(alone.part(part), ranks.part(part), start)
        assert found < 1e-3, (part, found)
