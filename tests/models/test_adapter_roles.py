"""Student, fake score, teacher and old policy on one shared backbone: no role affects another."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from stock_pipelines import states
from torch import Tensor

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import PromptConfig, RunConfig
from gdmd.config.training import LoopConfig
from gdmd.diffusion.sampling import backward_simulation
from gdmd.models.compile import compile_blocks, require_compiler
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.programs.train import check_equal_calls
from gdmd.runs import checkpoint
from gdmd.training.distributed import SINGLE_PROCESS
from gdmd.training.ema import load_named
from gdmd.training.role_state import role_states
from gdmd.training.warm_start import check_model, check_roles, warm_start
from gdmd.types import Role

ROLES: tuple[Role, Role] = ("student", "fake")


@cache
def opened(folder: Path, dtype: str) -> Family:
    return open_family(tiny.config(tiny.saved(folder.parent, folder.name), dtype=dtype))


def roles_of(folders: Path, name: str = "sd3", dtype: str = "fp32", **changes: Any) -> DiffusersRoles:
    """Roles on a fresh copy of the network."""
    family = copy.copy(opened(folders / name, dtype))
    family.net = copy.deepcopy(family.net)
    family.cfg = tiny.config(folders / name, dtype=dtype, **changes)
    return DiffusersRoles(family)


def wake(roles: DiffusersRoles, role: Role, seed: int, size: float = 0.3) -> None:
    """Move a role away from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in roles.parameters(role).values():
            weights.add_(size * torch.randn(weights.shape, generator=generator))


def answers(roles: DiffusersRoles, at: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: getattr(roles, name)(*at).velocity for name in ("teacher", "student", "fake", "old")}


@pytest.mark.parametrize(("name", "full"), [("sdxl", "none"), ("sd3", "none"), ("sd3", "fake"), ("sd3", "both")])
def test_every_role_starts_as_the_teacher(folders: Path, name: str, full: str) -> None:
    roles = roles_of(folders, name, full=full)
    found = answers(roles, states(roles))
    for role in ("student", "fake", "old"):
        assert torch.allclose(found[role], found["teacher"], atol=1e-6)


@pytest.mark.parametrize("name", ["sdxl", "flux2", "z_image", "qwen_image21", "krea2"])
def test_roles_are_independent(folders: Path, name: str) -> None:
    roles = roles_of(folders, name)
    at = states(roles)
    before = answers(roles, at)
    wake(roles, "fake", 1)
    after = answers(roles, at)
    assert not torch.allclose(after["fake"], before["fake"], atol=1e-3)
    for role in ("teacher", "student", "old"):
        assert torch.equal(after[role], before[role])
    wake(roles, "student", 2)
    last = answers(roles, at)
    assert torch.equal(last["fake"], after["fake"]) and torch.equal(last["teacher"], before["teacher"])
    assert not torch.allclose(last["student"], after["student"], atol=1e-3)


def gradients(roles: DiffusersRoles, role: Role, at: Any, between: Callable[[], Any] = lambda: None) -> list[Tensor]:
    """Of the role's weights; ``between`` is called after the forward and before the backward pass."""
    loss = getattr(roles, role)(*at).x0.square().mean()
    between()
    own = list(roles.parameters(role).values())  # the text side of a last block is not used: zeros
    return list(torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "qwen_image21"])
def test_checkpointed_blocks_keep_their_role(folders: Path, name: str) -> None:
    plain, checkpointed = (roles_of(folders, name, checkpointing=on) for on in (False, True))
    for roles in (plain, checkpointed):
        wake(roles, "fake", 1)
        wake(roles, "student", 2)
    at = states(plain)
    for role, other in zip(ROLES, (checkpointed.teacher, checkpointed.student), strict=True):
        wanted = gradients(plain, role, at)
        found = gradients(checkpointed, role, at, partial(other, *at))
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(found, wanted, strict=True))
        assert any(grad.any() for grad in found)
    assert torch.equal(checkpointed.teacher(*at).x0, plain.teacher(*at).x0)  # after a backward pass, too


def test_the_checkpointing_of_a_given_network_is_switched_off(folders: Path) -> None:
    """Its recomputation would use the adapter that is active in the backward pass, not that of the forward pass."""
    plain, family = roles_of(folders, "sdxl", checkpointing=False), copy.copy(opened(folders / "sdxl", "fp32"))
    family.net = copy.deepcopy(family.net)
    family.net.enable_gradient_checkpointing()
    family.cfg = tiny.config(folders / "sdxl", checkpointing=False)
    given = DiffusersRoles(family)
    for roles in (plain, given):
        wake(roles, "fake", 1)
        wake(roles, "student", 2)
    at = states(plain)
    found = gradients(given, "student", at, partial(given.fake, *at))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, "student", at), strict=True))


def test_two_roles_in_one_loss(folders: Path) -> None:
    roles = roles_of(folders, checkpointing=True)
    for seed, role in enumerate(ROLES):
        wake(roles, role, seed)
    at = states(roles)
    loss = roles.student(*at).x0.square().mean() + roles.fake(*at).x0.square().mean() + roles.teacher(*at).x0.mean()
    wanted = [gradients(roles, role, at) for role in ROLES]
    both = [list(roles.parameters(role).values()) for role in ROLES]
    found = torch.autograd.grad(loss, both[0] + both[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted[0] + wanted[1], strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "layers"), [("sd3", 25), ("sdxl", 79)])
def test_frozen_backbone_and_separate_fp32_adapters(folders: Path, name: str, layers: int) -> None:
    roles = roles_of(folders, name, dtype="bf16")
    student, fake = (roles.parameters(role) for role in ROLES)
    assert student.keys() == fake.keys() and len(student) == 2 * layers  # sd3: the last block has no context output
    assert {weights.dtype for weights in (*student.values(), *fake.values())} == {torch.float32}
    assert not {id(weights) for weights in student.values()} & {id(weights) for weights in fake.values()}
    trained = {id(w) for w in (*student.values(), *fake.values())}
    for name, weights in roles.backbone.net.named_parameters():
        assert weights.requires_grad == (id(weights) in trained), name
        assert id(weights) in trained or weights.dtype == torch.bfloat16
    found = gradients(roles, "student", states(roles))
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found)
    assert any(grad.any() for grad in found)


def test_full_copies_leave_the_teacher_alone(folders: Path) -> None:
    roles = roles_of(folders, full="both", dtype="bf16")
    at = states(roles)
    before = answers(roles, at)
    assert {weights.dtype for weights in roles.parameters("fake").values()} == {torch.float32}
    wake(roles, "student", 1, 0.1)
    after = answers(roles, at)
    assert torch.equal(after["teacher"], before["teacher"]) and torch.equal(after["fake"], before["fake"])
    assert not torch.allclose(after["student"], before["student"], atol=1e-3)


@pytest.mark.parametrize("full", ["none", "student"])
def test_old_policy_follows_the_student(folders: Path, full: str) -> None:
    roles = roles_of(folders, full=full)
    at = states(roles)
    start = {name: weights.detach().clone() for name, weights in roles.parameters("student").items()}
    assert roles.old_state() == {}
    wake(roles, "student", 1)
    assert torch.equal(roles.old(*at).x0, roles.teacher(*at).x0)
    roles.follow(0.75)
    student, old = roles.parameters("student"), roles.old_state()
    for name, weights in old.items():
        assert torch.allclose(weights, 0.75 * start[name] + 0.25 * student[name], atol=1e-6)
    assert not torch.equal(roles.old(*at).x0, roles.teacher(*at).x0)
    again = roles_of(folders, full=full)
    again.load_old_state({name: weights.clone() for name, weights in old.items()})
    assert torch.allclose(again.old(*at).x0, roles.old(*at).x0, atol=1e-5)
    roles.follow(0.0)
    assert torch.allclose(roles.old(*at).x0, roles.student(*at).x0, atol=1e-5)


def test_old_policy_of_another_network_is_an_error(folders: Path) -> None:
    with pytest.raises(ValueError, match="1 names differ|names differ, first"):
        roles_of(folders).load_old_state({"elsewhere.lora_A.weight": torch.zeros(1)})


@pytest.mark.parametrize("full", ["none", "fake"])
def test_blended_teacher_goes_from_teacher_to_fake_score(folders: Path, full: str) -> None:
    roles = roles_of(folders, full=full)
    wake(roles, "fake", 1)
    at = states(roles)
    found = answers(roles, at)
    with torch.no_grad():
        ends = [roles.blended_teacher(share)(*at).velocity for share in (0.0, 1.0)]
        middle = roles.blended_teacher(0.5)(*at).velocity
    assert torch.allclose(ends[0], found["teacher"], atol=1e-5)
    assert torch.allclose(ends[1], found["fake"], atol=1e-5)
    assert not torch.allclose(middle, found["teacher"], atol=1e-3)
    assert torch.equal(answers(roles, at)["fake"], found["fake"])


def test_adapters_start_the_same_in_every_process(folders: Path) -> None:
    one = roles_of(folders).parameters("student")
    torch.manual_seed(99)
    other = roles_of(folders).parameters("student")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "targets", "messages"),
    [
        ("sd3", ["attn.to_q", "to_nowhere"], ["SD3Transformer2DModel: 'to_nowhere' matches no layer"]),
        ("sdxl", ["to_q", "to_kk", "out.0x"], ["'to_kk'.*did you mean 'to_k'", "'out.0x'.*did you mean 'to_out.0'"]),
        ("sd3", ["ff.net.0.projj"], ["did you mean 'ff.net.0.proj'"]),
        ("sd3", ["single_transformer_blocks.0.attn.to_q"], ["did you mean 'transformer_blocks.0.attn.to_q'"]),
        ("sd3", ["all-linear"], ["'all-linear' is a pattern"]),
        ("sd3", [".*to_q", "to_q|to_k"], [r"'\.\*to_q' is a pattern", r"'to_q\|to_k' is a pattern"]),
        ("sd3", ["attn.to_Q"], ["did you mean 'attn.to_q'"]),
        ("sdxl", ["to_out"], [r"matches .*attn1.to_out \(ModuleList\), not a linear layer; in it are to_out.0"]),
        ("sdxl", ["to_q", "norm1"], [r"'norm1' matches .*\((Group|Layer)Norm\), not a linear layer"]),
    ],
)
def test_wrong_lora_targets(folders: Path, name: str, targets: list[str], messages: list[str]) -> None:
    with pytest.raises(ValueError, match="model.lora_targets do not fit") as caught:
        roles_of(folders, name, lora_targets=tuple(targets))
    assert all(re.search(message, str(caught.value)) for message in messages), caught.value


def test_lora_targets_choose_the_layers(folders: Path) -> None:
    names = roles_of(folders, "sdxl", lora_targets=("attn1.to_q", "conv1")).parameters("student")
    assert {name.rpartition(".lora_")[0].split(".")[-1] for name in names} == {"to_q", "conv1"}
    assert not any("attn2" in name for name in names)


@pytest.mark.parametrize("name", tiny.BUILD)
def test_default_lora_targets(folders: Path, name: str) -> None:
    """All layers of the blocks but modulation and what cannot take an adapter."""
    roles = roles_of(folders, name)
    adapted = {key.rpartition(".lora_")[0] for key in roles.parameters("student")}
    blocks = re.compile(r"(down_blocks|mid_block|up_blocks|(single_)?transformer_blocks|layers)\.")
    spared = re.compile(r"norm\d?(_context)?\.linear|(img|txt)_mod|adaLN|conv_depth")
    layers = {
        key.removesuffix(".base_layer")
        for key, module in roles.backbone.net.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ".lora_" not in key and blocks.match(key)
    }
    assert {key for key in layers - adapted if not spared.search(key)} == set()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sdxl", ("to_q", "to_k", "to_v", "to_out.0")),
        ("sdxl", ("ff.net.0.proj", "conv1", "upsamplers.0.conv")),
        ("sd3", ("attn.to_q", "attn.to_add_out", "ff_context.net.2")),
        ("flux", ("attn.to_q", "proj_mlp")),
    ],
)
def test_checkpoint_with_other_adapters(folders: Path, name: str, targets: tuple[str, ...]) -> None:
    """Older versions had other default targets; the error names those that load the checkpoint."""
    saved = roles_of(folders, name, lora_targets=targets).parameters("student")
    with pytest.raises(ValueError, match="had adapters on other layers") as caught:
        load_named(roles_of(folders, name).parameters("student"), saved, "the student")
    named = re.findall(r"model.lora_targets=\[(.+)\]", str(caught.value))[0].split(",")
    load_named(roles_of(folders, name, lora_targets=tuple(named)).parameters("student"), saved, "the student")


def as_a_run(roles: DiffusersRoles, folder: Path) -> str:
    """A run folder whose newest checkpoint holds these roles."""
    cfg = {"model": roles.family.cfg.model_dump(mode="json"), "method": {"student_steps": [1.0, 0.5]}}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    checkpoint.save(folder / "checkpoints", 3, {role: roles.parameters(role) for role in ROLES}, {})
    return str(folder)


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_start_from_a_run_with_another_lora_alpha(folders: Path, tmp_path: Path, alpha: float) -> None:
    first, second = roles_of(folders, lora_alpha=4.0), roles_of(folders, lora_alpha=alpha)
    for seed, role in enumerate(ROLES):
        wake(first, role, seed)
    config = {"model": second.family.cfg.model_dump(mode="json"), "method": {"student_steps": [1.0, 0.5]}}
    run = as_a_run(first, tmp_path / "first")
    check_roles(run, second)
    told = warm_start(run, role_states(second, LoopConfig(ema=0.0)), SINGLE_PROCESS, config)
    at = states(first)
    found, wanted = answers(second, at), answers(first, at)
    assert all(torch.allclose(found[role], wanted[role], atol=1e-6) for role in ROLES)
    assert not torch.allclose(found["student"], found["teacher"], atol=1e-3)
    assert ("model.lora_alpha was 4.0 there" in told) == (alpha != 4.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"lora_rank": 4}, "model.lora_rank is 2 there and 4 here"),
        ("sd3", {"full": "student"}, "model.full is 'none' there and 'student' here"),
        ("sd3", {"lora_targets": ("attn.to_q",)}, "belongs to another network: .*model.lora_targets"),
        ("sdxl", {}, "belongs to another network: .*same family"),
    ],
)
def test_start_from_a_run_that_does_not_fit(
    folders: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    run = as_a_run(roles_of(folders), tmp_path / "first")
    roles = roles_of(folders, name, **changes)
    with pytest.raises(ValueError, match=f"loop.start_from: .*{message}"):
        check_model(run, {"model": roles.family.cfg.model_dump(mode="json")})
        check_roles(run, roles)


@pytest.fixture
def fresh_graphs() -> Iterator[Any]:
    """Counters of compiled graphs; with the eager backend, because inductor takes minutes."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    yield dynamo.counters["stats"]
    torch._dynamo.reset()


def test_compiled_and_checkpointed_blocks_equal_eager_ones(folders: Path, fresh_graphs: Any) -> None:
    """On a UNet; a transformer is compiled below."""
    plain, compiled = (roles_of(folders, "sdxl", checkpointing=on) for on in (False, True))
    compiled.compile(backend="eager")
    for roles in (plain, compiled):
        wake(roles, "fake", 1)
        wake(roles, "student", 2)
    at = states(plain)
    wanted, found = answers(plain, at), answers(compiled, at)
    assert all(torch.allclose(found[role], wanted[role], atol=1e-5) for role in wanted)
    assert not torch.allclose(found["student"], found["fake"], atol=1e-3)
    for role, other in zip(ROLES, (compiled.teacher, compiled.student), strict=True):
        step, again = gradients(plain, role, at), gradients(compiled, role, at, partial(other, *at))
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(again, step, strict=True))
    made = fresh_graphs["unique_graphs"]
    assert 0 < made <= 14
    for turn in range(2):
        answers(compiled, at)
        gradients(compiled, ROLES[turn], at)
    assert fresh_graphs["unique_graphs"] == made  # a role that comes again finds its graph


def test_all_blend_shares_use_one_graph(folders: Path, fresh_graphs: Any) -> None:
    plain, compiled = (roles_of(folders, "qwen_image") for _ in range(2))
    compiled.compile(backend="eager")
    at, made = states(plain), set[int]()
    for roles in (plain, compiled):
        wake(roles, "fake", 1)
    for share in (0.3, 0.5, 0.7):
        with torch.no_grad():
            wanted, found = (roles.blended_teacher(share)(*at).x0 for roles in (plain, compiled))
        assert torch.allclose(found, wanted, atol=1e-5)
        made.add(fresh_graphs["unique_graphs"])
    assert len(made) == 1 and made != {0}


def test_old_policy_of_compiled_copies_is_compiled(folders: Path, fresh_graphs: Any) -> None:
    roles = roles_of(folders, "qwen_image", full="student")
    roles.compile(backend="eager")
    roles.follow(0.5)
    with torch.no_grad():
        roles.old(*states(roles))
    assert fresh_graphs["unique_graphs"] > 0


def test_families_name_existing_blocks(folders: Path) -> None:
    for name in tiny.BUILD:
        family = opened(folders / name, "fp32")
        found = {type(module).__name__ for module in family.net.modules()}
        assert family.blocks and set(family.blocks) <= found


def test_compiling_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear has none of the blocks \['Block'\].*model.compile = false"):
        compile_blocks(torch.nn.Linear(2, 2), ("Block",))


def test_compiling_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C.. compiler .no-such-compiler.*model.compile = false"):
        require_compiler("cpu")


def test_forward_chunk_splits_calls_without_gradient(folders: Path) -> None:
    whole, parts = roles_of(folders, forward_chunk=0), roles_of(folders, forward_chunk=2)
    for roles in (whole, parts):
        wake(roles, "student", 3)
    x_t, t = torch.randn(5, *whole.family.latent_shape), torch.linspace(0.9, 0.3, 5)
    cond = whole.family.encoder.encode((tiny.WORDS * 2)[:5])
    calls: list[int] = []
    parts.backbone.net.register_forward_pre_hook(lambda net, given, named: calls.append(1), with_kwargs=True)
    with torch.no_grad():
        one, other = (roles.student(x_t, t, cond) for roles in (whole, parts))
    assert len(calls) == 3
    torch.testing.assert_close(other.x0, one.x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.eps, one.eps, rtol=1e-4, atol=1e-5)
    parts.student(x_t, t, cond)
    assert len(calls) == 4  # with gradient the micro-batch is the limit


def test_chunks_of_rollouts_on_ranks(folders: Path) -> None:
    """Two ranks that draw other steps per sample make another number of calls: refused for a sharded student."""
    roles, calls, found = roles_of(folders, forward_chunk=2), [], []
    roles.backbone.net.register_forward_pre_hook(lambda net, given, named: calls.append(1), with_kwargs=True)
    x_t, _, cond = states(roles, 3)
    for stop in ([1, 1, 1], [1, 0, 0]):
        steps, again = (1.0, 0.5), lambda i: x_t  # noqa: E731
        backward_simulation(roles.student, x_t, steps, torch.tensor(stop), cond, again, roles.schedule, last=1)
        found.append(len(calls))
        calls.clear()
    assert found == [2, 1]
    model, loop = tiny.config(folders / "sd3", full="both", forward_chunk=2), LoopConfig(sharding="full")
    drawn = RunConfig(name="tiny", model=model, method=DMDConfig(), loop=loop, prompts=PromptConfig(file="p.txt"))
    with pytest.raises(ValueError, match=r"forward_chunk = 2.*3 samples each.*set method.step_draw=batch"):
        check_equal_calls(drawn, 3)
    check_equal_calls(drawn, 2)
    with pytest.raises(ValueError, match="is called for each sample: .* set method.step_draw=batch$"):
        check_equal_calls(drawn, 2, row_by_row=True)
    check_equal_calls(drawn.model_copy(update={"method": DMDConfig(step_draw="batch")}), 3)
