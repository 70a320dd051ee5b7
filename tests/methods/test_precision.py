"""Under bf16 the denoisers compute in bf16, and targets, weights, losses, decoder and rewards in fp32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_roles import TEXTS, Toy, ToyCodec, apply, prompts, rng, same, tiny_roles, weights
from torch import Tensor
from toy_training import Toy as ToyRun
from toy_training import toy_config

from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmd_reward import DmdGrpoConfig, DmdNftConfig, DmdReflConfig
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.gdmd import Group
from gdmd.recipes.build import SHAPES, method_of
from gdmd.shapes.networks import ShapesVae
from gdmd.shapes.roles import LATENT_SHAPE, ShapesCodec, ShapesRoles
from gdmd.types import PromptBatch, Update

TILTED: dict[str, Any] = {"score_target": "continuation", "continuations": 2, "weighting": "softmax"}
GROUPED = {"fake_updates": 1, "images_per_prompt": 4}
CONFIGS: dict[str, Any] = {
    "dmd": DmdConfig(fake_updates=1, regression_weight=0.25, regression_steps=2),
    "dmd2": Dmd2Config(fake_updates=1),
    "dmdr_refl": DmdrConfig(fake_updates=1, cold_start=1),
    "dmdr_grpo": DmdrConfig(fake_updates=1, cold_start=1, strategy="grpo", images_per_prompt=4),
    "dmdr_dpo": DmdrConfig(fake_updates=1, cold_start=1, strategy="dpo", images_per_prompt=4),
    "refl": DmdReflConfig(fake_updates=1),
    "nft": DmdNftConfig(**GROUPED),
    "grpo": DmdGrpoConfig(**GROUPED),
    "gdmd": GdmdConfig(group_size=2, score_baseline="time"),
    "gdmd_mean": GdmdConfig(group_size=2, weighting="softmax", student_target="mean", scored_guidances=[2.0, 6.0]),
    "gdmd_tilted": GdmdConfig(group_size=2, **TILTED, student_target="mean", reward_gradient=0.2),
}


def real_latents(batch: PromptBatch, rng: SampleRng) -> Tensor:
    return 2 + rng.normal("real", LATENT_SHAPE)


def trained(name: str) -> dict[str, Tensor]:
    """Weights after two iterations of tiny networks that compute in fp32 whatever surrounds their calls."""
    cfg, roles = CONFIGS[name], tiny_roles()
    if isinstance(cfg, Dmd2Config):
        roles = ShapesRoles(roles.teacher.net, head_seed=3)
    recipe: Any = SimpleNamespace(method=cfg)
    method = method_of(recipe, roles, ToyCodec(), (Toy(unscored=(2,)), Toy("green", 1)), SHAPES, real_latents)
    for step in range(2):
        for update in method.iteration(step, prompts(TEXTS[:1] * 4), rng(step)):
            loss = update.loss(update.batch)
            with torch.autocast("cpu", enabled=False):  # the loop's backward pass has none
                apply(Update(update.role, lambda batch, loss=loss: loss, update.batch), roles)
    return weights(roles)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_arithmetic_of_a_method_follows_the_precision_around_it(name: str) -> None:
    plain = trained(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(trained(name), plain)


def test_the_mean_of_a_group_is_that_of_float64() -> None:
    targets, share = torch.randn(3, 4, 5, 2, 8, 8), torch.rand(3, 5, 4)  # [E, B, G, C, H, W], [E, G, B]
    wanted = torch.einsum("ebgchw,egb->bchw", targets.double(), share.double())
    wanted = wanted / share.double().sum((0, 1))[:, None, None, None]
    group = Group(list(targets))
    with torch.autocast("cpu", torch.bfloat16):
        group.average(share)
    for found in group.x_tar:
        torch.testing.assert_close(found[:, 0].double(), wanted, rtol=0, atol=1e-5)  # 15 terms of size 4: 4e-6


def test_a_run_in_bf16_enters_no_autocast_but_that_of_its_networks(tmp_path: Path) -> None:
    inside: list[bool] = []

    def look(step: int, role: str, per_sample: Tensor) -> Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return per_sample

    own = ToyRun(tmp_path / "run", toy_config(1, precision="bf16"), poison=look)
    own.roles.teacher.register_forward_hook(lambda *given: inside.append(torch.is_autocast_enabled("cpu")))
    own.train()
    assert len(inside) == 5 and not any(inside)


def test_networks_of_a_bf16_run_compute_in_bf16_and_answer_in_fp32() -> None:
    roles, seen = ShapesRoles(tiny_roles().teacher.net, bf16=True), []
    for name in ("student", "fake", "teacher", "old"):
        getattr(roles, name).net.register_forward_hook(lambda net, given, answer: seen.append(answer.dtype))
        answer = getattr(roles, name)(real_latents(prompts(), rng()), torch.full((4,), 0.5), prompts().cond)
        assert answer.x0.dtype == answer.eps.dtype == torch.float32
    assert seen == [torch.bfloat16] * 4


def test_a_network_never_serves_the_cast_weights_of_before_an_update() -> None:
    roles = ShapesRoles(tiny_roles().teacher.net, bf16=True)
    x_t, t = real_latents(prompts(), rng()), torch.full((4,), 0.5)
    with torch.no_grad():
        for parameter in roles.parameters("student").values():
            roles.student(x_t, t, prompts().cond)
            parameter.zero_()
        assert not roles.student(x_t, t, prompts().cond).velocity.any()


def test_the_decoder_computes_in_fp32_whatever_surrounds_it() -> None:
    torch.manual_seed(0)
    codec, latents = ShapesCodec(ShapesVae(16)), torch.randn(2, 8, 8, 8)
    plain = codec.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.decode(latents), plain)
