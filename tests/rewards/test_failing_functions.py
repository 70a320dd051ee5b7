"""``gdmd train`` with a reward function that fails, scores nothing, or gives no signal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from cli_world import Finished, Gdmd, make_assets
from tiny_rewards import prompt_batch, random_images

from gdmd.cli.app import main
from gdmd.config.rewards import CallableConfig
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.user_code import imported
from gdmd.runs.run_folder import read_metrics

MINE = """import torch
def helper(prompt):
    return {}[prompt]
def broken(images, prompts):
    return [helper(p) for p in prompts]
def torch_error(images, prompts):
    return images @ torch.zeros(7, 7)
def one_argument(images):
    return images.mean((1, 2, 3))
def scalar(images, prompts):
    return images.mean()
def matrix(images, prompts):
    return torch.zeros(len(images), len(images))
def nothing(images, prompts):
    pass
def texts(images, prompts):
    return list(prompts)
def in_place(images, prompts):
    return images.mul_(0.5).mean((1, 2, 3))
def infinite(images, prompts):
    return images.mean((1, 2, 3)) / 0
def numbers(images, prompts):
    return images.mean((1, 2, 3)).tolist()
def unscored(images, prompts):
    return [None] * len(images)
def mostly_unscored(images, prompts):
    return [None if k % 5 < 3 else float(image.mean()) for k, image in enumerate(images)]
def constant(images, prompts):
    return [0.5] * len(images)
def exits(images, prompts):
    raise SystemExit(0)
def imaginary(images, prompts):
    return images.mean((1, 2, 3)).to(torch.complex64)
def imaginary_list(images, prompts):
    return list(images.mean((1, 2, 3)).to(torch.complex64))
def elsewhere(images, prompts):
    return torch.zeros(len(images), device="meta")
def by_prompt(images, prompts):
    return [len(prompt) for prompt in prompts]
def rounding(images, prompts):
    return 20 + 1e-6 * torch.arange(len(images))
def later(images, prompts, calls=[]):
    calls.append(1)
    return {}[prompts[0]] if len(calls) > 8 else images.mean((1, 2, 3))
class Odd:
    '''Rare NaN and None, discrete values, an object array that is read-only; and changed torch defaults.'''
    def __init__(self):
        self.calls = 0
    def __call__(self, images, prompts):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        self.calls += 1
        mean = images.mean((1, 2, 3)).float()
        array = mean.numpy().astype(object)
        array.setflags(write=False)
        discrete = (1e4 * mean).round() % 2
        return [mean, array, discrete, [None, *mean[1:].tolist()], mean.tolist()][self.calls % 5]
odd = Odd()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of rewards that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def gdmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gdmd:
    """The program in a folder with a module of rewards."""
    gdmd = Gdmd(main, make_assets(tmp_path / "assets"), tmp_path, monkeypatch, capsys)
    monkeypatch.syspath_prepend(str(gdmd.folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)
    return gdmd


def train(gdmd: Gdmd, function: str, *words: str, more: str = "") -> Finished:
    reward = f"rewards=[{{kind: callable, target: 'mine:{function}'{more}}}]"
    return gdmd.train(reward, "loop.steps=3", "--run", "run", *words)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "mine.py:3, in helper: `return {}[prompt]`: KeyError: "),
        ("torch_error", "mine.py:7, in torch_error: `return images @ torch.zeros(7, 7)`: RuntimeError: "),
        ("scalar", "returned shape [] for 2 images; return one number per image"),
        ("matrix", "returned shape [2, 2] for 2 images; return one number per image"),
        ("nothing", "returned NoneType"),
        ("texts", "returned list"),
        ("in_place", "modified the images in place"),
        ("infinite", "is infinite at samples [0, 1]"),
        ("exits", "in exits: `raise SystemExit(0)`: SystemExit: 0"),
        ("imaginary", "returned Tensor (complex numbers)"),
        ("imaginary_list", "returned list (complex numbers)"),
        ("elsewhere", "returned Tensor (on the meta device, without values)"),
        ("numbers", "marked differentiable, but its scores carry no gradient"),
    ],
)
def test_errors_of_functions_name_the_function(module: Path, function: str, message: str) -> None:
    reward = CallableReward.from_config(CallableConfig(target=f"mine:{function}", differentiable=function == "numbers"))
    with pytest.raises(ValueError) as error:
        reward.score(random_images(2, 8, 8).requires_grad_(), prompt_batch("ab"))
    assert str(error.value).startswith(f"reward mine:{function} ") and message in str(error.value)


def test_function_without_the_two_parameters(module: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mine:one_argument \(.*mine.py:8\) cannot be called with \(images, prompts\): too"
    ):
        CallableReward.from_config(CallableConfig(target="mine:one_argument"))


def test_an_error_before_the_run_is_created(gdmd: Gdmd) -> None:
    finished = train(gdmd, "broken")
    assert finished.code == 2 and "error: reward mine:broken failed at " in finished.err
    assert finished.err.count("error: ") == 1 and not Path("run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def f(:\n", "mine.py:1: `def f(:`: "),
        ("x = 1\ny = x[0]\n", "importing it failed at {here}/mine.py:2, in <module>: `y = x[0]`: TypeError"),
        (
            "import no_such_package\n",
            "mine.py:1, in <module>: `import no_such_package`: ModuleNotFoundError: No module",
        ),
        (
            "import sys\nsys.exit(0)\n",
            'SystemExit: 0; put code that runs as a program below `if __name__ == "__main__":`',
        ),
        ("def ff(images, prompts):\n    return images\n", "mine ({here}/mine.py) has no 'f'; did you mean 'ff'?"),
        ("class f:\n    pass\n", "is of type f, which cannot be called; name a function, or a class with __call__"),
        ("f = 3\n", "is of type int, which cannot be called"),
    ],
)
def test_modules_that_cannot_be_imported(module: Path, content: str, message: str) -> None:
    module.write_text(content)
    with pytest.raises(ValueError) as error:
        imported("mine:f")
    assert message.replace("{here}", str(module.parent)) in str(error.value)


def test_a_reward_without_any_score_stops_the_run(gdmd: Gdmd) -> None:
    """It stops with a checkpoint and a note in the report, and stops again when it is resumed."""
    error = "error: step 3: reward mine:unscored scored no image in 3 iterations (all NaN)"
    finished = train(gdmd, "unscored")
    assert finished.code == 2 and error in finished.err
    assert "The last good checkpoint is run/checkpoints/step_000003" in finished.err
    assert len(read_metrics(Path("run"))) == 3
    assert gdmd("report", "run").code == 0
    assert "Reward mine:unscored scored no image" in Path("run/report.html").read_text()
    finished = gdmd("train", "--resume", "run", "--no-eval")
    assert finished.code == 2 and "error: step 3: reward mine:unscored scored no image" in finished.err


def test_a_reward_that_scores_less_than_half_of_the_images_is_a_warning(gdmd: Gdmd) -> None:
    finished = train(gdmd, "mostly_unscored", "loop.batch_size=10")
    assert finished.code == 0
    assert "warning: reward mine:mostly_unscored left 60% of the images without a score" in finished.err


TILTED = "method={kind: gdmd_tilted, continuations: 2, normalize: false, group_size: 1}"


@pytest.mark.parametrize(
    ("function", "method"),
    [
        ("constant", "method={kind: gdmd}"),
        ("by_prompt", "method={kind: dmd_grpo}"),
        ("rounding", TILTED),
    ],
)
def test_a_reward_without_signal_fails_the_run(gdmd: Gdmd, function: str, method: str) -> None:
    """Equal scores for all images of a prompt train nothing."""
    finished = train(gdmd, function, method, "loop.batch_size=16")
    assert finished.code == 2, finished
    said = "error: step 3: no reward told two images of a prompt apart in 3 iterations: distillation alone has trained"
    assert said in finished.err and "warning: " in finished.err
    assert len(list(Path("run/checkpoints").glob("step_000003"))) == 1
    assert gdmd("train", "--resume", "run", "--no-eval").code == 2


def test_a_constant_reward_next_to_another_is_a_warning(gdmd: Gdmd) -> None:
    both = "rewards=[{kind: callable, target: 'mine:constant'}, {kind: callable, target: 'mine:numbers'}]"
    finished = gdmd.train(both, "loop.steps=3", "loop.batch_size=16", "--run", "run")
    assert finished.code == 0 and finished.err.count("warning: ") == 1
    assert "warning: reward mine:constant gave every image of 3 iterations the same score" in finished.err
    assert gdmd("report", "run").code == 0
    assert "Reward mine:constant gave every image the same score" in Path("run/report.html").read_text()


def test_a_reward_that_fails_later_names_the_step(gdmd: Gdmd) -> None:
    finished = train(gdmd, "later", "loop.checkpoint_every=1")
    assert finished.code == 2 and "error: step 2: reward mine:later failed at " in finished.err
    resume = "Fix the cause, then continue with: gdmd train --resume run (add --accept-changes if you change a reward"
    assert f"The last good checkpoint is run/checkpoints/step_000001. {resume}" in finished.err


def test_odd_but_valid_scores_raise_no_alarm(gdmd: Gdmd) -> None:
    finished = train(gdmd, "odd")
    assert finished.code == 0 and "warning" not in finished.err, finished.err


def test_a_reward_that_the_method_does_not_use_is_not_called(gdmd: Gdmd) -> None:
    finished = train(gdmd, "broken", "method.gamma=0")
    assert finished.code == 0, finished.err
