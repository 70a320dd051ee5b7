"""The public names: a change of this list is a change for users."""

from __future__ import annotations

import importlib
import inspect
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gdmd
from gdmd import rewards
from gdmd.config.run import RunConfig
from gdmd.recipes.from_objects import recipe_from
from gdmd.recipes.objects import GivenObjects

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = """
    __version__ ConfigError DistillationTrainer DMD2Config DMDConfig DMDGRPOConfig DMDNFTConfig DMDRConfig DMDReFLConfig
    GDMDConfig RunConfig RunError TiltedGDMDConfig TrainerCallback TrainerState TrainingConfig load_student read_recipe
"""
REWARDS = "Aesthetic CLIPScore Composite GenEval GenEval2 HPSv2 HPSv3 ImageReward OCR Part PickScore RemoteReward"
FUNCTIONS = """
    losses.advantages: group_advantage softmax_weights
    losses.denoising: denoising_loss mean_square
    losses.dmd: dmd_gradient dmd_loss normalizer regression_loss
    losses.dpo: dpo_loss
    losses.gan: discriminator_loss generator_loss
    losses.gdmd: first_order_gain implicit_target napo_loss napo_minimizer optimality step_weight
    losses.grpo: grpo_loss
    losses.nft: nft_loss nft_optimality
    losses.refl: mean_refl_loss refl_loss
    losses.reward_tilt: reward_tilt
    diffusion.sampling: backward_simulation continuation few_step_sample ode_sample times
    diffusion.stochastic_sampling: cps_log_prob cps_mean cps_step stochastic_rollout
"""


def test_public_names() -> None:
    assert sorted(gdmd.__all__) == sorted(NAMES.split())
    assert sorted(rewards.__all__) == sorted(REWARDS.split())


def test_public_functions_of_losses_and_samplers() -> None:
    listed = dict(line.split(": ") for line in FUNCTIONS.strip().splitlines())
    listed = {module.strip(): names.split() for module, names in listed.items()}
    losses = {f"losses.{file.stem}" for file in (Path(gdmd.__file__).parent / "losses").glob("[a-z]*.py")}
    assert losses == {name for name in listed if name.startswith("losses.")}
    for name, names in listed.items():
        module = importlib.import_module(f"gdmd.{name}")
        own = {
            key: one
            for key, one in vars(module).items()
            if inspect.isfunction(one) and one.__module__ == module.__name__ and not key.startswith("_")
        }
        assert sorted(own) == sorted(names)
        assert all(one.__doc__ for one in own.values()), name


@pytest.mark.parametrize("module", [gdmd, rewards])
def test_every_public_name_exists_and_is_documented(module: object) -> None:
    pytest.importorskip("diffusers")
    for name in module.__all__:  # type: ignore[attr-defined]
        found = getattr(module, name)
        assert name == "__version__" or found.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        module.Trainer  # type: ignore[attr-defined]  # noqa: B018


def test_import_and_configs_need_no_torch() -> None:
    code = (
        "import sys, gdmd, gdmd.rewards; gdmd.TrainingConfig(max_steps=3); gdmd.GDMDConfig(); dir(gdmd);"
        "gdmd.read_recipe('sdxl_gdmd', ['prompts.file=p.txt']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement after training, which is most of the time, has an image per task."""

    def fewer(*given: Any) -> tuple[RunConfig, GivenObjects]:
        cfg, objects = recipe_from(*given)
        small = cfg.eval.model_copy(update={"per_task": 1, "images": 1, "teacher_steps": 2})
        return cfg.model_copy(update={"eval": small}), objects

    monkeypatch.setattr("gdmd.trainer.recipe_from", fewer)


@pytest.mark.usefixtures("few_images")
def test_example_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2", "--output", str(tmp_path / "run")])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "run" / "image.png").is_file()


@pytest.mark.usefixtures("few_images")
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, in one namespace, as a kernel would run them."""
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "train.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["history"].rows) >= 4  # type: ignore[attr-defined]
    assert (tmp_path / "runs" / "notebook" / "lora" / "README.md").is_file()
