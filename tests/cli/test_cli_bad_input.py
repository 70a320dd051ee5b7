"""Bad input gives one error on stderr, exit code 2, no traceback and no partial files."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_world import Finished, Gdmd, folder_state

from gdmd.cli.app import main


def refused(finished: Finished, *parts: str) -> None:
    """The assertions that every bad input shares."""
    assert finished.code == 2, finished.err
    assert finished.out == "", "stdout is for results"
    errors = [line for line in finished.err.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1, finished.err
    assert "Traceback" not in finished.err
    for word in parts:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "shapes_smok"], ["unknown recipe", "did you mean 'shapes_smoke'"]),
        (["train", "shapes_smoke", "method.gama=1"], ["method.gama", "did you mean 'gamma'"]),
        (["train", "shapes_smoke", "loop.steps=many"], ["loop.steps", "many"]),
        (["train", "shapes_smoke", "loop.micro_batch=5"], ["micro_batch = 5", "does not divide batch_size = 16"]),
        (["train", "shapes_smoke", "method.group_size=0"], ["method.group_size"]),
        (["train", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["train"], ["no recipe was named"]),
        (["recipes", "nosuch"], ["unknown recipe 'nosuch'"]),
        (["train", "--resume", "nowhere"], ["nowhere", "not a run folder"]),
        (["eval", "nowhere"], ["nowhere", "not a run folder"]),
        (["report", "nowhere"], ["nowhere", "not a run folder"]),
        (["sample", "nowhere", "-p", "a ring"], ["source nowhere: it does not exist", "Give a run folder"]),
        (["sample", "teacher", "-p", "a ring", "-o", "images.jpg"], ["images.jpg", ".png"]),
        (["sample", "teacher", "-p", "a dog"], ["unknown word 'dog'"]),
        (["sample", "r,checkpoint=1", "-p", "a ring", "--checkpoint", "last"], ["checkpoint=1", "--checkpoint last"]),
        (["eval", "geneval", "generate", "o/m,steps=4", "--metadata=m", "-o=i", "--steps=8"], ["steps=4", "--steps 8"]),
        (["train", "shapes_smoke", "prompts.file=nothing.txt"], ["nothing.txt", "cannot be read"]),
        (["train", "shapes_smoke", "model.teacher=gone.safetensors"], ["gone.safetensors", "missing"]),
        (["pretrain", "vae", "--kind", "shapes_clip"], ["--kind"]),
        (["pretrain", "vae", "sd3"], ["'sd3'", "vae"]),
        (["pretrain", "pipeline"], ["got none", "sdxl"]),
        (["pretrain", "pipeline", "sd35"], ["'sd35'", "sd3, sdxl or flux2_klein"]),
        (["pretrain", "scorers", "--kind", "clip"], ["unknown scorer", "shapes_clip"]),
    ],
)
def test_bad_arguments(gdmd: Gdmd, arguments: list[str], parts: list[str]) -> None:
    refused(gdmd(*arguments), *parts)
    assert not list(gdmd.folder.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ["is empty"]),
        ("gap.txt", b"a ring\n\na red dog\n", ["line 3", "a red dog"]),
        ("header.csv", b"a ring\na cross\n", ["line 1", "no column", "prompts.column"]),
        ("list.yaml", b"prompts:\n  - a ring\n", ["unknown extension '.yaml'", ".csv"]),
        ("latin.txt", b"a ring\n\xff\xfe\n", ["not UTF-8"]),
        ("broken.jsonl", b'{"prompt": "a ring"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ("keys.jsonl", b'{"text": "a ring"}\n', ["line 1", '"prompt"']),
        ("dog.txt", b"a ring\na red dog\n", ["line 2", "a red dog"]),
        ("dog.csv", b"prompt,teacher_prompt\na ring,a red dog\n", ["line 2", "a red dog"]),
    ],
)
def test_malformed_prompt_files(gdmd: Gdmd, name: str, content: bytes, parts: list[str]) -> None:
    (gdmd.folder / name).write_bytes(content)
    refused(gdmd("train", "shapes_smoke", f"prompts.file={name}", "--run", "run"), name, *parts)
    assert not Path("run").exists()


def test_corrupt_asset(gdmd: Gdmd) -> None:
    Path("garbage.safetensors").write_bytes(os.urandom(1000))
    finished = gdmd("train", "shapes_smoke", "model.teacher=garbage.safetensors", "--run", "run")
    refused(finished, "garbage.safetensors", "corrupt")
    assert not Path("run").exists()


def test_asset_of_another_network(gdmd: Gdmd) -> None:
    vae = gdmd.assets / "shapes_vae.safetensors"
    finished = gdmd("train", "shapes_smoke", f"model.teacher={vae}", "--run", "run")
    refused(finished, "shapes_vae.safetensors")
    assert not Path("run").exists()


def test_run_folder_of_another_configuration(gdmd: Gdmd) -> None:
    gdmd.trained()
    before = folder_state(Path("run"))
    refused(gdmd.train("method.gamma=0.25", "--run", "run"), "method.gamma", "--run")
    refused(gdmd("train", "--resume", "run", "method.gamma=0.25"), "method.gamma")
    refused(gdmd.train("--run", "run"), "already holds this run", "--resume")
    assert folder_state(Path("run")) == before


def test_quoted_commands_and_home_folder(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(gdmd.folder / "home"))
    assert gdmd.train("--run=~/a run").code == 0
    assert Path("home/a run/config.yaml").is_file() and not Path("~").exists()
    refused(gdmd.train("--run", "~/a run"), f"gdmd train --resume '{gdmd.folder}/home/a run'")


@pytest.mark.parametrize("command", ["train --resume run", "eval run", "report run", "sample run -p ring"])
def test_corrupt_checkpoint(gdmd: Gdmd, command: str) -> None:
    gdmd.trained("loop.keep_checkpoints=1")
    for file in Path("run/checkpoints").glob("*/student.safetensors"):
        file.write_bytes(b"not what was saved")
    parts = [word.replace("ring", "a ring") for word in command.split()]
    refused(gdmd(*parts), "student.safetensors", "damaged")


def test_run_without_checkpoint(gdmd: Gdmd) -> None:
    gdmd.trained()
    for folder in Path("run/checkpoints").iterdir():
        folder.rename(folder.with_name("x" + folder.name))
    refused(gdmd("eval", "run"), "no checkpoint")


def test_damaged_config(gdmd: Gdmd) -> None:
    gdmd.trained()
    with Path("run/config.yaml").open("a") as file:
        file.write("lop: 3\n")
    refused(gdmd("eval", "run"), "config.yaml", "did you mean 'loop'")


def test_folder_with_other_files(gdmd: Gdmd) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    refused(gdmd.train("--run", "mine"), "mine", "thesis.txt")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_file_in_place_of_the_run_folder(gdmd: Gdmd) -> None:
    Path("taken").write_text("precious")
    refused(gdmd.train("--run", "taken"), "taken", "--run")
    assert Path("taken").read_text() == "precious"


def test_unwritable_folder(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", _failing(errno.EACCES, Path.mkdir, "locked"))
    refused(gdmd.train("--run", "locked/run"), "locked/run", "Permission denied", "--run")


def test_full_disk(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", _failing(errno.ENOSPC, Path.open, "metrics.jsonl"))
    refused(gdmd.train("--run", "run"), "metrics.jsonl", "No space left on device", "--run")


def test_out_of_memory(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total capacity of 8 GiB."
        )

    monkeypatch.setattr("gdmd.programs.train.train", fail)
    refused(gdmd.train("--run", "run"), "Tried to allocate 9 GiB", "gdmd plan", "--fit")


def _failing(number: int, original: Callable[..., object], name: str) -> Callable[..., object]:
    """``original`` that fails with an OSError for paths that contain ``name``."""

    def fail(self: Path, *args: object, **kwargs: object) -> object:
        if name in str(self):
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *args, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("place", "needless"),
    [
        ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision (not installed); falling back"),
        (
            "diffusers.loaders.lora_base",
            "No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'.",
        ),
        ("diffusers.loaders.peft", "No LoRA keys associated to SD3Transformer2DModel found with the prefix='x'."),
    ],
)
def test_library_warnings_are_filtered(place: str, needless: str) -> None:
    pytest.importorskip(place)
    logger = logging.getLogger(place)
    printed: list[str] = []
    handler = logging.Handler()
    # A handler of the test's own: the library keeps the stderr that it found when it was imported.
    handler.emit = lambda record: printed.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        main(["--version"])
    logger.addHandler(handler)
    try:
        logger.error(needless)
        logger.error("something else is wrong")
    finally:
        logger.removeHandler(handler)
    assert printed == ["something else is wrong"]
