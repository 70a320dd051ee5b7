"""The host never waits for a GPU in an iteration, but for one look before every optimizer step (bad numbers stop there).

There is no GPU in CI: ``fake_device`` pretends one. ``gdmd profile`` counts the same on a real one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_device import DEVICE, Waits, pretended
from ranks import linear_steps
from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.diffusion.device import confirmed, deferred_checks, raise_where
from gdmd.diffusion.rng import SampleRng
from gdmd.profiling.bench import Bench
from gdmd.recipes.build import Components, build
from gdmd.recipes.read import read_recipe
from gdmd.rewards.preprocessing import check_finite
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run
from gdmd.training.loop import train
from gdmd.types import PromptBatch

LOOK = "tolist at diffusion/device.py:_read"
OTHERS = {  # what a network does itself: captions of different lengths as a list, places of an image
    "z_image": {"tolist at backbones/z_image.py:call"},
    "qwen_image": {"as_tensor at backbones/qwen_image.py:call"},
}


GROUP = ["method.group_size=2", "method.continuations=2"]
"""Two gradients and two ends wait as four do."""


def redness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A differentiable reward."""
    return images[:, 0].mean((1, 2))


def waits_of(cfg: RunConfig, components: Components, waits: Waits) -> tuple[dict[str, int], int]:
    """(waits by place, optimizer steps) of iteration 1; the first may still move tables to the device."""
    bench = Bench(cfg, components)
    bench.train(0, components.stream.at(0))
    before = sum(state.updates for state in bench.states.values())
    waits.counting = True
    bench.train(1, components.stream.at(1))
    waits.counting = False
    return dict(waits.places), sum(state.updates for state in bench.states.values()) - before


@pytest.mark.parametrize("recipe", ["shapes", "gdmd_paper", "dmd", "dmd2", "dmdr", "dmd_refl", "dmd_grpo", "dmd_nft"])
def test_an_iteration_waits_once_per_update(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    few = GROUP if recipe in ("shapes", "gdmd_paper") else ["method.fake_updates=2"]
    cfg = read_recipe(recipe, ["loop.batch_size=8", "loop.threads=1", *few])
    with pretended(monkeypatch) as waits:
        found, updates = waits_of(cfg, build(cfg, DEVICE), waits)
    assert updates >= 2 and found == {LOOK: updates}


@pytest.mark.parametrize(
    "family", ["sd15", "sdxl", "sd3", "flux", "flux2", "flux2_klein", "z_image", "qwen_image", "sana"]
)
def test_no_family_waits_between_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_pipelines as tiny

    (tmp_path / "prompts.txt").write_text("\n".join(tiny.WORDS[:4]))
    reward = "rewards=[{kind: callable, target: 'test_no_waiting:redness', differentiable: true}]"
    model = {"height": tiny.SIZE, "width": tiny.SIZE, "dtype": "fp32", "lora_rank": 2, "lora_alpha": 2}
    model |= {"path": tiny.save(family, tmp_path / family), "embeddings": tmp_path / "text", "checkpointing": "false"}
    own = [f"model.{key}={value}" for key, value in model.items()] + [f"prompts.file={tmp_path / 'prompts.txt'}"]
    own += [reward, "loop.batch_size=2", "loop.precision=fp32", "method.group_size=1", "method.continuations=2"]
    cfg = read_recipe(f"{family}_gdmd", own)
    components = build(cfg, "cpu")
    components.encoder.prepare([text for group in components.stream.groups for text in group])  # type: ignore[attr-defined]
    with pretended(monkeypatch) as waits:
        components.roles.backbone.net.to(DEVICE)
        components.codec.vae.to(DEVICE)  # type: ignore[attr-defined]
        components.encoder.device, components.encoder._null = DEVICE, None  # type: ignore[attr-defined]
        found, updates = waits_of(cfg, components, waits)
    assert updates == 2 and found.pop(LOOK) == updates
    assert found.keys() == OTHERS.get(family, set())


def test_a_run_on_the_device_is_the_run_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ["loop.batch_size=8", "loop.threads=1", "loop.steps=2", "loop.log_every=1", "loop.grid_every=0"]
    cfg = read_recipe("shapes", [*own, *GROUP])

    def run(name: str, device: str) -> dict[str, Tensor]:
        create(tmp_path / name, {})
        components = build(cfg, device)
        end = train(components.method, components.roles, components.stream, cfg.loop, open_run(tmp_path / name))
        assert end.step == 2
        saved = checkpoint.load_newest(tmp_path / name / "checkpoints")
        assert saved is not None
        return {key: value for part in ("student", "fake", "method") for key, value in saved.tensors[part].items()}

    with linear_steps():  # AdamW is fused on one of them
        expected = run("host", "cpu")
        with pretended(monkeypatch):
            found = run("device", DEVICE)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)


def test_the_pretended_device_counts_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch) as waits:
        x = torch.arange(4.0).to(DEVICE).requires_grad_()
        waits.counting = True
        y = torch.where(x > 1, x, 0).square().sum()
        y.backward()
        assert not waits.places
        assert float(y.detach()) == 13
        x.detach()[x > 1]
        torch.tensor([1.0], device=DEVICE)
        assert x.grad is not None and x.grad.cpu().tolist() == [0, 0, 4, 6]
        with pytest.raises(AssertionError, match="tensors of the host"):
            x + torch.ones(4)
    kinds = sorted(what.split(" at ")[0] for what in waits.places)
    assert kinds == ["_local_scalar_dense", "_to_copy", "index by a mask", "tensor"]


def test_a_score_that_is_not_finite_stops_before_the_step_that_would_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        good = torch.ones((), dtype=torch.bool).to(DEVICE)
        scores = torch.tensor([0.0, torch.nan]).to(DEVICE)
        with pytest.raises(ValueError, match=r"aesthetic gave a score .* at samples 1 \('b'\)"), deferred_checks():
            check_finite("aesthetic", scores, ("a", "b"))  # goes on
            confirmed(good)
        with pytest.raises(ValueError, match="aesthetic"), deferred_checks():
            check_finite("aesthetic", scores, ("a", "b"))  # nothing asks any more
        with pytest.raises(ValueError, match="aesthetic"):
            check_finite("aesthetic", scores, ("a", "b"))  # nobody said later
        with deferred_checks():
            raise_where(scores > 1, lambda bad: ValueError(str(bad)))
            assert confirmed(good)


def test_on_the_host_a_check_is_read_at_once() -> None:
    with deferred_checks(), pytest.raises(ValueError, match=r"\[2\]"):
        raise_where(torch.tensor([False, False, True]), lambda bad: ValueError(str(bad)))


def test_draws_on_the_host_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.tensor([5, 0, 7])
    with pretended(monkeypatch) as waits:
        rng = SampleRng(3, 4, index.to(DEVICE), index)
        waits.counting = True
        drawn = rng.at(9).on_host().integer("tau", 4)
        assert not waits.places and drawn.device.type == "cpu"
        assert rng.at(9).integer("tau", 4).cpu().tolist() == drawn.tolist()
