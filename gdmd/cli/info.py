"""``gdmd recipes``, ``gdmd doctor`` and ``gdmd pretrain``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import Json, messages, print_json


class Network(StrEnum):
    """The shipped networks that can be made again."""

    vae = "vae"
    teacher = "teacher"
    scorers = "scorers"


def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A recipe, or a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    json: Json = False,
) -> None:
    """List the recipes, or print one with every field written out.

    \b
    Examples:
      gdmd recipes
      gdmd recipes shapes
      gdmd recipes shapes method.gamma=0 > mine.yaml       a start for a recipe of one's own
    """
    from gdmd.recipes.read import read_recipe, recipe_names

    if name is not None:
        from gdmd.config.load import dump_config

        cfg = read_recipe(name, overrides or [])
        print_json(cfg.model_dump(mode="json")) if json else print(dump_config(cfg), end="")
        return
    from gdmd.config.describe import length, student

    recipes = {known: read_recipe(known) for known in recipe_names()}
    if json:
        print_json({known: cfg.about for known, cfg in recipes.items()})
        return
    width = max(map(len, recipes))
    for known, cfg in recipes.items():
        print(f"{known:{width}}  {cfg.about} {student(cfg)}; {length(cfg)}.")


def doctor_command(json: Json = False) -> None:
    """Check the installation: versions, device, shipped networks, one training step. Exit code 2 if one fails.

    \b
    Examples:
      gdmd doctor
      gdmd doctor --json
    """
    from gdmd.programs.doctor import examine

    checks = examine()
    if json:
        print_json({"ok": all(c.ok for c in checks), "checks": [c.json() for c in checks]})
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:28} {check.found}")
    failed = [check.name for check in checks if not check.ok]
    if failed:
        raise ValueError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def pretrain_command(
    network: Annotated[Network, typer.Argument(help="What to make.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: those of the shipped one.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of weights and data; default: the shipped one's.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the .safetensors files.")] = Path("pretrained"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help="scorers: only this one; may be given again.")] = None,
) -> None:
    """Make the networks of the Shapes lab again: the VAE, the teacher (needs the VAE), the three scorers.

    The teacher takes FOLDER/shapes_vae.safetensors where there is one, else the shipped VAE. An interrupted training
    goes on with the same command and --resume. Use the result with, say,
    `gdmd train shapes model.teacher=pretrained/shapes_teacher.safetensors`.

    \b
    Examples:
      gdmd pretrain vae
      gdmd pretrain teacher --out mine --seed 5
      gdmd pretrain teacher --out mine --seed 5 --resume
      gdmd pretrain scorers --kind shapes_pref
    """
    if kind and network is not Network.scorers:
        raise ValueError(f"--kind names a scorer, but the network to make is {network.value}; leave it out")
    from gdmd.programs.pretrain import pretrain

    console = messages()
    for path in pretrain(network.value, steps, seed, folder, resume, kind or [], console):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
