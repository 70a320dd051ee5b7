"""Functions as rewards: what they get, what they may return, and the errors, which show the user's own line."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import prompt_batch, random_images
from tiny_roles import ToyCodec
from torch import Tensor, nn

from gdmd.config.rewards import CallableConfig, FunctionConfig
from gdmd.methods.scorer import Scorer
from gdmd.recipes.build_rewards import build_rewards, reward_specs, try_rewards
from gdmd.recipes.inputs import inputs_of
from gdmd.recipes.read import read_recipe
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.rewards import OCR
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.clip import CLIPScore
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.user_code import imported

META = ({"prompt": "a", "label": 1, "tag": "x"}, {"prompt": "b", "label": 2})
PROMPTS = prompt_batch("ab", META)
IMAGES = random_images(2, 8, 8)
HERE = Path(__file__).name


def score(function: Any, **options: Any) -> Tensor:
    return CallableReward(function, **options).score(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2.0],
        (1.0, 2.0),
        np.array([1, 2]),
        np.array([1, 2], dtype=object),
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        [torch.tensor(1.0), np.float32(2)],
    ],
    ids=str,
)
def test_one_number_per_image_in_any_form(given: Any) -> None:
    def function(images: Any, prompts: Any) -> Any:
        return given

    scores = score(function)
    assert scores.tolist() == [1, 2] and scores.dtype == torch.float32


@pytest.mark.parametrize("given", [[None, 2], [float("nan"), 2], np.ma.array([1, 2], mask=[True, False])], ids=str)
def test_an_image_without_a_score(given: Any) -> None:
    def function(images: Any, prompts: Any) -> Any:
        return given

    assert score(function).isnan().tolist() == [True, False]


def test_columns_that_the_function_has_a_parameter_for() -> None:
    seen: dict[str, Any] = {}

    def everything(images: Any, prompts: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts)
        return [0, 0]

    def one(prompts: Any, images: Any, label: Any) -> list[float]:
        return [float(n) for n in label]

    def renamed(pixels: Any, texts: Any, tag: str = "-") -> list[float]:
        return [len(pixels), len(tag)]

    def needs(images: Any, prompts: Any, size: Any) -> list[float]:
        return [0, 0]

    assert score(one).tolist() == [1, 2] and score(renamed).tolist() == [2, 2]
    score(everything)
    assert seen == {"prompts": ["a", "b"], "label": [1, 2], "tag": ["x", None]}
    with pytest.raises(ValueError, match=f"{HERE}:.*needs the column 'size', but the prompts have only 'label', 'tag'"):
        score(needs)


def test_functions_can_ask_for_pil_images() -> None:
    def width(images: Any, prompts: Any) -> list[float]:
        assert all(isinstance(image, Image.Image) for image in images)
        return [image.width for image in images]

    assert score(width, image_type="pil").tolist() == [8, 8]
    width.image_type = "pil"  # type: ignore[attr-defined]
    assert score(width).tolist() == [8, 8]
    assert CallableReward(width)([Image.new("RGB", (8, 4)), Image.new("RGB", (6, 4))], "a") == [8, 6]
    with pytest.raises(ValueError, match="width.*image_type pil carries no gradient"):
        CallableReward(width, differentiable=True)


class Counting:
    """A reward with state."""

    differentiable = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        return images.mean((1, 2, 3))


def test_the_setting_overrides_the_attribute_differentiable(tmp_path: Path) -> None:
    """The error about a missing gradient advises this setting."""
    (tmp_path / "marked.py").write_text(
        "def mean(images, prompts):\n    return images.mean((1, 2, 3))\nmean.differentiable = True\n"
    )
    target = f"{tmp_path}/marked.py:mean"
    for value, expected in ((None, True), (True, True), (False, False)):
        reward = CallableReward.from_config(CallableConfig(target=target, differentiable=value))
        assert reward.differentiable is expected
        assert reward.score(IMAGES.clone().requires_grad_(), PROMPTS).requires_grad is expected


def test_a_list_of_tensors_has_their_gradient() -> None:
    def one_by_one(images: Tensor, prompts: Any) -> list[Any]:
        return [images[0].double().mean(), None]

    images = IMAGES.clone().requires_grad_()
    scores = CallableReward(one_by_one, differentiable=True).score(images, PROMPTS)
    assert scores.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(scores.nansum(), images)
    torch.testing.assert_close(gradient[0], torch.full_like(gradient[0], 1 / gradient[0].numel()))


def test_a_function_may_compute_a_gradient_of_its_own() -> None:
    """It may set requires_grad on the images, which the rewards after it also get."""

    def sharpness(images: Tensor, prompts: Any) -> Tensor:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(images.requires_grad_().square().sum(), images)
        return gradient.mean((1, 2, 3))

    def brightness(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    images = IMAGES.clone()
    with torch.no_grad():
        scores = CallableReward(sharpness).score(images, PROMPTS)
        mean = CallableReward(brightness, differentiable=True).score(images, PROMPTS)
    torch.testing.assert_close(scores, 2 * mean)


CLASSES = """class Warm:
    def __call__(self, images, prompts):
        return [1, 2]
class Odd:
    def __init__(self, scale):
        self.scale = scale
"""


class Net(nn.Module):
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 1), nn.Dropout(0.5)

    def forward(self, images: Tensor, prompts: Any, label: Any = None) -> Tensor:
        return self.drop(self.layer(images.mean((2, 3))))[:, 0]


def test_objects_with_state_and_modules(tmp_path: Path) -> None:
    counting, net = CallableReward(Counting()), CallableReward(Net())
    assert (counting.name, net.name) == ("Counting", "Net")
    for reward in (counting, net):
        images = IMAGES.clone().requires_grad_()
        assert torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)[0].any()
    assert counting.function.calls == 1
    assert not net.function.training and not any(one.requires_grad for one in net.function.parameters())
    broken = Net()
    broken.layer = nn.Linear(4, 1)
    with pytest.raises(ValueError, match=rf"Net failed at .*{HERE}:\d+, in forward: `return self.drop\("):
        score(broken)
    (tmp_path / "classes.py").write_text(CLASSES)
    assert score(imported(f"{tmp_path}/classes.py:Warm")).tolist() == [1, 2]
    with pytest.raises(
        ValueError, match="is a class, which is instantiated without arguments .missing a required argument"
    ):
        imported(f"{tmp_path}/classes.py:Odd")


def test_images_on_the_device_of_the_reward() -> None:
    """A server and an evaluation have the images on the CPU, and the function on a GPU; scores return to the images."""
    seen: list[str] = []

    def where(images: Any, prompts: Any) -> list[float]:
        seen.append(str(images.device))
        return [0.0] * len(images)

    reward = CallableReward(where)
    for device in ("cpu", "meta"):  # the only other device of every machine
        assert reward.to(device).score(IMAGES, PROMPTS).device == IMAGES.device
    assert seen == ["cpu", "meta"]


async def later(images: Any, prompts: Any) -> list[float]:
    return [0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (later, f"reward later .*{HERE}:.*is async; write an ordinary function"),
        (Counting, r"Counting is a class; give an instance: Counting\(\)"),
        (lambda images, prompts: [0, 0], f"lambda .*{HERE}.* has no name for the log"),
        (3, "type int cannot be called; give a function"),
    ],
)
def test_an_object_that_is_not_a_reward_is_an_error(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallableReward(given)


# ---------------------------------------------------------------- the trial before training


def tried(function: Any, **options: Any) -> None:
    try_rewards([CallableReward(function, **options)], (8, 8), "a", {"label": 1}, "cpu")


def through_an_array(images: Any, prompts: Any) -> list[float]:
    images.detach().numpy()[:] = 0
    return [0, 0]


def without_images(images: Any, prompts: Any) -> Tensor:
    return torch.zeros(2, requires_grad=True) * 2


def test_the_trial_finds_silent_mistakes() -> None:
    with pytest.raises(ValueError, match=f"{HERE}:.*modified the images in place"):
        tried(through_an_array)
    with pytest.raises(ValueError, match=f"{HERE}:.*carry no gradient"):
        tried(without_images, differentiable=True)


def test_a_function_with_a_gradient_may_score_nothing() -> None:
    """In a micro-batch of one image, a sample without a score is all that the function returns."""

    def of_a(images: Any, prompts: Any) -> list[Any]:
        return [image.mean() if prompt == "a" else None for image, prompt in zip(images, prompts, strict=True)]

    reward = CallableReward(of_a, differentiable=True)
    try_rewards([reward], (8, 8), "b", None, "cpu")
    scores, gradient, _ = Scorer(ToyCodec(), [reward], 1).gradient(IMAGES, PROMPTS, lambda raw: raw.nan_to_num().sum(0))
    assert scores[0] > 0 and scores[1] == 0
    assert gradient[0].gt(0).all() and gradient[1].eq(0).all()


def test_the_trial_reports_missing_and_random_scores(caplog: pytest.LogCaptureFixture) -> None:
    def nothing(images: Any, prompts: Any) -> list[Any]:
        return [None, None]

    def random(images: Any, prompts: Any) -> Tensor:
        return torch.rand(2)

    with caplog.at_level(logging.WARNING):
        tried(nothing)
        tried(random)
        tried(Counting())
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "reward nothing gave no score (NaN or None) for the prompt 'a'"
    assert second.startswith("reward random gave the same images different scores in two calls: [")


def test_a_server_that_is_down() -> None:
    spec = {"kind": "remote", "url": "http://127.0.0.1:9", "reward": "clip", "retries": 0}
    for given in (spec, {"kind": "composite", "parts": [{"reward": spec}]}):
        rewards = build_rewards(reward_specs([given])[0])
        with pytest.raises(ValueError, match="no answer.*start the server there with: gdmd rewards serve clip"):
            try_rewards(rewards, (8, 8), "a", None, "cpu")


# ---------------------------------------------------------------- recipes


def warm(images: Tensor, prompts: Any) -> Tensor:
    return images[:, 0].mean((1, 2))


def test_objects_in_a_recipe() -> None:
    """Specs of objects, kinds and targets; building them again gives the same scores."""
    counting = Counting()
    given = [CLIPScore(dtype="bf16"), Composite([Part(warm, 2.0)]), counting, "shapes_clip", "operator:add"]
    specs, functions = reward_specs(given)
    assert [spec.label for spec in specs] == ["clip", "composite", "Counting", "shapes_clip", "operator:add"]
    assert functions == {"warm": warm, "Counting": counting}
    cfg = read_recipe("shapes_gdmd", [])
    assert (
        type(cfg).model_validate(cfg.model_dump() | {"rewards": [spec.model_dump() for spec in specs]}).rewards == specs
    )
    built = build_rewards(specs, "cpu", functions)
    torch.testing.assert_close(built[1].score(IMAGES, PROMPTS), warm(IMAGES, ()))
    assert built[2].differentiable and built[2].function is counting  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"Counting is a Python object.*in another process.*reward_funcs=\[Counting\]"):
        build_rewards(specs[2:3])
    with pytest.raises(ValueError, match="two rewards are functions named Counting"):
        reward_specs([Counting(), Counting()])


def test_the_identity_of_a_function_is_its_source() -> None:
    (spec,), _ = reward_specs([warm])
    (other,), _ = reward_specs([Counting()])
    (unknown,), _ = reward_specs([max])
    assert isinstance(spec, FunctionConfig) and isinstance(unknown, FunctionConfig) and unknown.source is None
    assert scorer_identity(spec) == scorer_identity(spec) != scorer_identity(other)
    assert scorer_identity(unknown) != scorer_identity(unknown)
    cfg = read_recipe("shapes_gdmd", []).model_copy(update={"rewards": (spec, unknown)})
    inputs = inputs_of(cfg)
    assert inputs["rewards.0.source"].fingerprint == f"sha256:{spec.source}"
    assert inputs["rewards.1.source"].fingerprint is None


def scaled(images: Tensor, prompts: Any, factor: Any = 1.0) -> Tensor:
    return factor * images.mean((1, 2, 3))


def test_bound_arguments_are_part_of_the_identity() -> None:
    """Tensors count by their values, other objects by their class, as their text may hold an address."""

    def source(factor: Any) -> str | None:
        return CallableReward(partial(scaled, factor=factor), "scaled").config.source  # type: ignore[union-attr]

    assert source(1.0) == source(1.0) != source(2.0) != CallableReward(scaled).config.source  # type: ignore[union-attr]
    assert source(torch.ones(())) == source(torch.ones(())) != source(torch.zeros(()))
    assert source(object()) == source(object()) != source([])


def test_variables_of_an_enclosing_function_are_part_of_the_identity() -> None:
    """A counter that the function sets is not: with it a run in the same process could not be resumed."""

    def made(factor: float, calls: int) -> Any:
        def reward(images: Tensor, prompts: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return factor * images.mean((1, 2, 3))

        return reward

    def source(*given: Any) -> str | None:
        return CallableReward(made(*given)).config.source  # type: ignore[union-attr]

    assert source(1.0, 0) == source(1.0, 0) == source(1.0, 7) != source(2.0, 0)


class Bounded:
    """A reward with settings and a counter."""

    def __init__(self, low: float, high: float = 1.0) -> None:
        self.low, self._high, self.calls = low, high, 0

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        return images.mean((1, 2, 3)).clamp(self.low, self._high)


def test_settings_of_an_instance_are_part_of_the_identity() -> None:
    """This also holds for a bound method of an instance; a counter is not part of it."""

    def source(reward: Any) -> str | None:
        return CallableReward(reward, "bounded").config.source  # type: ignore[union-attr]

    used = Bounded(0.0)
    used(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert source(used) == source(Bounded(0.0)) != source(Bounded(0.1)) != source(Bounded(0.1, 0.5))
    assert source(Bounded(0.0).__call__) != source(Bounded(0.1).__call__)


class Weighted(nn.Module):
    """A reward network with a parameter, and a buffer that counts its calls."""

    calls: Tensor

    def __init__(self, weight: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.part = nn.Linear(1, 1).requires_grad_(False).to(dtype)
        self.part.weight.fill_(weight)
        self.part.bias.zero_()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        return self.part(images.mean((1, 2, 3))[:, None].to(self.part.weight.dtype))[:, 0].float()


class Holding:
    """A reward that keeps a network which it was given."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return self.net(images, prompts)  # type: ignore[no-any-return]


@pytest.mark.parametrize("around", [lambda net: net, Holding, lambda net: net.forward, lambda net: partial(net)])
def test_the_parameters_of_a_network_are_part_of_the_identity(around: Any) -> None:
    """The given one may be any of several weights of a class; a buffer may count its calls."""

    def source(net: nn.Module) -> str | None:
        return CallableReward(around(net), "weighted").config.source  # type: ignore[union-attr]

    used = Weighted(0.5)
    used(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert source(used) == source(Weighted(0.5)) != source(Weighted(0.25))
    assert source(Weighted(0.5, torch.bfloat16)) != source(used)
    assert source(Weighted(0.5).to("meta")) == source(Weighted(0.25).to("meta"))


def test_the_program_finds_a_function_next_to_the_working_directory(tmp_path: Path) -> None:
    """The installed script has its own folder on the path instead of the working directory."""
    (tmp_path / "mine.py").write_text("def warm(images, prompts):\n    return [0] * len(imagess)\n")
    script = Path(sys.executable).with_name("gdmd")
    for target in ("mine.py:warm", "mine:warm"):
        words = [script, "train", "shapes_gdmd", f"rewards=[{{kind: callable, target: '{target}'}}]", "--run", "run"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "mine.py:2, in warm: `return [0] * len(imagess)`: NameError" in done.stderr
        assert not (tmp_path / "run").exists()


def test_the_trial_before_training_counts_in_no_statistics() -> None:
    reward = OCR.from_modules(lambda image: "OPEN")
    try_rewards([reward], (8, 8), "a dog", None, "cpu")
    assert reward.stats()["reward/ocr/unasked"] == 0 and not reward.unscored_because()
