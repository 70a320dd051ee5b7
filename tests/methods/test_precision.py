"""Under bf16 the denoisers compute in bf16, and targets, weights, losses, decoder and rewards in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_roles import prompts, real_latents, rng, tiny_roles
from torch import Tensor
from toy_training import Toy as ToyRun
from toy_training import toy_config

from gdmd.shapes.networks import ShapesVae
from gdmd.shapes.roles import ShapesCodec, ShapesRoles


def test_a_bf16_run_computes_its_losses_outside_autocast(tmp_path: Path) -> None:
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


def test_no_stale_autocast_weights() -> None:
    """A network never uses bf16 casts of weights from before an update."""
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
