"""What `gdmd train` says of a reward of the user that fails, scores nothing, or gives no signal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_world import Finished, Gdmd, make_assets

from gdmd.cli.app import main
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
    return images.mean((1, 2, 3)) * float("nan")
def constant(images, prompts):
    return [0.5] * len(images)
def rare(images, prompts):
    scores = images.mean((1, 2, 3)).clone()
    scores[0] = float("nan")
    return scores
def discrete(images, prompts):
    return (1e4 * images.mean((1, 2, 3))).round() % 2
def exits(images, prompts):
    raise SystemExit(0)
def some(images, prompts):
    return [None, *images[1:].mean((1, 2, 3)).tolist()]
def array(images, prompts):
    scores = images.mean((1, 2, 3)).numpy().astype(object)
    scores.setflags(write=False)
    return scores
def imaginary(images, prompts):
    return images.mean((1, 2, 3)).to(torch.complex64)
def by_prompt(images, prompts):
    return [len(prompt) for prompt in prompts]
def rounding(images, prompts):
    return 20 + 1e-6 * torch.arange(len(images))
def later(images, prompts, calls=[]):
    calls.append(1)
    return {}[prompts[0]] if len(calls) > 4 else images.mean((1, 2, 3))
class Score:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))
instance = Score()
"""


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
    ("function", "said"),
    [
        ("broken", "mine.py:3, in helper: `return {}[prompt]`: KeyError: "),
        ("torch_error", "mine.py:7, in torch_error: `return images @ torch.zeros(7, 7)`: RuntimeError: "),
        ("one_argument", "failed when it was called: TypeError: one_argument() takes 1 positional argument"),
        ("scalar", "returned shape [] for 2 images; return one number per image"),
        ("matrix", "returned shape [2, 2] for 2 images; return one number per image"),
        ("nothing", "returned NoneType"),
        ("texts", "returned list"),
        ("in_place", "changed the images in place"),
        ("infinite", "is infinite at samples [0, 1]"),
        ("exits", "mine.py:35, in exits: `raise SystemExit(0)`: SystemExit: 0"),
        ("imaginary", "returned Tensor (complex numbers)"),
    ],
)
def test_a_reward_that_fails_is_one_error_before_the_run_is_made(gdmd: Gdmd, function: str, said: str) -> None:
    finished = train(gdmd, function)
    assert finished.code == 2 and f"error: reward mine:{function} " in finished.err and said in finished.err
    assert len(finished.err.splitlines()) == 1 and not Path("run").exists()


def test_scores_without_the_promised_gradient_are_an_error(gdmd: Gdmd) -> None:
    finished = train(gdmd, "numbers", more=", differentiable: true")
    assert finished.code == 2 and "marked differentiable, but its scores carry no gradient" in finished.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def f(:\n", "mine.py:1: `def f(:`: "),
        ("x = 1\ny = x[0]\n", "importing it failed at {here}/mine.py:2, in <module>: `y = x[0]`: TypeError"),
        (
            "import no_such_package\n",
            "mine.py:1, in <module>: `import no_such_package`: ModuleNotFoundError: No module",
        ),
        ("import sys\nsys.exit(0)\n", 'SystemExit: 0; put what runs as a program below `if __name__ == "__main__":`'),
        ("def ff(images, prompts):\n    return images\n", "mine ({here}/mine.py) has no 'f'; did you mean 'ff'?"),
        ("class f:\n    pass\n", "is a class; name a function, or an instance that can be called"),
        ("f = 3\n", "is of type int, not a function"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_error(gdmd: Gdmd, content: str, said: str) -> None:
    Path("mine.py").write_text(content)
    finished = train(gdmd, "f")
    assert (
        finished.code == 2
        and said.replace("{here}", str(gdmd.folder)) in finished.err
        and len(finished.err.splitlines()) == 1
    )


def test_a_reward_that_scores_nothing_stops_with_a_checkpoint_and_the_fixed_one_continues(gdmd: Gdmd) -> None:
    finished = train(gdmd, "unscored")
    assert finished.code == 2
    assert "error: step 3: reward mine:unscored scored no image in 3 iterations (all NaN)" in finished.err
    assert "The last good checkpoint is run/checkpoints/step_000003" in finished.err
    assert len(read_metrics(Path("run"))) == 3
    assert gdmd("report", "run").code == 0
    assert "Reward mine:unscored scored no image" in Path("run/report.html").read_text()


def test_a_run_without_a_score_fails_again_when_it_is_resumed(gdmd: Gdmd) -> None:
    train(gdmd, "unscored")
    finished = gdmd("train", "--resume", "run", "--no-eval")
    assert finished.code == 2 and "error: step 3: reward mine:unscored scored no image" in finished.err


@pytest.mark.parametrize("method", ["gdmd", "dmd_grpo", "gdmd_tilted"])
@pytest.mark.parametrize("function", ["constant", "by_prompt", "rounding"])
def test_a_run_that_no_reward_has_steered_fails(gdmd: Gdmd, function: str, method: str) -> None:
    if method == "gdmd_tilted":
        words = ["method={kind: gdmd_tilted, continuations: 2, normalize: false, group_size: 1}"]
    else:
        words = [f"method={{kind: {method}}}"]
    finished = train(gdmd, function, *words, "loop.batch_size=16")
    assert finished.code == 2, finished
    said = "error: step 3: no reward told two images of a prompt apart in 3 iterations: distillation alone has trained"
    assert said in finished.err and "warning: " in finished.err
    assert len(list(Path("run/checkpoints").glob("step_000003"))) == 1
    assert gdmd("train", "--resume", "run", "--no-eval").code == 2


def test_a_constant_reward_beside_another_is_a_warning(gdmd: Gdmd) -> None:
    both = "rewards=[{kind: callable, target: 'mine:constant'}, {kind: callable, target: 'mine:numbers'}]"
    finished = gdmd.train(both, "loop.steps=3", "loop.batch_size=16", "--run", "run")
    assert finished.code == 0 and finished.err.count("warning: ") == 1
    assert "warning: reward mine:constant gave every image of 3 iterations the same score" in finished.err


def test_a_reward_that_fails_later_names_the_step_and_the_way_on(gdmd: Gdmd) -> None:
    finished = train(gdmd, "later", "loop.checkpoint_every=1")
    assert finished.code == 2 and "error: step 2: reward mine:later failed at " in finished.err
    assert (
        "The last good checkpoint is run/checkpoints/step_000001. Continue with: gdmd train --resume run"
        in finished.err
    )


@pytest.mark.parametrize("line", ["torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)"])
def test_defaults_that_a_reward_sets_do_not_reach_the_training(gdmd: Gdmd, line: str) -> None:
    Path("mine.py").write_text(
        f"import torch\n{line}\ndef f(images, prompts):\n    {line}\n    return images.mean((1, 2, 3))\n"
    )
    finished = train(gdmd, "f")
    assert finished.code == 0, finished.err


def test_a_constant_reward_is_named_in_the_run_and_its_report(gdmd: Gdmd) -> None:
    finished = train(gdmd, "constant")
    assert finished.err.count("warning: reward mine:constant gave every image of 3 iterations the same score") == 1
    assert gdmd("report", "run").code == 0
    assert "Reward mine:constant gave every image the same score" in Path("run/report.html").read_text()


@pytest.mark.parametrize("function", ["rare", "discrete", "numbers", "some", "array", "instance"])
def test_rare_nan_and_discrete_scores_raise_no_alarm(gdmd: Gdmd, function: str) -> None:
    finished = train(gdmd, function)
    assert finished.code == 0 and "warning" not in finished.err, finished.err


def test_a_reward_that_the_method_does_not_read_is_not_tried(gdmd: Gdmd) -> None:
    finished = train(gdmd, "broken", "method.gamma=0")
    assert finished.code == 0, finished.err
