"""The Python examples of the guides do what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdmd.data.prompts import read_prompts
from gdmd.rewards.callable import CallableReward
from gdmd.types import Cond, PromptBatch

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"


def code(guide: str, beginning: str) -> str:
    """The Python example of a guide with this line in it."""
    text = (GUIDES / guide).read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if beginning in block]
    return str(found)


def test_reward_example_prefers_warm_images() -> None:
    own: dict[str, Any] = {}
    exec(code("rewards.md", "def warm"), own)
    warm = torch.zeros(1, 3, 4, 4)
    warm[:, 0] = 1
    prompts = PromptBatch(torch.arange(2), ("", ""), torch.arange(2), {}, {})
    scores = CallableReward(own["warm"], "warm").score(torch.cat([warm, warm.flip(1)]), prompts)
    assert scores.tolist() == [1, -1]
    columns = replace(prompts, meta=({"style": "photo"}, {"style": "sketch"}))
    sharp = CallableReward(own["sharp"]).score(torch.cat([warm, warm.flip(1)]), columns)
    assert float(sharp[0]) == 0 and sharp[1].isnan()


def test_teacher_prompt_example(tmp_path: Path) -> None:
    text = (GUIDES / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, re.S)
    (tmp_path / "prompts.jsonl").write_text(example)
    assert read_prompts(tmp_path / "prompts.jsonl").note().endswith("2 prompts; 1 has a teacher prompt")


def test_notebook_example_scores_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tiny_rewards import random_images, tiny_clip, tokenize

    from gdmd.rewards.base import Loaded
    from gdmd.rewards.clip import CLIPScore

    monkeypatch.setattr(CLIPScore, "_loader", lambda self: lambda: Loaded(tiny_clip(), tokenize))
    own: dict[str, Any] = {"images": random_images(2)}
    exec(code("rewards.md", "def warm"), own)
    exec(code("rewards.md", "clip = CLIPScore"), own)
    assert len(own["scores"]) == 2 and len(own["reward"](own["images"], "a red cube")) == 2


class Net(nn.Module):
    """Velocity from channels seen as tokens and a caption's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        tokens = x_t.permute(0, 2, 3, 1)
        seen = self.to_q(tokens) * torch.sigmoid(self.to_k(tokens)) + self.to_v(embeds.mean(1))[:, None, None]
        return (seen * (1 + t / 1000).reshape(-1, 1, 1, 1)).permute(0, 3, 1, 2)


def test_family_example_takes_adapters_and_samples() -> None:
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
    exec(code("extend.md", "class Mine"), own)
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


def test_python_guide_builds_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a miniature of the same family, up to the training; tests/test_trainer.py covers the lines below."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    lines = code("python.md", "short_prompt_bonus").partition("trainer.train(")[0]
    own: dict[str, Any] = {}
    exec(lines.replace("black-forest-labs/FLUX.2-klein-base-4B", "shapes:flux2_klein"), own)
    cfg = own["trainer"].config
    assert [reward.label for reward in cfg.rewards] == ["pickscore", "clip", "short_prompt_bonus"]
    assert (cfg.loop.steps, cfg.model.lora_rank, cfg.loop.report_to) == (750, 64, ("wandb",))
    assert own["short_prompt_bonus"](images=None, prompts=["a cat", "x" * 90]) == [1.0, None]
