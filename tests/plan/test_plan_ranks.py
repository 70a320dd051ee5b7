"""`gdmd plan`'s bytes between GPUs against what two ranks, and two machines of two, hand to collectives as they train."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmd_reward import DmdNftConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.plan.cost_model import Sent, gpu_of
from gdmd.plan.estimate import Plan, plan
from gdmd.programs.latents import compute_latents
from gdmd.recipes.build import Components, build
from gdmd.training.distributed import DistributedContext, Sharding
from gdmd.training.role_state import RoleState, role_states
from gdmd.types import PromptBatch

DMD = DmdConfig(fake_updates=2, guidance=3.0, student_steps=(1.0,))  # one step: no iteration has more calls
NFT = DmdNftConfig(fake_updates=1, images_per_prompt=4, guidance=3.0, student_steps=(1.0,))  # has an old policy
GAN = Dmd2Config(fake_updates=2, guidance=3.0, student_steps=(1.0,))  # its head reads the fake's features
KINDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "adapters": (DMD, {}, 0),
    "adapters in micro-batches": (DMD, {}, 1),
    "copies": (DMD, {"full": "both", "checkpointing": True}, 0),
    "copies in micro-batches": (DMD, {"full": "both", "checkpointing": False}, 1),
    "copies in parts": (DMD, {"full": "both", "forward_chunk": 1}, 0),
    "a copied student": (DMD, {"full": "student"}, 0),
    "copies and their old policy": (NFT, {"full": "both"}, 0),
    "adapters and a GAN": (GAN, {}, 0),
    "copies and a GAN": (GAN, {"full": "both"}, 0),
    "copies and a GAN in micro-batches": (GAN, {"full": "both"}, 1),
}
"""The method, what is trained, and the micro-batch of a rank."""
JUDGED = ["copies and a GAN", "copies and a GAN in micro-batches"]
COPIES = [kind for kind in KINDS if not kind.startswith("adapters")]
WHOLE = ["adapters", "adapters in micro-batches", "adapters and a GAN", "copies"]
BATCH = 4
NODE = 2
"""Ranks of a machine, where there are two of them."""


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    return images[:, 0].mean((1, 2))


def recipe(root: Path, kind: str) -> RunConfig:
    method, model, micro = KINDS[kind]
    rewards = [{"kind": "callable", "target": "test_plan_ranks:brightness"}] if method is NFT else []
    return RunConfig(
        name="tiny",
        model=tiny.config(root / "sd3", embeddings=str(root / "embeddings"), **model),
        method=method,
        loop=LoopConfig(steps=2, batch_size=BATCH, micro_batch=micro, sharding="full", threads=1),
        prompts={"file": str(root / "prompts.txt")},
        real_data={"source": str(root / "images"), "latents": str(root / "latents")} if method is GAN else None,
        rewards=rewards,
    )


def draw_images(root: Path) -> None:
    """A picture of each prompt, and its latents, for the GAN."""
    (root / "images").mkdir()
    for i, text in enumerate(tiny.WORDS):
        Image.effect_noise((tiny.SIZE, tiny.SIZE), 90 + i).convert("RGB").save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(text)
    compute_latents(recipe(root, "adapters and a GAN"), Console(quiet=True))


@functools.cache
def planned(root: Path, kind: str) -> Plan:
    return plan(recipe(root, kind), gpu_of("h100"), 0.4)


class Wire(TorchDispatchMode):
    """Bytes that this rank sends in rings, and messages, by whether the group lies inside a machine of NODE ranks."""

    SENT = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}
    """Times that (n - 1) / n of the whole is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        if operation.namespace == "c10d" and (name := operation._opname) in self.SENT:
            self._note(self.SENT[name], given)
        return operation(*given, **(named or {}))

    def _note(self, times: int, given: tuple[Any, ...]) -> None:
        leaves = torch.utils._pytree.tree_leaves(given)
        tensors = [one for one in leaves if isinstance(one, Tensor) and one.is_floating_point()]
        boxed = next(one for one in leaves if "ProcessGroup" in str(type(one)) or isinstance(one, torch.ScriptObject))
        ranks = torch.distributed.get_process_group_ranks(torch.distributed.ProcessGroup.unbox(boxed))
        if not tensors:
            return
        where = "among" if len({rank // NODE for rank in ranks}) == 1 else "across"
        self.bytes[where] += times * (len(ranks) - 1) * max(one.nbytes for one in tensors) // len(ranks)
        self.messages[where] += 1


def one_iteration(components: Components, states: dict[Any, RoleState], context: DistributedContext, step: int) -> Wire:
    prompts = components.stream.at(step, *context.local_slice(BATCH))
    with Wire() as wire:
        for update in components.method.iteration(step, prompts, SampleRng(0, step, prompts.index)):
            states[update.role].apply(update)
            wire.bytes["among" if context.size == NODE else "across"] -= flags(states[update.role], context.size)
    return wire


def flags(state: RoleState, size: int) -> int:
    """Bytes of one number per replicated tensor, which says whether a rank has a gradient of it."""
    replicas = [one for one in state.parameters.values() if not hasattr(one, "to_local")]
    return 2 * (size - 1) * 4 * len(replicas) // size


def to_device_async(cfg: RunConfig, context: DistributedContext, how: Sharding) -> dict[str, Any]:
    """By this rank in an iteration, the second of NFT, when its old policy is there; and the bytes of weights it holds."""
    components = build(cfg)
    if how != "none":
        components.roles.shard(lambda module: context.shard(module, how))
    states = role_states(components.roles, cfg.loop, context)
    steps = range(2 if isinstance(cfg.method, DmdNftConfig) else 1)
    wire = [one_iteration(components, states, context, step) for step in steps][-1]
    whole = [own for state in states.values() for named in state.tensors().values() for own in named.values()]
    own = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in whole]
    return {"bytes": wire.bytes, "messages": wire.messages, "held": sum(tensor.nbytes for tensor in own)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rank 0 of two sent, of every kind, whole and cut; and of four with shards inside two machines."""
    root = tmp_path_factory.mktemp("traffic")
    tiny.save("sd3", root / "sd3")
    (root / "prompts.txt").write_text("\n".join(tiny.WORDS))
    draw_images(root)
    components = build(recipe(root, "adapters"))
    components.encoder.prepare([text for group in components.stream.groups for text in group])

    def work(context: DistributedContext, asked: list[tuple[str, Sharding]]) -> None:
        found = {f"{kind}, {how}": to_device_async(recipe(root, kind), context, how) for kind, how in asked}
        if context.is_main:
            (root / f"sent_{context.size}.json").write_text(json.dumps(found))

    whole, cut = [(kind, "none") for kind in WHOLE], ["adapters", *COPIES]
    two = [*whole, *((kind, "full") for kind in cut)]
    four = [(kind, "hybrid") for kind in ("copies in micro-batches", "a copied student")]
    for size, asked in ((2, two), (4, four)):
        ended = run_ranks(lambda context, asked=asked: work(context, asked), root, size, local_size=NODE)
        assert [end.code for end in ended] == [0] * size, ended
    return root


def measured(root: Path, size: int, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"sent_{size}.json").read_text())[key]
    return found


@pytest.mark.parametrize("kind", WHOLE)
def test_two_ranks_send_the_gradients_that_the_plan_names(root: Path, kind: str) -> None:
    _, row = planned(root, kind).scaling([1, 2])
    assert measured(root, 2, f"{kind}, none")["bytes"]["among"] == pytest.approx(1e9 * row.ddp_traffic)


def test_sharding_cuts_no_adapter_and_sends_what_replicas_send(root: Path) -> None:
    whole, cut = (measured(root, 2, f"adapters, {how}") for how in ("none", "full"))
    _, row = planned(root, "adapters").scaling([1, 2])
    assert cut == whole and row.fsdp_traffic == row.ddp_traffic and row.fsdp_gib == row.ddp_gib


@pytest.mark.parametrize("kind", JUDGED)
def test_the_calls_of_a_gan_that_stop_early_are_planned_as_whole_ones(root: Path, kind: str) -> None:
    """The head reads the fake's middle blocks, and what lies behind them is not gathered: the plan is an upper bound."""
    said, found = planned(root, kind), measured(root, 2, f"{kind}, full")
    _, row = said.scaling([1, 2])
    assert 0.9 * 1e9 * row.fsdp_traffic < found["bytes"]["among"] <= 1e9 * row.fsdp_traffic
    messages = all_of(said, 2, 2, 1).among_messages
    assert 0.9 * messages < found["messages"]["among"] < 1.3 * messages  # 131 for 106 in micro-batches


@pytest.mark.parametrize("kind", [kind for kind in COPIES if kind not in JUDGED])
def test_two_ranks_gather_and_scatter_the_copies_as_the_plan_says(root: Path, kind: str) -> None:
    said, found = planned(root, kind), measured(root, 2, f"{kind}, full")
    _, row = said.scaling([1, 2])
    assert found["bytes"]["among"] == pytest.approx(1e9 * row.fsdp_traffic)
    assert found["messages"]["among"] == all_of(said, 2, 2, 1).among_messages


@pytest.mark.parametrize("kind", ["copies in micro-batches", "a copied student"])
def test_machines_of_two_send_inside_and_between_them_what_the_plan_says_of_hybrid(root: Path, kind: str) -> None:
    found = measured(root, 4, f"{kind}, hybrid")
    seen = [found[what][where] for what in ("bytes", "messages") for where in ("among", "across")]
    assert seen == pytest.approx(astuple(all_of(planned(root, kind), 4, 2, 2)))


@pytest.mark.parametrize("kind", COPIES)
def test_a_rank_holds_the_part_of_weights_and_moments_that_the_plan_says(root: Path, kind: str) -> None:
    """But for one number of Adam per tensor."""
    said, found = planned(root, kind), measured(root, 2, f"{kind}, full")
    held = sum(said.parts.static[what] for what in ("student", "fake", "optimizer", "EMA"))
    old = said.parts.static["old policy"]
    assert found["held"] == pytest.approx(held - (said.sharding.cut - old) / 2, rel=0.01)


def all_of(said: Plan, gpus: int, inside: int, nodes: int) -> Sent:
    return Sent.of_all([role.sharded(said.sharding, BATCH // gpus, inside, nodes) for role in said.roles])
