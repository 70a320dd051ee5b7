"""`gdmd plan`'s bytes between GPUs against what two ranks hand to collectives while they train the same recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "invariants"))
from rank_world import run_ranks  # noqa: E402

from gdmd.config.loop import LoopConfig  # noqa: E402
from gdmd.config.method import DmdConfig  # noqa: E402
from gdmd.config.run import RunConfig  # noqa: E402
from gdmd.diffusion.rng import SampleRng  # noqa: E402
from gdmd.evaluation.cost_model import gpu_of  # noqa: E402
from gdmd.programs.plan import plan  # noqa: E402
from gdmd.recipes.build import build  # noqa: E402
from gdmd.training.distributed import World  # noqa: E402
from gdmd.training.state import role_states  # noqa: E402

STEPS = 2
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "adapters": ({}, 0),
    "adapters in micro-batches": ({}, 1),
    "copies": ({"full": "both"}, 0),
}
"""What is trained, and the micro-batch of a rank."""


def recipe(root: Path, kind: str) -> RunConfig:
    """One student step, so that no iteration has more calls than another."""
    model, micro = KINDS[kind]
    loop = LoopConfig(steps=STEPS, batch_size=4, micro_batch=micro, sharding="full", threads=1)
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "sd3", embeddings=str(root / "embeddings"), **model),
        method=DmdConfig(fake_updates=2, guidance=3.0, student_steps=(1.0,)),
        loop=loop,
        prompts={"file": str(root / "prompts.txt")},
    )


def bytes_sent(cfg: RunConfig, world: World, *, cut: bool) -> float:
    """Per iteration, by this rank: in a ring of two it sends once the bytes of what is averaged."""
    lab, sums, own = build(cfg), [0], torch.distributed.all_reduce
    if cut:
        lab.roles.shard(lambda module: world.shard(module, "full"))
    states = role_states(lab.roles, cfg.loop, world)

    def counted(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sums[0] += tensor.nbytes if tensor.is_floating_point() else 0
        return own(tensor, *rest, **named)

    torch.distributed.all_reduce = counted
    for step in range(STEPS):
        prompts = lab.stream.at(step, *world.span(cfg.loop.batch_size))
        for update in lab.method.iteration(step, prompts, SampleRng(0, step, prompts.index)):
            states[update.role].apply(update)
    torch.distributed.all_reduce = own
    return sums[0] / STEPS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind, whole and cut, by one pair of ranks; what rank 0 sent is in a file."""
    root = tmp_path_factory.mktemp("traffic")
    tiny.save("sd3", root / "sd3")
    (root / "prompts.txt").write_text("\n".join(tiny.WORDS))
    lab = build(recipe(root, "adapters"))
    lab.encoder.prepare([text for group in lab.stream.groups for text in group])

    def work(world: World) -> None:
        found = {kind: [bytes_sent(recipe(root, kind), world, cut=False)] for kind in KINDS}
        found["adapters"].append(bytes_sent(recipe(root, "adapters"), world, cut=True))
        if world.first:
            (root / "sent.json").write_text(json.dumps(found))

    ended = run_ranks(work, root, seconds=30)
    assert [end.code for end in ended] == [0, 0], ended
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_send_the_gradients_that_the_plan_names(root: Path, kind: str) -> None:
    """Within 2 %: the samples' losses travel, too, and are not in the plan."""
    sent = json.loads((root / "sent.json").read_text())[kind]
    _, row = plan(recipe(root, kind), gpu_of("h100"), 0.4).scaling([1, 2])
    assert sent[0] == pytest.approx(1e9 * row.ddp_traffic, rel=0.02)


def test_sharding_cuts_no_adapter_and_sends_what_replicas_send(root: Path) -> None:
    whole, cut = json.loads((root / "sent.json").read_text())["adapters"]
    _, row = plan(recipe(root, "adapters"), gpu_of("h100"), 0.4).scaling([1, 2])
    assert cut == whole and row.fsdp_traffic == row.ddp_traffic
