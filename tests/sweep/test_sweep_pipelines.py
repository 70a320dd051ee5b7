"""A sweep over a diffusers pipeline of the Shapes world: teacher, LoRA, full student and the exported LoRA, to the page."""

from __future__ import annotations

import argparse
import ast
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
import torch
from PIL import Image

from gdmd.config.image_source import read_source
from gdmd.config.load import ConfigError
from gdmd.config.model import DiffusersModel
from gdmd.recipes.build_data import store_of
from gdmd.sources.open import open_source
from gdmd.sweep import images, plain_diffusers, pool, worker
from gdmd.sweep.pool import Outcome, run_sweep
from gdmd.sweep.results import summary, write_pages
from gdmd.sweep.runs import plan, read_table
from gdmd.sweep.spec import Sweep, read_sweep

RECIPE = """name: tiny
model:
  {kind: diffusers, path: PIPELINE, height: 32, width: 32, dtype: fp32, lora_rank: 2, max_tokens: TOKENS, embeddings: texts}
method: {kind: gdmd_tilted, guidance: 3.0, group_size: 1, continuations: 2}
loop: {batch_size: 2, lr_student: 1.0e-2, lr_fake: 1.0e-2, ema: 0.5}
"""
CONFIG = """name: miniatures
about: Tiny.
base: RECIPE
headline: gdmd_lora
student_updates: 2
seeds: [3]
rows:
  - {name: dmd_lora, kind: baseline, label: DMD LoRA, overrides: {method.gamma: 0.0}}
  - {name: gdmd_lora, kind: gdmd, label: GDMD LoRA}
  - {name: gdmd_full, kind: gdmd, label: GDMD full, overrides: {model.full: student}}
teachers:
  - {name: teacher, recipe: RECIPE, steps: 2}
  - {name: teacher_4, steps: 4, guidance: 1.0}
exports: [{name: exported, label: exported LoRA, student: gdmd_lora}]
evaluation: {per_task: 1, images: 2}
diagnosis: {seeds: 0}
images: {rows: [teacher, gdmd_lora], per_cluster: 1, captions: 6}
"""
PROGRAMS = {pool.WORKER: worker.main, pool.IMAGES: images.main}


@dataclass(frozen=True)
class Ended:
    """A program that ran in this process."""

    returncode: int

    def poll(self) -> int:
        return self.returncode

    wait = poll


@dataclass(frozen=True)
class Done:
    """A finished sweep."""

    sweep: Sweep
    folder: Path
    page: str
    messages: list[str]

    def run(self, row: str) -> Path:
        """The folder of a row's run."""
        return next(run.folder(self.folder) for run in plan(self.sweep) if run.method == row)

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        """The published lines, by row."""
        return {line["row"]: line for line in read_table(self.folder / "miniatures.jsonl")}


def write_sweep(folder: Path, text: str = CONFIG) -> str:
    pipeline = folder / "sd3"
    if not pipeline.exists():
        tiny.save_shapes("sd3", pipeline)
    recipe = RECIPE.replace("PIPELINE", str(pipeline)).replace("TOKENS", str(tiny.SHAPES_TOKENS))
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "miniatures.yaml").write_text(text.replace("RECIPE", str(folder / "tiny.yaml")))
    return str(folder / "miniatures.yaml")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("pipelines")
    source = write_sweep(folder)
    sweep, messages = read_sweep(source), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_worker", lambda module, where, log: Ended(PROGRAMS[module](where)))
        outcome = run_sweep(sweep, source, folder / "out", 1, [], messages.append)
    assert outcome.exit_code == 0, outcome.failed
    page = write_pages(sweep, source, folder / "out", only_pages=False)
    assert page is not None
    return Done(sweep, folder / "out", page.read_text(), messages)


def test_every_run_has_a_line(done: Done) -> None:
    facts = {
        row: tuple(line[k] for k in ("family", "method", "mode", "steps", "nfe")) for row, line in done.lines.items()
    }
    assert facts == {
        "teacher": ("sd3", "teacher", "teacher", 2, 4),
        "teacher_4": ("sd3", "teacher", "teacher", 4, 4),
        "dmd_lora": ("sd3", "dmd", "lora", 4, 4),
        "gdmd_lora": ("sd3", "gdmd", "lora", 4, 4),
        "gdmd_full": ("sd3", "gdmd", "full", 4, 4),
        "exported": ("sd3", "gdmd", "exported", 4, 4),
    }
    for row, line in done.lines.items():
        assert line["seed"] == 3 and line["images"] == len(line["correct"]) == 12
        assert line["shapeseval"] == pytest.approx(line["correct"].count("1") / 12)
        trained = ["shapes_clip", "shapes_pref"] if line["method"] == "gdmd" else []
        assert line["trained"] == trained and {*trained, *line["unseen"]} == line["rewards"].keys(), row
    assert [done.lines[row]["student_updates"] for row in ("gdmd_lora", "gdmd_full", "exported")] == [2, 2, 0]
    assert (
        done.lines["gdmd_full"]["passes"] > done.lines["gdmd_lora"]["passes"] > 0
    )  # a backward pass costs two forwards


def test_the_page_has_goals_tables_and_figures(done: Done) -> None:
    goals = {line.split(" | ")[1] for line in done.page.splitlines() if line.startswith("| sd3 | ")}
    assert goals == {
        "GDMD LoRA / teacher with 4 NFE",
        "GDMD LoRA - DMD LoRA",
        "GDMD full / teacher with 4 NFE",
        "exported LoRA in diffusers - the same LoRA in gdmd",
    }
    assert "Unfinished" not in done.page and "nan" not in done.page and "None" not in done.page
    for name in ("sd3_overall.png", "fig6_grid.png"):
        assert f"(miniatures/{name})" in done.page and (done.folder / "miniatures" / name).is_file()


def test_the_page_is_made_again_from_the_published_table(done: Done, tmp_path: Path) -> None:
    shutil.copy(done.folder / "miniatures.jsonl", tmp_path)
    shutil.copytree(done.folder / "miniatures", tmp_path / "miniatures")
    page = write_pages(done.sweep, "miniatures", tmp_path, only_pages=True)
    assert page is not None
    head, _, _ = done.page.partition("## How to repeat it")
    assert page.read_text().partition("## How to repeat it")[0] == head
    assert read_table(tmp_path / "miniatures.jsonl") == read_table(done.folder / "miniatures.jsonl")
    found = summary(done.sweep, Outcome(tmp_path), only_pages=True)
    assert found["missing"] == 0 and found["rows"].keys() == done.lines.keys()


def test_a_page_without_goals(done: Done, tmp_path: Path) -> None:
    """A table with one row has nothing to compare, so the page shows no goals."""
    (tmp_path / "miniatures.jsonl").write_text(json.dumps(done.lines["dmd_lora"]) + "\n")
    page = write_pages(done.sweep, "miniatures", tmp_path, only_pages=True)
    assert page is not None
    text = page.read_text()
    assert (
        "Unfinished: 5 runs" in text
        and "goals met" not in text
        and "## Goals" not in text
        and "| DMD LoRA | 1 |" in text
    )


def test_the_exported_lora_is_drawn_by_diffusers_alone(done: Done) -> None:
    """The script imports nothing from gdmd, and draws the images that gdmd's own source draws from the same seeds."""
    tree = list(ast.walk(ast.parse(Path(plain_diffusers.__file__).read_text())))
    named = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in tree if isinstance(node, ast.ImportFrom)}
    assert named == {"json", "sys", "pathlib", "torch", "diffusers"}
    folder = done.run("exported")
    source: Any = open_source(read_source(str(folder / "export")))
    call = json.loads((folder / "call.json").read_text())

    def second_caption() -> list[Any]:
        first = call["seed"] * plain_diffusers.SEEDS
        torch.manual_seed(first + 2 * len(call["captions"]) + 1)
        generators = [torch.Generator().manual_seed(first + place) for place in (2, 3)]
        made = source.pipe(call["captions"][1], num_images_per_prompt=2, generator=generators, **source.arguments)
        return [np.asarray(image, int) for image in made.images]

    drawn = [np.asarray(Image.open(folder / "images" / f"{place:05d}.png"), int) for place in (2, 3)]
    assert max(abs(own - other).max() for own, other in zip(second_caption(), drawn, strict=True)) <= 1
    source.pipe.transformer.disable_lora()
    assert max(abs(own - other).max() for own, other in zip(second_caption(), drawn, strict=True)) > 1


def test_initial_noise_and_re_noising_of_exported_images_have_different_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one seed for both, an image would be re-noised with the very noise that it started from."""
    seeds: list[int] = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, *given: Any, **options: Any) -> Pipeline:
            return cls()

        def __getattr__(self, name: str) -> Any:
            return lambda *given, **options: None

        def __call__(self, prompt: str, num_images_per_prompt: int, generator: list[torch.Generator]) -> Any:
            seeds.extend([torch.initial_seed(), *(one.initial_seed() for one in generator)])
            return argparse.Namespace(images=[Image.new("RGB", (1, 1))] * num_images_per_prompt)

    monkeypatch.setattr(plain_diffusers, "DiffusionPipeline", Pipeline)
    monkeypatch.setitem(plain_diffusers.SCHEDULERS, "LCMScheduler", Pipeline)
    info = {"without": [], "dtype": "fp32", "scheduler": "LCMScheduler", "arguments": {}}
    (tmp_path / "gdmd_export.json").write_text(json.dumps(info))
    for seed in (3, 4):
        call = {"base": "x", "captions": ["a ring", "a cross", "a ring"], "images": 2, "seed": seed}
        (tmp_path / "call.json").write_text(json.dumps(call))
        plain_diffusers.main(tmp_path, tmp_path / "call.json", tmp_path / "images")
    assert len(seeds) == 2 * 3 * (1 + 2) == len(set(seeds))


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("student: gdmd_lora}", "student: gdmd_full}", "does not train the LoRA of a pipeline"),
        ("student: gdmd_lora}", "student: gdmd}", "which is not one of the rows"),
        ("label: GDMD LoRA}", "label: GDMD LoRA, recipe: shapes_demo}", "which do not fit on one page"),
        ("rows: [teacher,", "rows: [exported,", "not a row of a teacher or student"),
        ("seeds: [3]", "seeds: [3]\nbudgets: [updates, passes]", "'gdmd_full': .* does not show the budget passes"),
    ],
)
def test_what_a_sweep_cannot_do_is_an_error(done: Done, before: str, after: str, reason: str) -> None:
    source = write_sweep(done.folder.parent, CONFIG.replace(before, after, 1))
    with pytest.raises(ConfigError, match=reason):
        read_sweep(source)


def test_a_changed_pipeline_is_another_run(tmp_path: Path) -> None:
    first = {run.hash for run in plan(read_sweep(write_sweep(tmp_path)))}
    torch.manual_seed(1)
    tiny.sd3().transformer.save_pretrained(tmp_path / "sd3" / "transformer")
    assert first.isdisjoint(run.hash for run in plan(read_sweep(str(tmp_path / "miniatures.yaml"))))


def test_another_scoring_decoder_or_other_real_images_are_other_runs(tmp_path: Path) -> None:
    """The folders keep their names; only their content changes."""
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    own = f"overrides: {{model.scoring_decoder: {decoder}, method.student_input: data, real_data.source: {tmp_path}, "
    source = write_sweep(tmp_path, f"{CONFIG}{own}real_data.latents: {tmp_path / 'latents'}}}\n")
    cfg = read_sweep(source).headline
    assert cfg.real_data is not None and isinstance(cfg.model, DiffusersModel)
    index = store_of(cfg.real_data, cfg.model).folder / "index.json"
    index.parent.mkdir(parents=True)
    found = []
    for weights, caption in ((b"one", "a ring"), (b"two", "a ring"), (b"one", "a disk"), (b"one", "a ring")):
        (decoder / "model.safetensors").write_bytes(weights)
        images = [{"image": "0", "caption": caption}]
        index.write_text(json.dumps({"source": [str(tmp_path)], "state": [""], "images": images}))
        found.append({run.name: run.hash for run in plan(read_sweep(source)) if "exported" not in run.name})
    students = [name for name in found[0] if "lora" in name or "full" in name]
    assert found[0] == found[3] and len(students) == 3
    assert all(len({own[name] for own in found}) == 3 for name in students)
