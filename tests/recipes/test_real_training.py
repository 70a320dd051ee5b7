"""Distilling tiny real pipelines: what moves, what is saved, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny
from diffusers import AutoencoderKL, AutoencoderTiny
from ranks import apart, linear_steps
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from gdmd.config.image_source import read_source
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.rewards import CompositeConfig
from gdmd.config.run import RunConfig
from gdmd.config.training import LoopConfig
from gdmd.config.validation import ValidationConfig
from gdmd.io import RunError
from gdmd.models.roles import DiffusersRoles
from gdmd.programs.decoder_check import check_decoder
from gdmd.programs.export import export_run
from gdmd.programs.train import TrainSettings, create_run, prepare
from gdmd.recipes.build import Components, build
from gdmd.recipes.build_rewards import reward_stats
from gdmd.recipes.objects import PYTHON, GivenObjects
from gdmd.runs.run_folder import Run, create, read_facts, read_metrics
from gdmd.runs.student_file import EXPORT_FILE
from gdmd.sources.draw import draw
from gdmd.student import load_student
from gdmd.training.loop import train
from gdmd.types import PromptBatch

FAST: dict[str, Any] = {"log_every": 1, "checkpoint_every": 1, "threads": 1, "ema": 0.9}


def brightness(images: Tensor, prompts: PromptBatch) -> Tensor:
    """A reward: the mean of the red channel."""
    return images[:, 0].mean((1, 2))


def recipe(folders: Path, name: str, steps: int, method: Any = None, **model: Any) -> RunConfig:
    prompts = folders / "prompts.txt"
    prompts.write_text("\n".join(tiny.WORDS))
    return RunConfig(
        name="tiny",
        model=tiny.config(tiny.saved(folders, name), **model),
        method=method or DMDConfig(fake_updates=2, guidance=3.0, step_draw="batch"),
        loop=LoopConfig(steps=steps, batch_size=2, lr_student=1e-2, lr_fake=1e-2, **FAST),
        prompts={"file": str(prompts)},
        rewards=[{"kind": "callable", "target": "test_real_training:brightness"}],
        validation={"every": 0},
        eval={"teacher_steps": 2},
    )


def trained(cfg: RunConfig, folder: Path) -> tuple[Components, Run]:
    components, run = build(cfg, "cpu"), create(folder, cfg.model_dump(mode="json"))
    train(components.method, components.roles, components.stream, cfg.loop, run)
    return components, run


def frozen_part(components: Components) -> dict[str, Tensor]:
    net = components.roles.backbone.net
    return {name: weights.detach().clone() for name, weights in net.named_parameters() if not weights.requires_grad}


@pytest.mark.parametrize(("name", "kind"), [("sd3", "dmd"), ("sdxl", "gdmd")])
def test_only_adapters_move(folders: Path, tmp_path: Path, name: str, kind: str) -> None:
    own = {"group_size": 2, "guidance": 3.0, "step_draw": "batch"}
    cfg = recipe(folders, name, 2, GDMDConfig(**own) if kind == "gdmd" else None)
    components, run = build(cfg, "cpu"), create(tmp_path / "run", cfg.model_dump(mode="json"))
    before = frozen_part(components)
    moved = {
        k: v.detach().clone() for role in ("student", "fake") for k, v in components.roles.parameters(role).items()
    }
    train(components.method, components.roles, components.stream, cfg.loop, run)
    after = frozen_part(components)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for role in ("student", "fake"):
        ups = {k: v for k, v in components.roles.parameters(role).items() if "lora_B" in k}
        assert all(weights.isfinite().all() for weights in ups.values())
        assert sum(not torch.equal(weights, moved[k]) for k, weights in ups.items()) > len(ups) / 2
    (checkpoint,) = [path for path in run.checkpoints.iterdir() if path.name.endswith("000002")]
    saved = load_file(checkpoint / "student.safetensors")
    assert saved.keys() == components.roles.parameters("student").keys()
    backbone = sum(weights.numel() for weights in before.values()) * 4  # bytes in fp32
    assert (checkpoint / "student.safetensors").stat().st_size < backbone / 3


@pytest.mark.parametrize(("name", "full"), [("sd3", "none"), ("sana", "both")])
def test_resume_is_bit_exact(folders: Path, tmp_path: Path, name: str, full: str) -> None:
    whole, _ = trained(recipe(folders, name, 2, full=full), tmp_path / "whole")
    _, run = trained(recipe(folders, name, 1, full=full), tmp_path / "halves")
    cfg = recipe(folders, name, 2, full=full)
    halves = build(cfg, "cpu")
    train(halves.method, halves.roles, halves.stream, cfg.loop, run)
    for role in ("student", "fake"):
        wanted, found = (components.roles.parameters(role) for components in (whole, halves))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_full_weights_train_as_copies(folders: Path, tmp_path: Path) -> None:
    components, _ = trained(recipe(folders, "sd3", 1, full="both"), tmp_path / "run")
    teacher = dict(components.roles.backbone.net.named_parameters())
    student = components.roles.parameters("student")
    assert student.keys() == teacher.keys()
    assert sum(not torch.equal(student[key], teacher[key]) for key in student) > len(student) / 2


def test_student_steps_are_shifted(folders: Path) -> None:
    components = build(recipe(folders, "sd3", 1), "cpu")
    assert components.method.cfg.student_steps == pytest.approx((1, 0.9, 0.75, 0.5))  # type: ignore[attr-defined]
    assert len(components.teacher_times(5)) == 6


def test_missing_data_is_refused(folders: Path) -> None:
    cfg = recipe(folders, "sd3", 1)
    with pytest.raises(ValueError, match=r"prompts.file is not set"):
        build(cfg.model_copy(update={"prompts": type(cfg.prompts)()}))
    with pytest.raises(ValueError, match="student_input = data needs real images"):
        build(recipe(folders, "sd3", 1, DMDConfig(student_input="data")))


def interrupted(*_: Any, **__: Any) -> None:
    """In place of a function in which Ctrl-C is pressed."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "guidance"), [("flux2", 3.5)])
def test_grids_samples_and_exports(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, guidance: float
) -> None:
    cfg, prompts = recipe(folders, name, 1), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny.WORDS))
    scorer = {"kind": "callable", "target": "test_real_training:brightness"}
    validation = ValidationConfig(every=1, images=2, scorers=(scorer,))  # the prompts: the shipped set
    parts = {"validation": validation, "prompts": type(cfg.prompts)(file=str(prompts))}
    cfg = cfg.model_copy(update=parts)
    done = create_run(cfg, tmp_path / "run", ["gdmd", "train"], TrainSettings(Console(quiet=True), evaluation=True))
    assert done.evaluation is None and done.report == tmp_path / "run" / "report.html"
    assert len(list((tmp_path / "run" / "grids").iterdir())) == 3
    rows = read_metrics(tmp_path / "run")
    assert [0 < row["validation/test_real_training:brightness"] < 1 for row in rows] == [True, True]
    prompts.unlink()
    monkeypatch.setattr("gdmd.recipes.build.build_rewards", None)  # who draws needs none of them
    assert draw(read_source(str(tmp_path / "run")), ["two red dogs"], 2, 0, tmp_path / "a.png", 4) > 0
    lora = export_run(tmp_path / "run")
    images = ["step_000001.png"]
    names = ["pytorch_lora_weights.safetensors", "scheduler", *images, EXPORT_FILE, "README.md"]
    assert [file.name for file in lora] == names
    card = lora[-1].read_text()
    for part in (
        "`base_model`: the hub id of",
        f"guidance_scale={guidance}",
        "sigmas=[1.0, 0.75, 0.5, 0.25]",
        "`license`: that of",
        "```sh\ngdmd train\n```",
    ):
        assert part in card
    (tmp_path / "run" / "export" / "images" / "step_000009.png").touch()  # as if a later step was exported before
    export_run(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "export" / "images").iterdir()] == images
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("gdmd.programs.export.model_card", interrupted)
        export_run(tmp_path / "run")
    assert not (tmp_path / "run" / "export" / EXPORT_FILE).exists()  # of the earlier export, with new weights
    with pytest.raises(ValueError, match="export holds a LoRA, and this export is a merged pipeline; choose"):
        export_run(tmp_path / "run", tmp_path / "run" / "export", merged=True)
    merged = export_run(tmp_path / "run", tmp_path / "whole", merged=True)
    assert (merged[0] / "model_index.json").is_file()
    with pytest.raises(ValueError, match="whole holds a merged pipeline, and this export is a LoRA; choose"):
        export_run(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "whole" / EXPORT_FILE).write_text("{")
    with pytest.raises(RunError, match=rf"cannot read .*{EXPORT_FILE}.*Choose another folder"):
        export_run(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "step_000009.png").touch()  # not of an export
    export_run(tmp_path / "run", tmp_path / "mine")
    assert len(list((tmp_path / "mine" / "images").iterdir())) == 2


@pytest.mark.parametrize("name", ["sdxl"])
def test_cached_embeddings_train_the_same_student(folders: Path, tmp_path: Path, name: str) -> None:
    """The encoders read captions in batches of another size, so that an embedding is another one by its rounding."""
    cfg = recipe(folders, name, 1, embeddings=str(tmp_path / "embeddings"))
    components = prepare(cfg)
    assert components.roles.family.pipe.text_encoder is None
    begun = build(cfg, "cpu")
    with linear_steps():
        live, _ = trained(recipe(folders, name, 1), tmp_path / "live")
        train(
            components.method,
            components.roles,
            components.stream,
            cfg.loop,
            create(tmp_path / "run", cfg.model_dump(mode="json")),
        )
    weights = ({k: v.detach() for k, v in one.roles.parameters("student").items()} for one in (live, components, begun))
    assert apart(*weights) < 1e-3


def test_teacher_prompts_are_embedded_before_training(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are cached and checked for their length, and then the encoders are unloaded."""
    better = "very " * 100 + "good"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a blue ring", "teacher_prompt": better}))
    cfg = recipe(folders, "sd3", 1, embeddings=str(tmp_path / "embeddings"))
    cfg = cfg.model_copy(update={"prompts": cfg.prompts.model_copy(update={"file": str(tmp_path / "p.jsonl")})})
    components = prepare(cfg)
    assert better in components.encoder and components.encoder.encoder is None  # type: ignore[operator, attr-defined]
    assert "1 of 2 prompts are longer" in caplog.text
    run = create(tmp_path / "run", cfg.model_dump(mode="json"))
    train(components.method, components.roles, components.stream, cfg.loop, run)
    batch = components.stream.at(0)
    pairs = [(batch.cond[name], batch.real_cond[name]) for name in batch.cond]
    assert all(own.shape == other.shape for own, other in pairs) and not all(torch.equal(*pair) for pair in pairs)


def test_cached_embeddings_load_no_encoder(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a text encoder was loaded")

    cfg = recipe(folders, "sd3", 1, embeddings=str(tmp_path / "embeddings"))
    prepare(cfg)
    (tmp_path / "more.txt").write_text("\n".join((*tiny.WORDS, "a new one")))
    more = cfg.model_copy(update={"prompts": cfg.prompts.model_copy(update={"file": str(tmp_path / "more.txt")})})
    for kind in (CLIPTextModelWithProjection, T5EncoderModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    components = prepare(cfg)
    train(
        components.method,
        components.roles,
        components.stream,
        cfg.loop,
        create(tmp_path / "run", cfg.model_dump(mode="json")),
    )
    parts = components.roles.family.pipe.components
    assert [parts[name] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")] == [None] * 3
    with pytest.raises(AssertionError, match="a text encoder was loaded"):
        prepare(more)
    monkeypatch.undo()
    assert "a new one" in prepare(more).encoder  # type: ignore[operator]


def test_embedding_reports_progress_and_a_full_disk(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    cfg = recipe(folders, "sd3", 1, embeddings=str(tmp_path / "embeddings"))
    with monkeypatch.context() as patch, pytest.raises(RunError) as found:
        patch.setattr("safetensors.torch.save_file", full)
        prepare(cfg)
    assert "cannot write the text embeddings" in str(found.value) and "No space left" in str(found.value)
    assert "Free some disk space, or choose another folder with model.embeddings." in str(found.value)
    for told in (True, False):
        prepare(cfg, TrainSettings(Console(file=(said := io.StringIO()), width=400)))
        assert (f"encoding {len(tiny.WORDS)} prompts once into {tmp_path}" in said.getvalue()) == told


def test_scoring_decoder_decodes_for_rewards_only(folders: Path, tmp_path: Path) -> None:
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**shape, **blocks).save_pretrained(tmp_path / "taesd")
    components = build(recipe(folders, "sd3", 1, GDMDConfig(), scoring_decoder=str(tmp_path / "taesd")), "cpu")
    codec = components.method.scorer.codec  # type: ignore[attr-defined]
    assert type(codec.vae) is AutoencoderTiny and type(components.codec.vae) is AutoencoderKL  # type: ignore[attr-defined]
    assert codec.decode(torch.randn(2, *components.latent_shape)).shape == (2, 3, tiny.SIZE, tiny.SIZE)
    AutoencoderTiny(**(shape | {"latent_channels": 16}), **blocks).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="decodes 16 channels, but latents of sd3 have 4"):
        build(recipe(folders, "sd3", 1, scoring_decoder=str(tmp_path / "other")), "cpu")


def test_scoring_decoder_is_compared_with_the_vae(folders: Path, tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        latent_channels=4,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")
    own = GDMDConfig(group_size=2, guidance=3.0, step_draw="batch")
    cfg = recipe(folders, "sd3", 1, own, scoring_decoder=str(tmp_path / "taesd"), scoring_check=2)
    cfg = cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"teacher_steps": 2})})
    said, run = io.StringIO(), tmp_path / "run"
    create_run(cfg, run, ["test"], TrainSettings(Console(file=said, width=200), evaluation=False))
    file = run / "scoring_decoder.json"
    (row,) = json.loads(file.read_text())["rewards"]
    assert row["images"] == 2 and row["difference"] == pytest.approx(row["rough"] - row["full"])
    assert row["difference"] != 0 and f"brightness: {row['difference']:+.4g} on 2 images" in said.getvalue()
    before = file.stat().st_mtime_ns
    check_decoder(cfg, build(cfg, "cpu"), run, Console(file=said))
    assert file.stat().st_mtime_ns == before
    export_run(run)
    card = (run / "export" / "README.md").read_text()
    assert "| decoder for rewards | taesd; " in card and f"{row['difference']:+.4g} on 2 images" in card
    weights = next((tmp_path / "taesd").glob("*.safetensors"))
    save_file({name: 0.5 * value for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    check_decoder(cfg, build(cfg, "cpu"), run, Console(file=said))
    (again,) = json.loads(file.read_text())["rewards"]
    assert again["rough"] != row["rough"] and again["full"] == pytest.approx(row["full"])


def test_check_of_the_decoder_counts_in_no_statistics(folders: Path, tmp_path: Path) -> None:
    """Also of an open pipeline that was loaded from nowhere."""
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    AutoencoderTiny(**shape, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "taesd")
    part = {"reward": {"kind": "callable", "target": "test_real_training:brightness"}}
    own = GDMDConfig(group_size=2, guidance=3.0, step_draw="batch")
    cfg = recipe(folders, "sd15", 1, own, scoring_decoder=str(tmp_path / "taesd"), scoring_check=2)
    model = cfg.model.model_copy(update={"path": f"{PYTHON}StableDiffusionPipeline"})
    changes = {"rewards": (CompositeConfig.model_validate({"parts": [part]}),), "model": model}
    cfg, given = cfg.model_copy(update=changes), GivenObjects(tiny.sd15())
    components = build(cfg, "cpu", given)
    check_decoder(cfg, components, tmp_path, Console(file=io.StringIO()), given)
    assert (tmp_path / "scoring_decoder.json").is_file() and not reward_stats(components.rewards)


def test_moved_base_and_precisions(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, moved, run = tmp_path / "base", tmp_path / "lr=1e-4, moved", tmp_path / "run"
    cfg = recipe(folders, "sd3", 1, dtype="bf16")
    shutil.copytree(folders / "sd3", base)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(base)})})
    create_run(cfg, run, ["gdmd", "train"], TrainSettings(Console(quiet=True), evaluation=False))
    base.rename(moved)
    with pytest.raises(ValueError, match="there is no such folder.*give its new location with --base"):
        export_run(run)
    with pytest.raises(ValueError, match="there is no such folder.*give its new location with base=FOLDER"):
        load_student(run)
    with pytest.raises(ValueError, match="there is no such folder.*,base=FOLDER"):
        draw(read_source(str(run)), ["two red dogs"], 1, 0, tmp_path / "a.png", 1)
    files = export_run(run, base=str(moved))
    assert (
        json.loads((run / "export" / EXPORT_FILE).read_text())["base"] == str(moved)
        and str(moved) in files[-1].read_text()
    )
    for number, where in enumerate((run, run / "export")):
        source = read_source(f'{where},base="{moved}"')
        assert draw(source, ["two red dogs"], 1, 0, tmp_path / f"{number}.png", 1) > 0
        pipe = load_student(where, base=str(moved), dtype=torch.float32, device="cpu")
        assert pipe.dtype == torch.float32 and pipe("two red dogs").images[0].size == (tiny.SIZE, tiny.SIZE)
    for dtype in ("bf16", "fp32"):
        caplog.clear()
        export_run(run, tmp_path / dtype, merged=True, base=str(moved), dtype=dtype)
        facts = json.loads((tmp_path / dtype / EXPORT_FILE).read_text())
        assert facts["dtype"] == dtype and (facts["undone_by_rounding"] > 0) == (dtype == "bf16")
        said = f"rounding to bf16 loses the change of {100 * facts['undone_by_rounding']:.1f} % of the weights"
        assert (said in caplog.text) == (dtype == "bf16") and "should be kept in float32" not in caplog.text
        kinds = {
            weights.dtype for file in (tmp_path / dtype).rglob("*.safetensors") for weights in load_file(file).values()
        }
        assert kinds - {torch.int64} == {getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype])}
    with pytest.raises(ValueError, match="--dtype applies to a merged pipeline only"):
        export_run(run, base=str(moved), dtype="fp32")


def test_another_base_model_is_refused_or_reported(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, copy, run = tmp_path / "base", tmp_path / "copy", tmp_path / "run"
    cfg = recipe(folders, "sd3", 1)
    for place in (base, copy):
        shutil.copytree(folders / "sd3", place)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": str(base)})})
    create_run(cfg, run, ["gdmd", "train"], TrainSettings(Console(quiet=True), evaluation=False))
    export_run(run, base=str(copy))
    source = read_source(f"{run / 'export'},base={copy}")
    assert draw(source, ["a"], 1, 0, tmp_path / "a.png", 1) > 0 and "another base model" not in caplog.text
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: 0.5 * value for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="^--base: the student of .* another base model. model.path: .* different content"
    ):
        export_run(run, base=str(copy))
    with pytest.raises(ValueError, match="^base=FOLDER: the student of .* another base model"):
        load_student(run, base=str(copy))
    with pytest.raises(ValueError, match=",base=FOLDER: the student of .* was trained on another base model"):
        draw(read_source(f"{run},base={copy}"), ["a"], 1, 0, tmp_path / "a.png", 1)
    draw(source, ["a"], 1, 0, tmp_path / "a.png", 1)
    assert "trained on another base model" in caplog.text
    caplog.clear()
    shutil.rmtree(base)
    copy.rename(base)
    export_run(run)
    assert "may not fit its base model. model.path: " in caplog.text and "has different content" in caplog.text
    caplog.clear()
    (run / "run.json").write_text(json.dumps({k: v for k, v in read_facts(run).items() if k != "inputs"}))
    export_run(run)
    assert "base model" not in caplog.text  # an old run in its own place
    export_run(run, base=str(base))
    assert "recorded no fingerprint of its base model" in caplog.text


@pytest.mark.parametrize("umask", [0o027])
def test_file_modes_follow_umask(folders: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = tmp_path / "run"
        cfg = recipe(folders, "sdxl", 1, embeddings=str(tmp_path / "embeddings"))
        create_run(cfg, run, ["gdmd", "train"], TrainSettings(Console(quiet=True), evaluation=False))
        export_run(run)
        export_run(run, merged=True)
    finally:
        os.umask(before)
    files = [file for file in (*run.rglob("*"), *(tmp_path / "embeddings").rglob("*")) if file.is_file()]
    assert {file.suffix for file in files} >= {".safetensors", ".json", ".yaml", ".md"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}


def test_shapes_rewards_are_refused(folders: Path) -> None:
    cfg = recipe(folders, "sd3", 1, GDMDConfig()).model_dump(mode="json")
    with pytest.raises(ValueError, match="judge captions of the Shapes world"):
        RunConfig.model_validate(cfg | {"rewards": [{"kind": "shapes_clip"}]})


def test_shapes_runs_are_not_exported(tmp_path: Path) -> None:
    cfg = RunConfig(name="shapes", loop=LoopConfig())
    create(tmp_path / "run", cfg.model_dump(mode="json"))
    with pytest.raises(ValueError, match="is a run of the Shapes world"):
        export_run(tmp_path / "run")


def test_compile_applies_to_training_only(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DiffusersRoles] = []
    monkeypatch.setattr(DiffusersRoles, "compile", lambda roles: asked.append(roles))
    cfg = recipe(folders, "sd3", 1, compile=True)
    build(cfg, "cpu")
    prepare(recipe(folders, "sd3", 1))
    assert asked == []
    components = prepare(cfg)
    assert asked == [components.roles]
