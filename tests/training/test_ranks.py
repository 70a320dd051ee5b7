"""2 ranks x batch 4 == 1 rank x batch 8 == 8 micro-batches of 1: weights, EMA, optimizer state, old policy, Z, statistics.

Not bit for bit: sums over samples are added in another order, which changes a gradient by about 1e-7 of its size. The
steps of these runs are linear in the gradient (``linear_steps``), so that the weights differ by as little.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import apart, cheap_linear_steps, run_ranks  # noqa: F401
from tiny_roles import Toy, ToyCodec, real_latents, tiny_roles
from torch import Tensor

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDNFTConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDAblationConfig
from gdmd.config.methods.gdmd_tilted import ShuffledTiltedGDMDConfig, TiltedGDMDConfig
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.methods.gains import gains_hook
from gdmd.recipes.build import SHAPES, method_of
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_facts, read_metrics
from gdmd.shapes.roles import ShapesRoles, ShapesTextEncoder
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.loop import Hooks, train
from gdmd.training.rank import RankInfo, rank_info
from gdmd.types import PromptBatch

pytestmark = pytest.mark.usefixtures("cheap_linear_steps")

TEXTS = ["a circle", "a red square", "two rings", "a circle and a square"]
TEACHER_TEXTS = ["a blue circle", "", "two rings", "a red circle and a blue square"]
ROWS = [{"prompt": text, "teacher_prompt": other} for text, other in zip(TEXTS, TEACHER_TEXTS, strict=True)]
LR, STEPS = 0.05, 3
APART = 1e-4
"""The largest distance of two runs, relative to the distance that their weights moved, or to the norm of optimizer state
and Z; counters are equal. fp32 rounds a weight to 6e-8 of it, about 1e-5 of its movement here; one micro-batch of four
at a third of its weight is a tenth of the gradient."""
TILTED: dict[str, Any] = {"group_size": 1, "continuations": 2, "gamma": 1.0, "reward_gradient": 0.1}
CONFIGS: dict[str, Any] = {
    "gdmd": GDMDAblationConfig(group_size=2, old_policy="ema", control="shuffled"),
    "tilted": TiltedGDMDConfig(**TILTED, student_sampler="ode"),
    "shuffled": ShuffledTiltedGDMDConfig(**TILTED),
    "nft": DMDNFTConfig(fake_updates=2, images_per_prompt=8, rl_weight=1.0),  # one prompt's group lies on both ranks
    "dmdr_dpo": DMDRConfig(fake_updates=1, cold_start=1, strategy="dpo", images_per_prompt=8),
    "dmd2_gan": DMD2Config(fake_updates=2),
    "dmd_pairs": DMDConfig(fake_updates=1, regression_weight=0.25, regression_steps=2, regression_batches=2),
}
SHARDED = {
    "gdmd_full": ("gdmd", "full"),
    "gdmd_hybrid": ("gdmd", "hybrid"),
    "tilted_full": ("tilted", "full"),
    "dmd2_gan_full": ("dmd2_gan", "full"),
}

MICRO = {"gdmd_micro_2": "none", "gdmd_micro_full_2": "full"}
"""Two ranks that split their own four samples into micro-batches of one, by loop.sharding."""


def run(
    name: str, folder: Path, context: DistributedContext = SINGLE_PROCESS, steps: int = STEPS, **changes: Any
) -> None:
    """Train the tiny networks by CONFIGS[name] to ``steps``, continuing where the folder's run stopped."""
    cfg = CONFIGS[name]
    loop = LoopConfig(
        **{"steps": steps, "batch_size": 8, "lr_student": LR, "lr_fake": LR, "log_every": 1}
        | {"threads": 1, "seed": 1, "ema": 0.9, "rank_timeout": 120}
        | changes
    )
    context.on_main(lambda: None if folder.exists() else create(folder, {}).path.name)
    roles = roles_of(cfg)
    stream = PromptStream([TEXTS], ShapesTextEncoder(), 8, 1, cfg.prompt_group, [ROWS])
    method = method_of(cfg, roles, ToyCodec(), (Toy(unscored=(6,)), Toy("green", 1)), SHAPES, real_latents)
    train(method, roles, stream, loop, open_run(folder), Hooks(at_log=gains_hook(method)), context)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file: alone, in micro-batches, and all those of two ranks in one pair of processes."""
    root = tmp_path_factory.mktemp("ranks")
    for name in CONFIGS:
        run(name, root / name)
    run("gdmd", root / "gdmd_micro", micro_batch=1)
    run("gdmd", root / "one_to_two", steps=2)

    def work(context: DistributedContext) -> None:
        for name in CONFIGS:
            run(name, root / f"{name}_2", context)
        for name, (method, how) in SHARDED.items():
            run(method, root / f"{name}_2", context, sharding=how)
        for name, how in MICRO.items():
            run("gdmd", root / name, context, sharding=how, micro_batch=1)
        run("gdmd", root / "two_to_one", context, steps=2, sharding="full")
        run("gdmd", root / "one_to_two", context, sharding="full")

    ended = run_ranks(work, root, local_size=1)  # for hybrid: two machines
    assert [end.code for end in ended] == [0, 0], ended
    run("gdmd", root / "two_to_one")
    return root


def tensors_of(folder: Path) -> dict[str, Tensor]:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None and saved.step == STEPS
    return {f"{part}/{name}": value for part, named in saved.tensors.items() for name, value in named.items()}


def roles_of(cfg: Any) -> ShapesRoles:
    return ShapesRoles(tiny_roles().teacher.net, head_seed=3) if isinstance(cfg, DMD2Config) else tiny_roles()


def start_of(part: str, cfg: Any) -> dict[str, Tensor] | None:
    """The weights with which a run begins: EMA and old policy as the student, optimizer state and Z at 0 (None)."""
    role = {"student": "student", "ema": "student", "old": "student", "fake": "fake"}.get(part)
    if role is None:
        return None
    return {f"{part}/{name}": weights.detach() for name, weights in roles_of(cfg).parameters(role).items()}


def assert_equal(first: Path, second: Path) -> None:
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for part in dict.fromkeys(name.partition("/")[0] for name in a):
        names = [name for name in a if name.startswith(part + "/")]
        assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in names)
        assert all(torch.equal(a[name], b[name]) for name in names if "/step/" in name)
        names = [name for name in names if "/step/" not in name]
        own, other = ({name: tensors[name] for name in names} for tensors in (a, b))
        found = apart(own, other, start_of(part, CONFIGS.get(first.name)))
        assert found < APART, (part, found)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_equal_one(runs: Path, name: str) -> None:
    assert_equal(runs / name, runs / f"{name}_2")


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_equal_one_rank(runs: Path, name: str) -> None:
    assert_equal(runs / SHARDED[name][0], runs / f"{name}_2")


@pytest.mark.parametrize("name", ["gdmd_2", "gdmd_full_2", "gdmd_micro"])
def test_z_of_the_global_batch(runs: Path, name: str) -> None:
    a, b = tensors_of(runs / "gdmd"), tensors_of(runs / name)
    assert a["method/scale.mean"].min() > 0
    assert torch.allclose(a["method/scale.mean"], b["method/scale.mean"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gdmd_2", "gdmd_full_2"])
def test_micro_batches_equal_two_ranks(runs: Path, name: str) -> None:
    assert_equal(runs / "gdmd_micro", runs / name)


@pytest.mark.parametrize("name", MICRO)
def test_two_ranks_with_micro_batches_equal_one(runs: Path, name: str) -> None:
    assert_equal(runs / "gdmd_micro", runs / name)


@pytest.mark.parametrize("name", ["two_to_one", "one_to_two"])
def test_resume_with_another_number_of_ranks(runs: Path, name: str) -> None:
    assert_equal(runs / "gdmd", runs / name)


def test_resume_with_fewer_ranks_after_a_kill(runs: Path, tmp_path: Path) -> None:
    """Two ranks of four samples, one of them is killed: one rank of eight ends where the undisturbed run ends."""

    def work(context: DistributedContext) -> None:
        at = PromptStream.at

        def deadly(stream: PromptStream, step: int, *place: Any) -> PromptBatch:
            if (context.rank, step) == (1, STEPS - 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return at(stream, step, *place)

        PromptStream.at = deadly  # type: ignore[method-assign]  # in this process, which is a rank of its own
        run("gdmd", tmp_path / "lost", context, checkpoint_every=1)

    ended = run_ranks(work, tmp_path)
    assert [end.code for end in ended] == [4, -signal.SIGKILL], ended
    run("gdmd", tmp_path / "lost")
    assert [row["step"] for row in read_metrics(tmp_path / "lost")] == list(range(1, STEPS + 1))
    assert [one["step"] for one in read_facts(tmp_path / "lost")["resumed"]] == [STEPS - 1]
    assert_equal(runs / "gdmd", tmp_path / "lost")


@pytest.mark.parametrize("name", ["gdmd", "tilted", "nft"])
def test_logged_statistics_of_the_global_batch(runs: Path, name: str) -> None:
    local = {"speed/images_per_s", "latent/std", "latent/scored_std"}  # a std per rank, averaged
    for alone, ranks in zip(read_metrics(runs / name), read_metrics(runs / f"{name}_2"), strict=True):
        assert alone.keys() == ranks.keys() and ("gain/realized" in alone) == (name != "nft")
        for key in alone.keys() - local:
            assert ranks[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6, nan_ok=True), key


def test_indivisible_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"loop.batch_size = 9 does not divide among 2 ranks; use a multiple of 2"):
        DistributedContext(RankInfo(0, 2)).local_slice(9)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (
            dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"), "3"),
            "contradict each other",
        ),
    ],
)
def test_incomplete_environment_is_an_error(given: dict[str, str], what: str) -> None:
    assert rank_info({}) == rank_info({"RANK": "0", "WORLD_SIZE": "1"}) == RankInfo()
    with pytest.raises(ValueError, match=what):
        rank_info(given)
