"""docs/real-models.md: its commands are accepted as they stand, and its two examples do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.main import get_command

from gdmd.cli.app import app
from gdmd.config.image_source import read_source
from gdmd.config.run import RunConfig
from gdmd.recipes.read import read_recipe, recipe_names
from gdmd.rewards.callable import CallableReward
from gdmd.types import Cond, PromptBatch

GUIDE = (Path(__file__).parents[2] / "docs" / "real-models.md").read_text(encoding="utf-8")
OF_RECIPES = ("train", "plan", "latents", "profile")


def commands() -> list[str]:
    """The indented lines that begin with gdmd, and those within a sentence; what stands for more (...) is left out."""
    lines = re.findall(r"^    (gdmd (?:[^\n]|(?<=\\)\n)*)", GUIDE, re.M)
    text = re.sub(r"```.*?```|^    [^\n]*$", "", GUIDE, flags=re.S | re.M).replace("\n", " ")
    inline = [words for words in re.findall(r"`([^`]+)`", text) if _is_command(words)]
    asked = [words if words.startswith("gdmd ") else f"gdmd train {words}" for words in inline]
    return [*lines, *asked]


def _is_command(words: str) -> bool:
    first, *rest = words.split()
    return bool(rest) and (first == "gdmd" or first in recipe_names())


def code(beginning: str) -> str:
    """The Python example with this line in it."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.S) if beginning in block]
    return str(found)


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_guide_is_accepted(line: str) -> None:
    words = [word for word in shlex.split(line.replace("\\\n", " "), comments=True)[1:] if "..." not in word]
    command: Any = get_command(app)
    name = ""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    if not words:
        return
    given = command.make_context(name, list(words)).params
    if name in OF_RECIPES:
        recipe, *overrides = given.get("words") or [given["recipe"], *given["overrides"]]
        assert isinstance(read_recipe(recipe, overrides), RunConfig)
    for source in given["what"] if name == "compare" else []:
        assert read_source(source).name in ("ours", "teacher", "lcm")


def test_the_tutorials_commands_are_among_them() -> None:
    found = {shlex.split(line, comments=True)[1] for line in commands() if "sdxl_dmd" in line}
    assert {"plan", "recipes", "train", "sample", "export", "latents"} <= found


def test_the_reward_of_the_guide_prefers_warm_images() -> None:
    own: dict[str, Any] = {}
    exec(code("def warm"), own)
    warm = torch.zeros(1, 3, 4, 4)
    warm[:, 0] = 1
    prompts = PromptBatch(torch.arange(2), ("", ""), torch.arange(2), {}, {})
    scores = CallableReward(own["warm"], "warm").score(torch.cat([warm, warm.flip(1)]), prompts)
    assert scores.tolist() == [1, -1]


class Net(nn.Module):
    """Velocity from channels seen as tokens and a caption's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        tokens = x_t.permute(0, 2, 3, 1)
        seen = self.to_q(tokens) * torch.sigmoid(self.to_k(tokens)) + self.to_v(embeds.mean(1))[:, None, None]
        return (seen * (1 + t / 1000).reshape(-1, 1, 1, 1)).permute(0, 3, 1, 2)


def test_the_family_of_the_guide_takes_adapters_and_samples() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines as tiny
    from diffusers import FlowMatchEulerDiscreteScheduler

    from gdmd.diffusion.sampling import few_step_sample, ode_sample
    from gdmd.diffusion.schedule import from_velocity
    from gdmd.models.families.base import PipelineText
    from gdmd.models.families.flow import FlowFamily
    from gdmd.models.roles import DiffusersRoles
    from gdmd.models.vae import VaeCodec

    class MyText(PipelineText):
        def embed(self, texts: Any) -> Cond:
            return {"embeds": torch.tensor([[[float(len(text))] * 4] for text in texts])}

    own: dict[str, Any] = {"FlowFamily": FlowFamily, "VaeCodec": VaeCodec, "MyText": MyText}
    own |= {"from_velocity": from_velocity}
    exec(code("class Mine"), own)
    mine: Any = own["Mine"]

    torch.manual_seed(0)
    parts = {"transformer": Net(), "vae": tiny.vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    family = mine(SimpleNamespace(**parts, vae_scale_factor=2), tiny.config(Path("mine"), checkpointing=False))
    roles, cond = DiffusersRoles(family), family.encoder.encode(["a", "a longer one"])
    assert len(roles.parameters("student")) == 6, "A and B of three layers"
    noise = torch.randn(2, *family.latent_shape)
    steps = family.student_times((1.0, 0.75, 0.5, 0.25))
    assert steps == pytest.approx((1, 0.9, 0.75, 0.5))
    drawn = few_step_sample(roles.student, noise, steps, cond, lambda i: noise, roles.schedule)
    slow = ode_sample(roles.teacher, noise, family.teacher_times(4), cond, roles.schedule)
    assert family.codec.decode(drawn).shape == (2, 3, tiny.SIZE, tiny.SIZE)
    assert drawn.isfinite().all() and slow.isfinite().all() and not torch.equal(drawn[0], drawn[1])
