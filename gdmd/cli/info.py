"""``gdmd recipes``, ``gdmd doctor`` and ``gdmd pretrain``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gdmd.cli.common import Device, Json, log, messages, print_json


class Network(StrEnum):
    """The shipped networks that can be trained again."""

    vae = "vae"
    teacher = "teacher"
    scorers = "scorers"
    pipeline = "pipeline"
    student = "student"


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A recipe or a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Describe each field, with its type and default; KEY: only these fields."),
    ] = False,
    json: Json = False,
) -> None:
    """List the recipes, or print one with all its fields.

    \b
    Examples:
      gdmd recipes
      gdmd recipes shapes
      gdmd recipes sdxl_gdmd > mine.yaml      a copy to edit and train
      gdmd recipes shapes --explain
      gdmd recipes shapes --explain method loop.steps
    """
    from gdmd.recipes.read import read_recipe, recipe_names

    if explain:
        if name is None or json:
            raise ValueError(
                "--explain prints a recipe as text; name one, without --json: gdmd recipes shapes --explain"
            )
        print("\n".join(_explanation(name, overrides or [])))
        return
    if name is not None:
        from gdmd.config.load import dump_config

        cfg = read_recipe(name, overrides or [])
        print_json(cfg.model_dump(mode="json")) if json else print(dump_config(cfg), end="")
    elif json:
        print_json({known: read_recipe(known).about for known in recipe_names()})
    else:
        print("\n".join(_recipe_list()))


def _explanation(name: str, arguments: Sequence[str]) -> list[str]:
    """The fields of a recipe; an argument without an equals sign selects a field or a section."""
    from gdmd.config.fields import all_paths
    from gdmd.config.names import similar_fields
    from gdmd.config.reference import explained
    from gdmd.recipes.read import read_recipe

    cfg = read_recipe(name, [one for one in arguments if "=" in one])
    only = [one for one in arguments if "=" not in one]
    for key in only:
        if len(list(explained(cfg, [key]))) == 1:
            section, _, own = key.rpartition(".")
            fields = list(all_paths(type(cfg), cfg.model_dump()))
            siblings = [field.rpartition(".")[2] for field in fields if field.rpartition(".")[0] == section]
            meant = similar_fields(own, siblings, fields)
            raise ValueError(
                f"recipe {name} has no field {key!r}{meant or f'; `gdmd recipes {name}` prints all of them'}"
            )
    return list(explained(cfg, only))


def _recipe_list() -> Iterator[str]:
    """Shapes recipes one by one; recipes for diffusers pipelines as a list of families and a list of methods. 80 columns."""
    from gdmd.config.describe import length, student
    from gdmd.recipes.read import family_names, method_about, method_names, read_recipe, shapes_names

    shapes = {name: read_recipe(name) for name in shapes_names()}
    yield "The Shapes world (ships with gdmd, trains on a laptop): gdmd train NAME"
    yield from _entries({name: f"{cfg.about} {length(cfg)}." for name, cfg in shapes.items()})
    families, methods = family_names(), method_names()
    by_family = {family: read_recipe(f"{family}_{methods[0]}").model for family in families}
    yield "\nDiffusers pipelines: gdmd train FAMILY_METHOD, such as sdxl_gdmd (any pair)"
    yield "\nFAMILY"
    yield from _entries({name: f"{m.path}{_start(m)}, {m.width} x {m.height}" for name, m in by_family.items()})
    by_method = {method: read_recipe(f"{families[0]}_{method}") for method in methods}
    students = dict.fromkeys(student(cfg).partition(" at ")[0] for cfg in by_method.values())
    yield f"\nMETHOD ({' or '.join(students)})"
    yield from _entries({name: f"{method_about(name)} {length(cfg)}." for name, cfg in by_method.items()})


def _start(model: Any) -> str:
    """What the student of a family's recipes starts as, if that is not the teacher."""
    start = model.student or (model.student_lora and model.student_lora.path)
    return f", student from {start}" if start else ""


def _entries(texts: Mapping[str, str]) -> Iterator[str]:
    """Names in a column, each with its text wrapped next to it."""
    width = max(map(len, texts)) + 4
    for name, text in texts.items():
        yield textwrap.fill(f"  {name:{width - 2}}{text}", 80, subsequent_indent=" " * width, break_on_hyphens=False)


def doctor_command(device: Device = None, json: Json = False) -> None:
    """Check the installation: versions, device, shipped networks, one training step.

    The exit code is 2 if a check fails.

    \b
    Examples:
      gdmd doctor
      gdmd doctor --json
    """
    from gdmd.programs.doctor import examine

    checks = examine(device)
    if json:
        print_json({"ok": all(c.ok for c in checks), "checks": [c.json() for c in checks]})
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:28} {check.found}")
    failed = [check.name for check in checks if not check.ok]
    if failed:
        raise ValueError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def pretrain_command(
    network: Annotated[Network, typer.Argument(help="What to train.")],
    family: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="pipeline: sd3, sdxl or flux2_klein.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as the shipped network.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of weights and data; default: as the shipped network.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the .safetensors files and pipelines.")] = Path(
        "pretrained"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help="scorers: train only this one; may be repeated.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="student: a finished run of gdmd train shapes_dmd.")] = None,
) -> None:
    """Train the networks of the Shapes world again: the VAE, the teacher, the three scorers, a small pipeline, or a student.

    The teacher uses FOLDER/shapes_vae.safetensors if it exists, else the shipped VAE. Use the result with, for example,
    `gdmd train shapes model.teacher=pretrained/shapes_teacher.safetensors`.

    A pipeline is a folder in diffusers' format, trained on Shapes captions in less than an hour. Use it as a base model:
    `gdmd train shapes_sd3 model.path=pretrained/shapes_sd3`.

    A student is the EMA student and the fake score of a run in one small file, like the shipped shapes:dmd. Start from
    it with loop.start_from=pretrained/shapes_dmd.safetensors.

    \b
    Examples:
      gdmd pretrain vae
      gdmd pretrain teacher --out mine --seed 5
      gdmd pretrain teacher --out mine --seed 5 --resume
      gdmd pretrain scorers --kind shapes_pref
      gdmd pretrain pipeline sd3
      gdmd pretrain pipeline sdxl --out mine --steps 20000 --seed 7
      gdmd pretrain student --run runs/dmd       after gdmd train shapes_dmd
    """
    if kind and network is not Network.scorers:
        raise ValueError(f"--kind selects a scorer, but the network to train is {network.value}; leave it out")
    if family and network is not Network.pipeline:
        raise ValueError(
            f"{family!r} is a family of pipelines, but the network to train is {network.value}; leave it out"
        )
    if (run is not None) != (network is Network.student):
        raise ValueError(
            "pretrain student needs --run RUN, a run of gdmd train shapes_dmd"
            if run is None
            else f"--run names the run of a student, but the network to train is {network.value}; leave it out"
        )
    if run is not None:
        if steps is not None or seed is not None or resume:
            raise ValueError("pretrain student trains nothing: leave --steps, --seed and --resume out")
        from gdmd.runs.student_file import pack_student

        log(f"wrote {pack_student(run, folder)}")
        return
    from gdmd.programs.pretrain import pretrain

    for path in pretrain(network.value, steps, seed, folder, resume, kind or [], family, messages()):
        log(f"wrote {path}")
