"""Offloaded weights give the same outputs, gradients and students, and are absent from the device between uses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from hidden_weights import hide
from torch import Tensor, nn

from gdmd.diffusion.offload import Offloaded, offload_parts
from gdmd.models import vae
from gdmd.models.loading import open_family
from gdmd.models.roles import DiffusersRoles


def roles_of(folders: Path, name: str, head: int | None = None, **model: Any) -> DiffusersRoles:
    roles = DiffusersRoles(open_family(tiny.config(tiny.saved(folders, name), **model)), head_seed=head)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in ("student", "fake"):
            for weights in roles.parameters(role).values():
                weights.add_(0.1 * torch.randn(weights.shape, generator=generator))
    return roles


def answers(roles: DiffusersRoles) -> dict[str, Tensor]:
    """Embeddings, predictions of all roles, images, and gradients of adapters and latents."""
    family = roles.family
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    t, cond = torch.tensor([0.9, 0.3]), family.encoder.encode(tiny.WORDS[:2])
    found = dict(cond) | {f"null.{name}": value for name, value in family.encoder.null(2).items()}
    with torch.no_grad():
        found |= {role: getattr(roles, role)(noise, t, cond).x0 for role in ("teacher", "student", "fake")}
    images = family.codec.decode(roles.student(noise, t, cond).x0)
    loss = images.square().mean() + roles.fake(noise, t, cond).eps.square().mean()
    loss = loss if roles.critic is None else loss + roles.critic(noise, t, cond).sum()
    torch.autograd.backward(loss)
    for role in ("student", "fake"):
        own = roles.parameters(role)
        found |= {f"{role}.{name}": weights.grad for name, weights in own.items() if weights.grad is not None}
    return found | {"images": images.detach(), "latents": family.codec.encode(images.detach().clamp(0, 1))}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("name", "model"),
    [("sdxl", {"decode_tiled": True}), *((name, {}) for name in ("sd3", "flux2_klein", "z_image", "qwen_image"))],
)
def test_outputs_and_gradients_are_the_same(
    folders: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: dict[str, Any], checkpointing: bool
) -> None:
    monkeypatch.setattr(vae, "TILE", 16)  # smaller than the image
    wanted = answers(roles_of(folders, name, head=3, checkpointing=checkpointing, **model))
    copied = hide(monkeypatch)
    roles = roles_of(folders, name, head=3, checkpointing=checkpointing, offload="base", **model)
    found = answers(roles)
    assert wanted.keys() == found.keys() and {k for k in wanted if ".lora_" in k}
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    assert set(roles.family.blocks) & set(copied) and any("Text" in kind or "Qwen" in kind for kind in copied)
    frozen = [w for block in blocks(roles) for n, w in block.named_parameters() if ".lora_" not in n]
    assert frozen and all(weights.isnan().all() for weights in frozen), (
        "put back, also by a recomputation that stops early"
    )
    assert all(w.isfinite().all() for role in ("student", "fake") for w in roles.parameters(role).values())


def blocks(roles: DiffusersRoles) -> list[nn.Module]:
    return [module for module in roles.family.net.modules() if type(module).__name__ in roles.family.blocks]


def test_idle_offloads_encoders_and_decoder_only(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(roles_of(folders, "sdxl"))
    copied = hide(monkeypatch)
    roles = roles_of(folders, "sdxl", offload="idle")
    found = answers(roles)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert {"CLIPTextModel", "CLIPTextModelWithProjection"} < set(copied) and not set(copied) & set(roles.family.blocks)


def test_int8_base_is_offloaded(folders: Path) -> None:
    """Its weights are tensor subclasses, which are replaced as a whole."""
    pytest.importorskip("torchao")
    wanted, found = (answers(roles_of(folders, "sd3", quantization="int8", offload=o)) for o in ("none", "base"))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_an_error_in_a_call_puts_the_weights_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = net[1].weight
    offload_parts(net, [net[1]], "cpu")
    with pytest.raises(RuntimeError):
        net[1](torch.zeros(1, 3))
    assert net[1].weight is before and net[0].weight is not None


def test_a_copy_of_a_network_offloads_its_own_weights() -> None:
    """Such as the pipeline of a trainer."""
    net, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    offload_parts(net, [net[1]], "cpu")
    before, other = net(x), copy.deepcopy(net)
    other[1].weight.data.zero_()
    assert torch.equal(other(x)[0], other[1].bias) and torch.equal(net(x), before)


def test_tied_weights_are_copied_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    host, own = net[0].weight, Offloaded(net, "cpu")
    with own:
        assert net[0].weight is net[1].weight is not host
    assert net[0].weight is net[1].weight is host


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"full": "student"}, "full = student"),
        ({"quantization": "nf4"}, "quantization = nf4"),
        ({"compile": True}, "compile"),
    ],
)
def test_what_cannot_be_offloaded(folders: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"offload = base cannot be used with {what} .*; set model.full=none"):
        tiny.config(folders, offload="base", **changes)
