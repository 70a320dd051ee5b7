"""The Python API: what a trainer makes of its arguments, and a run with them from start to the stock pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from rich.console import Console

from gdmd import ConfigError, DistillationTrainer, DMD2Config, DMDConfig, GDMDConfig, RunError, TrainerCallback
from gdmd import TrainingConfig as Args
from gdmd.config.model import DiffusersModel
from gdmd.config.run import ShapesReward
from gdmd.config.shapes_pipeline import located
from gdmd.models.loading import adopt
from gdmd.programs.train import TrainSettings, _hints
from gdmd.recipes.inputs import check_inputs, check_start
from gdmd.recipes.objects import GivenObjects
from gdmd.recipes.read import read_recipe
from gdmd.rewards import OCR, CLIPScore, Composite, Part
from gdmd.runs.run_folder import create, read_facts, read_metrics

TINY = {
    "loop.batch_size": 4,
    "loop.log_every": 1,
    "loop.checkpoint_every": 1,
    "loop.threads": 1,
    "loop.lr_schedule": "constant",
    "validation.every": 0,
    "method.continuations": 2,
    "eval.per_task": 1,
    "eval.images": 1,
    "eval.teacher_steps": 2,
}
CAPTIONS = ["a red circle and a blue ring", "a blue square"]
ROWS = [{"prompt": CAPTIONS[0], "place": 1}, {"prompt": CAPTIONS[1], "teacher_prompt": "a red square", "place": 2}]


def red(images: Any, prompts: list[str], **columns: Any) -> Any:
    """Mean of the red channel."""
    assert set(prompts) <= set(CAPTIONS) and set(columns) <= {"place"}
    return images[:, 0].mean((1, 2))


def tiny(folder: Path, steps: int = 2, **more: Any) -> Args:
    overrides = TINY | more.pop("overrides", {})
    return Args(output_dir=folder, max_steps=steps, overrides=overrides, **more)


def test_recipe_from_family_method_and_arguments(tmp_path: Path) -> None:
    """A method's own fields win, then the arguments, then the recipe of the family."""
    args = Args(output_dir=tmp_path / "run", max_steps=7, learning_rate=1e-4, lora_rank=8, overrides={"loop.clip": 0.5})
    cfg = DistillationTrainer("shapes:sdxl", GDMDConfig(group_size=3), args=args).config
    assert (cfg.model.path, cfg.model.height) == ("shapes:sdxl", 32)
    assert (cfg.method.kind, cfg.method.group_size) == ("gdmd", 3)
    assert cfg.method.normalize is False  # of the recipe, for all methods
    assert (cfg.loop.steps, cfg.loop.lr_student, cfg.loop.clip, cfg.model.lora_rank) == (7, 1e-4, 0.5, 8)
    assert cfg.loop.lr_fake == 3e-3  # of the recipe


def test_method_of_the_family_preset(tmp_path: Path) -> None:
    """A hub model takes the preset of its family; the file list is in a folder, as a download would leave it."""
    cfg = DistillationTrainer("shapes", DMDConfig(fake_updates=2)).config
    assert (cfg.name, cfg.method.kind, cfg.method.fake_updates) == ("dmd", "dmd", 2)
    assert DistillationTrainer("shapes").config.name == "shapes_demo"
    assert DistillationTrainer("shapes", DMD2Config()).config.name == "dmd2"


def test_export_before_training(tmp_path: Path) -> None:
    trainer = DistillationTrainer("shapes:sdxl", train_dataset=CAPTIONS, args=tiny(tmp_path / "run"))
    for export in (trainer.save_lora, trainer.save_pretrained):
        with pytest.raises(RunError, match=r"run holds no run to export yet; call train\(\) first"):
            export(tmp_path / "out")


def test_all_mistakes_are_listed_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    args = Args(overrides={"loop.stepz": 3, "method.gamma": -1})
    with pytest.raises(ConfigError) as error:
        DistillationTrainer("shapes", args=args)
    assert "loop.stepz" in str(error.value) and "did you mean 'steps'" in str(error.value)
    assert "method.gamma" in str(error.value)
    args = Args(overrides={"loop.stepz": 3, "loop.clip": object()})
    with pytest.raises(ConfigError) as error:
        DistillationTrainer("shapes", reward_funcs=[3, CLIPScore, "nothing"], train_dataset=[{"text": 1}], args=args)
    said = (
        "type int cannot be called",
        "give an instance, CLIPScore()",
        "unknown kind",
        "train_dataset, ",
        "loop.stepz",
    )
    assert all(part in str(error.value) for part in (*said, "overrides: loop.clip: got <object object at"))
    with pytest.raises(ConfigError, match=r"max_step: got 3: unknown key; did you mean 'max_steps'"):
        Args(max_step=3)
    for name, meant in (
        ("num_train_epochs", "here this is max_steps (outer iterations"),
        ("per_device_train_batch_size", "did you mean 'per_device_batch_size'"),
        ("bf16", 'here this is overrides={"loop.precision": ...} (fp32 or bf16)'),
    ):
        with pytest.raises(ConfigError, match=re.escape(meant)):
            Args(**{name: 1})
    with pytest.raises(ConfigError, match="reads no rewards"):
        DistillationTrainer("shapes", DMDConfig(), reward_funcs=red)
    with pytest.raises(ConfigError, match=r"method: got 'gdmd': give a config object.*\nargs: got \{'max_steps': 3\}"):
        DistillationTrainer("shapes", "gdmd", args={"max_steps": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CLIPScore cannot be used as a reward; give an instance, CLIPScore\(\)"):
        DistillationTrainer("shapes", reward_funcs=CLIPScore)
    with pytest.raises(ConfigError, match="listed once, got \\[.red., .red.\\]"):
        DistillationTrainer("shapes", reward_funcs=[red, red])
    with pytest.raises(ConfigError, match="recipe sdxl_gdmd is for a model of kind diffusers, and model is 'shapes'"):
        DistillationTrainer("shapes", args=Args(recipe="sdxl_gdmd", overrides={"prompts.file": "p.txt"}))
    with pytest.raises(ConfigError) as error:
        DistillationTrainer(torch.nn.Linear(1, 1), reward_funcs=[3], train_dataset=[])  # type: ignore[arg-type]
    said = ("model: got Linear: give a hub id", "type int cannot be called", "train_dataset: has no prompts")
    assert all(part in str(error.value) for part in said)
    with pytest.raises(ConfigError, match="'shapes:sdx' is not a shipped pipeline; did you mean 'shapes:sdxl'"):
        DistillationTrainer("shapes:sdx")
    opened = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    with pytest.raises(
        ConfigError, match=r"model.student_lora: cannot be used with an open pipeline; give the teacher"
    ):
        DistillationTrainer(opened, args=Args(overrides={"model.student_lora": "org/lora"}))
    of_files = {"model.embeddings": "texts", "model.quantization": "int8", "model.t5": False, "model.variant": "fp16"}
    with pytest.raises(ConfigError) as error:  # they would have no effect, or be read from its folder instead
        DistillationTrainer(opened, args=Args(overrides=of_files))
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == list(of_files)
    with pytest.raises(ConfigError, match="student_input = data reads latents of the VAE in the model's files"):
        DistillationTrainer(opened, DMDConfig(student_input="data"))


def test_arguments_reach_the_recipe_as_they_are(tmp_path: Path) -> None:
    """These are strings with emoji and quotes, paths, and configs of rewards and methods."""
    texts = ("a \U0001f600 face", 'it\'s "a: b" # c')
    overrides = {
        "real_data": None,
        "name": "\U0001f600",
        "method": GDMDConfig(group_size=2),
        "rewards": [ShapesReward(kind="shapes_pref")],
    }
    args = Args(validation_prompts=texts, overrides={**overrides, "prompts.file": tmp_path / "p.txt"})
    cfg = DistillationTrainer("shapes", args=args).config
    assert cfg.validation.prompts == texts and cfg.name == "\U0001f600" and cfg.method == GDMDConfig(group_size=2)
    assert cfg.prompts.file == str(tmp_path / "p.txt") and [one.kind for one in cfg.rewards] == ["shapes_pref"]


def test_a_section_as_a_dict_is_refused() -> None:
    """It would reset the recipe's batch size, learning rates and other fields of the section, and max_steps."""
    args = Args(max_steps=7, overrides={"loop": {"clip": 0.5}})
    message = r"overrides: loop: got .'clip': 0.5.: this would reset .*give each field by its path, such as .loop.clip"
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer("shapes", args=args)


def test_networks_in_memory_are_not_replaced_by_published_ones() -> None:
    given = CLIPScore.from_modules(torch.nn.Linear(1, 1), None)
    for reward in (given, Composite([Part(given)]), OCR.from_modules(str)):
        with pytest.raises(ConfigError, match="was built from modules in memory.*give their folder as path"):
            DistillationTrainer("shapes:sdxl", reward_funcs=[reward])


def test_batch_of_devices_and_accumulation() -> None:
    args = Args(per_device_batch_size=4, gradient_accumulation_steps=3)
    assert args.recipe_values(world_size=2) == {"loop.micro_batch": 4, "loop.batch_size": 24}
    assert Args(per_device_batch_size=4).recipe_values() == {"loop.micro_batch": 4}
    with pytest.raises(ConfigError, match="counts passes of per_device_batch_size"):
        Args(gradient_accumulation_steps=3)


def test_train_resume_and_pipeline(tmp_path: Path) -> None:
    """Two steps, then two more in a new trainer, equal four at once; the student is a stock pipeline with four steps."""
    whole = DistillationTrainer("shapes:sdxl", None, ["shapes_clip", red], ROWS, tiny(tmp_path / "whole", 4))
    whole.train()
    DistillationTrainer("shapes:sdxl", None, ["shapes_clip", red], ROWS, tiny(tmp_path / "parts", 2)).train()
    again = DistillationTrainer("shapes:sdxl", None, ["shapes_clip", red], ROWS, tiny(tmp_path / "parts", 4))
    trained = again.train(resume_from_checkpoint=True)
    assert trained.end.step == 4
    one, other = (
        (tmp_path / name / "checkpoints" / "step_000004" / "student.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert one == other
    inputs = read_facts(tmp_path / "parts")["inputs"]
    assert inputs["prompts"]["given"] == "python:2 prompts" and inputs["rewards.1.source"]["given"] == "python:red"
    assert type(again.pipeline).__name__ == "StableDiffusionXLPipeline"
    draw = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    image = again.pipeline(CAPTIONS[0], **draw).images[0]
    assert image.shape == (3, 32, 32)
    files = again.save_lora(tmp_path / "lora")
    assert (tmp_path / "lora" / "README.md") in files
    config = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert config["rewards"][1]["kind"] == "function" and config["rewards"][1]["name"] == "red"


def test_run_with_python_objects_is_not_resumed_without_them(tmp_path: Path) -> None:
    """The command line has neither the function nor the prompts, and says so."""
    from gdmd.programs.train import resume_run

    DistillationTrainer("shapes", None, red, CAPTIONS, tiny(tmp_path / "run")).train()
    with pytest.raises(
        RunError, match=r"objects that its folder does not hold: prompts \(2 prompts\), rewards.0.source \(red\)"
    ):
        resume_run(tmp_path / "run", None, ["loop.steps=3"])
    other = DistillationTrainer("shapes", None, red, [*CAPTIONS, "a blue ring"], tiny(tmp_path / "run", 3))
    with pytest.raises(RunError, match="prompts: python:3 prompts"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match="--resume|resume"):
        DistillationTrainer("shapes", None, red, CAPTIONS, tiny(tmp_path / "run", 3)).train()


CALLS: list[int] = []


def failing(images: Any, prompts: list[str]) -> Any:
    """Fails in the third iteration of a run whose second one has a checkpoint."""
    CALLS.append(len(images))
    if len(CALLS) > 8:
        raise RuntimeError("no connection")
    return images[:, 0].mean((1, 2))


def repaired(images: Any, prompts: list[str]) -> Any:
    """The same, repaired."""
    return images[:, 0].mean((1, 2))


def test_resume_without_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start a new run each time. A second call of the same trainer knows its run."""
    monkeypatch.chdir(tmp_path)
    trainer = DistillationTrainer("shapes", None, red, CAPTIONS, Args(max_steps=1, overrides=TINY))
    with pytest.raises(ConfigError, match="got True without args.output_dir.*set output_dir"):
        trainer.train(resume_from_checkpoint=True)
    assert not list(tmp_path.iterdir())
    trainer.train()
    assert trainer.train(resume_from_checkpoint=True).end.step == 1 and len(list(Path("runs").iterdir())) == 1


def test_only_rank_0_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script under torchrun calls these on every rank; all ranks would write the same files at the same time."""
    trainer = DistillationTrainer("shapes:sdxl", None, ["shapes_clip"], CAPTIONS, tiny(tmp_path / "run", 1))
    trainer.train()
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    trainer.save_pretrained(tmp_path / "merged")
    assert trainer.save_lora(tmp_path / "lora") == [] and trainer.push_to_hub("me/lora") == ""
    assert not (tmp_path / "merged").exists() and not (tmp_path / "lora").exists()
    monkeypatch.setenv("RANK", "0")
    assert trainer.save_lora(tmp_path / "lora")


def test_a_repaired_reward_function_is_accepted_from_python(tmp_path: Path) -> None:
    """The command line cannot continue a run with a Python object, so the errors name the arguments of the trainer."""
    with pytest.raises(
        ValueError, match=r"train\(resume_from_checkpoint=True\) \(add accept_changes=True if you change"
    ):
        DistillationTrainer("shapes", None, failing, CAPTIONS, tiny(tmp_path / "run", 4)).train()
    repaired.__name__ = "failing"
    again = DistillationTrainer("shapes", None, repaired, CAPTIONS, tiny(tmp_path / "run", 4))
    with pytest.raises(
        RunError, match="To continue with the new content, give train\\(accept_changes=True\\)"
    ) as refused:
        again.train(resume_from_checkpoint=True)
    assert "gdmd train" not in str(refused.value)
    assert again.train(resume_from_checkpoint=True, accept_changes=True).end.step == 4
    assert [one["input"] for one in read_facts(tmp_path / "run")["changes"]] == ["rewards.0.source"]


def test_resume_from_a_path_is_refused(tmp_path: Path) -> None:
    """transformers accepts a checkpoint's path there; here it would count as True."""
    trainer = DistillationTrainer("shapes", None, red, CAPTIONS, tiny(tmp_path / "run", 1))
    with pytest.raises(
        ValueError, match="resume_from_checkpoint: got 'run/checkpoints/step_000001', but a run continues"
    ):
        trainer.train("run/checkpoints/step_000001")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_open_pipeline(tmp_path: Path) -> None:
    """An open pipeline, whose weights differ from those on disk, is what is trained, resumed and exported."""

    def opened() -> Any:
        pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.01)  # as a fused LoRA would
        return pipe

    def trainer(pipe: Any, steps: int) -> DistillationTrainer:
        return DistillationTrainer(pipe, None, ["shapes_clip"], CAPTIONS, tiny(tmp_path / "run", steps))

    def image(pipe: Any) -> Any:
        noise = torch.Generator().manual_seed(1)
        return pipe(CAPTIONS[0], num_inference_steps=2, height=32, width=32, generator=noise, output_type="np").images

    given = opened()
    before = image(given)
    first = trainer(given, 1)
    first.train()
    assert (image(given) == before).all(), "the base pipeline draws with an adapter after the training"
    assert first.train(resume_from_checkpoint=True).end.step == 1  # as after Ctrl-C in a notebook
    second = trainer(opened(), 2)
    assert second.train(resume_from_checkpoint=True).end.step == 2
    unchanged = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    with pytest.raises(RunError, match="model.path: "):
        trainer(unchanged, 3).train(resume_from_checkpoint=True)
    other = opened()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.02)
    with pytest.raises(RunError, match=r"model.path.settings: EulerDiscreteScheduler has different content"):
        trainer(other, 3).train(resume_from_checkpoint=True)
    second.save_pretrained(tmp_path / "merged")
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    kept = (
        second.pipeline.unet.conv_out.get_base_layer().weight
        if hasattr(second.pipeline.unet.conv_out, "get_base_layer")
        else None
    )
    assert torch.allclose(merged.unet.time_embedding.linear_1.bias, opened().unet.time_embedding.linear_1.bias)
    assert kept is None or torch.isfinite(kept).all()


def test_next_steps_of_a_pipeline_built_in_memory_name_its_folder() -> None:
    loaded = DiffusersModel.model_construct(path="base")
    cfg = DistillationTrainer("shapes:sdxl", None, ["shapes_clip"]).config
    built = cfg.model_copy(update={"model": loaded.model_copy(update={"path": "python:FluxPipeline"})})
    assert _hints(built, "run") == [
        "the base pipeline exists only in memory: save it to a FOLDER, which the next commands need",
        "score the student with: gdmd eval preference run,base=FOLDER --prompts FILE --scorer clip",
        "export it for diffusers with: gdmd export run --base FOLDER",
    ]
    loaded_hints = _hints(cfg.model_copy(update={"model": loaded}), "run")
    assert [hint.split(": ")[1] for hint in loaded_hints] == [
        "gdmd eval preference run --prompts FILE --scorer clip",
        "gdmd export run",
    ]


def test_second_stage_of_an_open_pipeline_needs_the_same_one(tmp_path: Path) -> None:
    """The files of both are the same; the first run recorded the weights in memory."""

    def given(scale: float) -> GivenObjects:
        pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
        pipe.unet.conv_in.weight.data.mul_(scale)
        return GivenObjects(pipe)

    first = DistillationTrainer(given(1.0).pipeline, None, ["shapes_clip"]).config
    check_inputs(first, create(tmp_path / "run", first.model_dump(mode="json")), Console(quiet=True), given=given(1.1))
    second = first.model_copy(update={"loop": first.loop.model_copy(update={"start_from": str(tmp_path / "run")})})
    check_start(second, given=given(1.1))
    with pytest.raises(RunError, match="trained on another base model. model.path: python:.*has different content"):
        check_start(second, given=given(1.2))


def test_open_pipeline_with_a_lora_that_is_not_fused_is_refused(tmp_path: Path) -> None:
    """Only one adapter is active at a time, so the teacher would differ from the pipeline that was given."""
    pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "style")
    trainer = DistillationTrainer(pipe, None, ["shapes_clip"], CAPTIONS, tiny(tmp_path / "run", 1))
    with pytest.raises(
        ValueError, match=r"has a LoRA in unet as separate adapters.*fuse_lora\(\) and then unload_lora"
    ):
        trainer.train()
    assert not (tmp_path / "run").exists()
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    trainer.train()


def test_offloaded_open_pipeline_is_refused() -> None:
    """The weights that training reads are on the meta device, or leave the GPU between two calls."""
    pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    cfg = DistillationTrainer(pipe).config.model
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"offloads .*unet.* to the CPU.*remove_all_hooks\(\)"):
        adopt(pipe, cfg)
    pipe.remove_all_hooks()
    assert next(adopt(pipe, cfg).net.parameters()).device.type == "cpu"


def test_open_pipeline_with_a_compiled_network_is_refused(tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(
        ValueError, match="unet of the given StableDiffusionXLPipeline is compiled.*set model.compile=true"
    ):
        DistillationTrainer(pipe, None, ["shapes_clip"], CAPTIONS, tiny(tmp_path / "run", 1)).train()


def test_open_pipeline_of_another_training(tmp_path: Path) -> None:
    """The adapters of the earlier training are removed, as when a run is tried again in one process."""
    pipe = StableDiffusionXLPipeline.from_pretrained(located("shapes:sdxl"), dtype=torch.float32)
    for run in ("first", "second"):
        args = tiny(tmp_path / run, 1, lora_target_modules=("to_q", "to_v"))
        DistillationTrainer(pipe, None, ["shapes_clip"], CAPTIONS, args).train()
    one, other = (tmp_path / run / "checkpoints/step_000001/student.safetensors" for run in ("first", "second"))
    assert one.read_bytes() == other.read_bytes()


class Stop(TrainerCallback):
    """Stops after the first step."""

    def on_step_end(self, state: Any) -> None:
        state.should_stop = True


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process would mix its rows with those of the first; it is refused even before the first checkpoint."""
    run, command = tmp_path / "run", [sys.executable, "-m", "gdmd", "train"]
    fast = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("method")]

    class SecondProcess(TrainerCallback):
        said: list[str] = []

        def on_step_end(self, state: Any) -> None:
            again = (
                ["--resume", str(run)]
                if state.step == 2
                else ["shapes_smoke", "--run", str(run), *fast, "loop.steps=2"]
            )
            done = subprocess.run([*command, *again], capture_output=True, text=True)
            self.said.append(f"{done.returncode} {done.stderr}")

    cfg = read_recipe("shapes_smoke", [*fast, "loop.steps=2"])
    trainer = DistillationTrainer.from_recipe(cfg, run, TrainSettings(callbacks=(SecondProcess(),), evaluation=False))
    trainer.train()
    assert len(read_metrics(run)) == 2
    held = f"error: {run} is being trained by another process"
    assert len(SecondProcess.said) == 2 and all(one.startswith("2 ") and held in one for one in SecondProcess.said)
    assert trainer.train(resume_from_checkpoint=True).end.step == 2  # the lock is released


@pytest.mark.parametrize("given", [Stop(), [Stop], [print], None])
def test_callbacks_are_a_list_of_objects(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks: got .*: give a list of TrainerCallback objects"):
        DistillationTrainer("shapes", None, red, CAPTIONS, tiny(tmp_path / "run"), callbacks=given)


def test_a_gpu_that_does_not_exist_is_reported_with_the_other_mistakes(tmp_path: Path) -> None:
    args = tiny(tmp_path / "run", device="cuda:99", overrides={"loop.best_metric": "reward/tagret"})
    with pytest.raises(ValueError, match="device cuda:99.*CUDA GPUs") as error:
        DistillationTrainer("shapes", None, red, CAPTIONS, args).train()
    assert "loop.best_metric" in str(error.value) and not (tmp_path / "run").exists()


def test_callback_stops_the_run(tmp_path: Path) -> None:
    args = tiny(tmp_path / "run", 5)
    assert DistillationTrainer("shapes", None, red, CAPTIONS, args, callbacks=[Stop()]).train().end.step == 1
