"""``from gdmd.rewards import ...``: names, options, and rewards called in a notebook."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_rewards import PRETRAINED, REWARDS, TASK, prompt_batch, random_images

import gdmd.rewards
from gdmd.config.load import ConfigError
from gdmd.config.rewards import CompositeConfig
from gdmd.recipes.build_rewards import CLASSES
from gdmd.rewards import CLIPScore, RemoteReward
from gdmd.rewards.preprocessing import from_pil, to_pil

CLOSE = {"rel": 2e-3, "abs": 2e-3}
"""PIL rounds twice to 8 bits."""
TEXTS = ['a sign "OPEN"', 'two "cats"']


def test_public_names_import_no_torch() -> None:
    names = "Aesthetic CLIPScore Composite GenEval GenEval2 HPSv2 HPSv3 ImageReward OCR Part PickScore RemoteReward"
    assert sorted(gdmd.rewards.__all__) == names.split()
    assert all(isinstance(getattr(gdmd.rewards, name), type) for name in gdmd.rewards.__all__)
    assert {one.__name__ for one in CLASSES.values()} | {"Composite", "Part"} == set(gdmd.rewards.__all__)
    program = "import sys, gdmd.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'ClipScore'"):
        gdmd.rewards.ClipScore  # noqa: B018


def test_options_are_the_fields_of_the_config() -> None:
    reward = CLIPScore(dtype="bf16", offload=True)
    assert reward.config.model_dump(exclude_defaults=True) == {"dtype": "bf16", "offload": True}
    with pytest.raises(ConfigError) as error:
        CLIPScore(dtyp="bf16", chunk=-1)
    assert len(error.value.errors) == 2 and all(line.startswith("CLIPScore: ") for line in error.value.errors)
    with pytest.raises(ValueError, match="RemoteReward.*reward"):
        RemoteReward(url="http://127.0.0.1:1")


@pytest.mark.parametrize("kind", REWARDS)
def test_calls_with_pil_images_and_tensors(kind: str) -> None:
    """One number per image; where PIL images are not preprocessed differently, the same ones."""
    reward: Any = REWARDS[kind]()
    images = to_pil(random_images(2))
    columns = {key: [TASK[key]] * 2 for key in ("tag", "include", "vqa_list")}
    from_images = reward(images, TEXTS, **columns)
    assert len(from_images) == 2 and all(isinstance(score, float) for score in from_images)
    exact = reward.score(from_pil(images), prompt_batch(TEXTS, [TASK, TASK])).tolist()
    assert reward(from_pil(images), TEXTS, **columns) == exact
    assert from_images == pytest.approx(exact, **(CLOSE if kind in (*PRETRAINED, "composite") else {"rel": 1e-6}))
    assert reward(images[0], TEXTS[0], **{key: [TASK[key]] for key in columns}) == pytest.approx(from_images[:1])
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        reward(images, TEXTS[:1])


def test_config_of_a_composite() -> None:
    config = REWARDS["composite"]().config  # type: ignore[attr-defined]
    assert isinstance(config, CompositeConfig)
    assert [part.reward.label for part in config.parts] == ["clip", "brightness"]
    assert (config.parts[0].weight, config.parts[0].mean, config.parts[0].std) == (2.0, 0.1, 0.5)


def test_images_of_different_sizes() -> None:
    small, large = to_pil(torch.zeros(1, 3, 4, 4))[0], to_pil(torch.ones(1, 3, 8, 6))[0]
    reward: Any = REWARDS["callable"]()
    assert reward([large, small, large], ["a", "bb", "c"]) == [2.0, 2.0, 2.0]
