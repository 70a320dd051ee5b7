"""DMD2's GAN head on the features of every family: what it reads, and which weights each loss trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from stock_pipelines import states
from torch import Tensor

from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.training import LoopConfig
from gdmd.data.prompts import PromptStream
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.dmd2 import Dmd2
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run
from gdmd.training.loop import train
from gdmd.types import PromptBatch, Role, Update

LAST: dict[str, Callable[[Any], Any]] = {
    "sd15": lambda net: net.mid_block,
    "sdxl": lambda net: net.mid_block,
    "sd3": lambda net: net.transformer_blocks[-1],
    "flux": lambda net: net.single_transformer_blocks[-1],
    "flux2": lambda net: net.single_transformer_blocks[-1],
    "flux2_klein": lambda net: net.single_transformer_blocks[-1],
    "z_image": lambda net: net.layers[-1],
    "qwen_image": lambda net: net.transformer_blocks[-1],
    "sana": lambda net: net.transformer_blocks[-1],
    "qwen_image21": lambda net: net.transformer_blocks[-1],
    "krea2": lambda net: net.transformer_blocks[-1],
}
"""The module after which a family is read, independent of the families' own code."""
EACH = [(name, "none") for name in LAST]


@cache
def opened(folder: Path, size: tuple[int, int]) -> Family:
    return open_family(tiny.config(tiny.saved(folder.parent, folder.name), height=size[0], width=size[1]))


def roles_of(
    folders: Path, name: str, size: tuple[int, int] = (32, 32), head: int | None = 3, **changes: Any
) -> DiffusersRoles:
    """Roles on a fresh copy of the network, student and fake moved away from the teacher."""
    family = copy.copy(opened(folders / name, size))
    family.net = copy.deepcopy(family.net)
    family.cfg = tiny.config(folders / name, height=size[0], width=size[1], **changes)
    roles = DiffusersRoles(family, head_seed=head)
    for role in ("student", "fake"):
        wake(roles, role, 1)  # type: ignore[arg-type]
    return roles


def wake(roles: DiffusersRoles, role: Role, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + (role == "fake"))
    with torch.no_grad():
        for key, weights in roles.parameters(role).items():
            if not key.startswith("gan_head."):
                weights.add_(0.1 * torch.randn(weights.shape, generator=generator))


def real_latents(shape: tuple[int, int, int]) -> Callable[[PromptBatch, SampleRng], Tensor]:
    return lambda prompts, rng: 2 + rng.normal("real", shape)


def dmd2(roles: DiffusersRoles, **options: Any) -> Dmd2:
    cfg = DMD2Config(**{"fake_updates": 1, "head_weight": 1.0, "gan_weight": 1.0, "guidance": 3.0} | options)
    shape = roles.family.latent_shape
    return Dmd2(cfg, roles, shape, roles.family.native, real_latents(shape), critic=roles.critic)


def updates(roles: DiffusersRoles, **options: Any) -> Iterator[Update]:
    """Those of one iteration, not applied."""
    stream = PromptStream([list(tiny.WORDS[:2])], roles.family.encoder, 2, 0, 1)
    prompts = stream.at(0)
    yield from dmd2(roles, **options).iteration(0, prompts, SampleRng(0, 0, prompts.index))


def gradients(roles: DiffusersRoles, **options: Any) -> dict[str, dict[str, Tensor]]:
    """Of every weight that got one, after the fake's and after the student's loss, by "learner/whose weight"."""
    found: dict[str, dict[str, Tensor]] = {}
    for update in updates(roles, **options):
        update.loss(update.batch).per_sample.mean().backward()
        for role in ("student", "fake"):
            own = roles.parameters(role)  # type: ignore[arg-type]
            found[f"{update.role}/{role}"] = {k: w.grad for k, w in own.items() if w.grad is not None}
            for weights in own.values():
                weights.grad = None
        assert not any(weights.grad is not None for net in roles.modules() for weights in net.parameters())
    return found


def from_block(roles: DiffusersRoles, net: Any, at: tuple[Tensor, Tensor, Any]) -> Tensor:
    """What an ordinary call computes in LAST, as tokens [B, N, D] of the image."""
    seen: list[Any] = []
    handle = LAST[roles.family.name](net).register_forward_hook(lambda block, given, answer: seen.append(answer))
    with torch.no_grad():
        roles.fake(*at)
    handle.remove()
    hidden = (
        seen[0] if len(seen) == 1 else torch.cat([one[:, -_tokens(roles) :] for one in seen])
    )  # or a call per sample
    hidden = hidden[-1] if isinstance(hidden, tuple) else hidden  # of two streams the image's is the second
    if hidden.ndim == 4:
        return torch.stack([hidden[:, :, i, j] for i in range(hidden.shape[2]) for j in range(hidden.shape[3])], 1)
    count = _tokens(roles)
    return hidden[:, -count:] if roles.family.name.startswith(("flux2", "krea2", "qwen_image21")) else hidden[:, :count]


def _tokens(roles: DiffusersRoles) -> int:
    _, height, width = roles.family.latent_shape
    return height * width // roles.family.patch**2


@pytest.mark.parametrize(("name", "full"), [*EACH, ("sd3", "both")])
def test_features_are_the_last_blocks_output(folders: Path, name: str, full: str) -> None:
    size, token = ((32, 64), 16) if name == "qwen_image21" else ((32, 48), 4)
    roles = roles_of(folders, name, size, full=full)
    at = states(roles)
    net = roles.fake.net.ready()
    found = roles.fake.features(*at)
    rows, columns = roles.fake.feature_grid(at[0])
    assert (rows, columns) == (size[0] // token, size[1] // token)
    assert found.shape == (2, rows * columns, roles.family.feature_width) and found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), from_block(roles, net, at))


@pytest.mark.parametrize("name", ["sdxl", "z_image"])
def test_features_do_not_depend_on_the_batch(folders: Path, name: str) -> None:
    """36 tokens, which Z-Image fills up to 64, in front of captions of their own lengths."""
    roles = roles_of(folders, name, (24, 24))
    x_t, t, cond = states(roles, 3)
    with torch.no_grad():
        together = roles.fake.features(x_t, t, cond)
        for i in range(3):
            alone = roles.fake.features(x_t[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "full"), [("sdxl", "none"), ("sd3", "both"), ("z_image", "student")])
def test_each_loss_trains_its_role_only(folders: Path, name: str, full: str) -> None:
    plain, checkpointed = (gradients(roles_of(folders, name, full=full, checkpointing=on)) for on in (False, True))
    assert plain["fake/student"] == plain["student/fake"] == {}
    heads = {key for key in plain["fake/fake"] if key.startswith("gan_head.")}
    assert heads == {f"gan_head.{key}" for key in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")} | {
        "gan_head.logit.weight",
        "gan_head.logit.bias",
    }
    assert all(plain["fake/fake"][key].any() for key in heads)
    assert plain.keys() == checkpointed.keys()
    for learner in plain:
        assert plain[learner].keys() == checkpointed[learner].keys()
        for key, grad in plain[learner].items():
            torch.testing.assert_close(checkpointed[learner][key], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_gan_gradient_reaches_fake_and_student(folders: Path, name: str) -> None:
    roles = roles_of(folders, name)
    whole, small = gradients(roles), gradients(roles, head_weight=1e-9, gan_weight=1e-9)
    for learner in ("fake/fake", "student/student"):
        own = [key for key in whole[learner] if not key.startswith("gan_head.")]
        moved = [key for key in own if not torch.allclose(whole[learner][key], small[learner][key], rtol=1e-4)]
        assert len(moved) > len(own) / 4, learner  # of a UNet the GAN trains the first half only


@pytest.mark.parametrize("name", ["sdxl", "z_image"])
def test_head_reads_the_fake_score_and_changes_no_role(folders: Path, name: str) -> None:
    roles = roles_of(folders, name, checkpointing=True)
    assert roles.critic is not None
    at, every = states(roles), ("teacher", "student", "fake", "old")
    net: Any = roles.backbone.net
    modules, hooks = list(net.state_dict()), [len(own._forward_hooks) for own in net.modules()]
    with torch.no_grad():
        before = {role: getattr(roles, role)(*at).x0 for role in every}
        first = roles.critic(*at)
    roles.critic(*at).sum().backward()
    with torch.no_grad():
        assert all(torch.equal(getattr(roles, role)(*at).x0, before[role]) for role in every)
        wake(roles, "student", 7)
        assert torch.equal(roles.critic(*at), first)
        wake(roles, "fake", 7)
        assert not torch.allclose(roles.critic(*at), first, atol=1e-4)
    assert list(net.state_dict()) == modules and [len(own._forward_hooks) for own in net.modules()] == hooks
    assert not any(own._forward_pre_hooks for own in net.modules())


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_failed_feature_call_restores_the_network(folders: Path, name: str) -> None:
    roles = roles_of(folders, name)
    x_t, t, cond = states(roles)
    before = list(roles.backbone.net.state_dict())
    with pytest.raises(RuntimeError):
        roles.fake.features(x_t, t, cond | {"embeds": cond["embeds"][..., :3]})
    assert list(roles.backbone.net.state_dict()) == before and not roles.fake.in_feature_mode
    assert roles.fake(x_t, t, cond).x0.shape == x_t.shape


def test_head_is_optional_fp32_and_seeded(folders: Path) -> None:
    without, one, same, other = (roles_of(folders, "sd3", head=seed, dtype="bf16") for seed in (None, 3, 3, 4))
    assert without.critic is None and not any("gan_head" in key for key in without.parameters("fake"))
    heads = [{k: v for k, v in r.parameters("fake").items() if "gan_head" in k} for r in (one, same, other)]
    assert len(heads[0]) == 6 and all(weights.dtype == torch.float32 for weights in heads[0].values())
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert not torch.equal(heads[0]["gan_head.conv.weight"], heads[2]["gan_head.conv.weight"])
    assert not any("gan_head" in key for key in one.parameters("student"))
    assert one.critic is not None and one.critic(*states(one)).dtype == torch.float32


LOOP: dict[str, Any] = {"batch_size": 2, "lr_student": 1e-2, "lr_fake": 1e-2, "threads": 1, "ema": 0.9}


def distilled(folders: Path, name: str, run: Path, steps: int, **changes: Any) -> DiffusersRoles:
    """Train to ``steps``, continuing where the folder's run stopped."""
    roles = roles_of(folders, name, checkpointing=True, **changes)
    stream = PromptStream([list(tiny.WORDS)], roles.family.encoder, 2, 0, 1)
    loop = LoopConfig(steps=steps, checkpoint_every=1, log_every=1, **LOOP)
    folder = open_run(run) if run.exists() else create(run, {})
    train(dmd2(roles), roles, stream, loop, folder)
    return roles


@pytest.mark.parametrize(("name", "full"), [("sd3", "fake")])
def test_head_is_saved_and_resumed_with_the_fake_score(folders: Path, tmp_path: Path, name: str, full: str) -> None:
    fresh = roles_of(folders, name, full=full).parameters("fake")
    whole = distilled(folders, name, tmp_path / "whole", 2, full=full)
    distilled(folders, name, tmp_path / "halves", 1, full=full)
    halves = distilled(folders, name, tmp_path / "halves", 2, full=full)
    for role in ("student", "fake"):
        wanted, found = (roles.parameters(role) for roles in (whole, halves))  # type: ignore[arg-type]
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    heads = [key for key in fresh if key.startswith("gan_head.")]
    assert heads and all(not torch.equal(fresh[key], whole.parameters("fake")[key]) for key in heads)
    saved = checkpoint.load_newest(tmp_path / "whole" / "checkpoints")
    assert saved is not None
    parts = {part for part, named in saved.tensors.items() if any("gan_head." in key for key in named)}
    assert parts == {"fake", "optim_fake"}
