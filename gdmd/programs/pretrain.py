"""What ``gdmd pretrain`` does: train the VAE, the teacher, the scorers or a pipeline of the Shapes world."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gdmd.config.names import listed
from gdmd.runs.assets import asset_path, load_asset
from gdmd.shapes.pretrain.networks import PretrainJob, fit, teacher_job, vae_job
from gdmd.shapes.pretrain.scorers import SHIPPED, ScorerConfig, pretrain_scorer
from gdmd.shapes.roles import load_vae
from gdmd.shapes.scorer_networks import KINDS

LINES = 20
"""Progress lines of a training without a terminal."""
OnStep = Callable[[int, float], None]


def pretrain(
    network: str,
    steps: int | None,
    seed: int | None,
    folder: Path,
    resume: bool,
    kinds: Sequence[str],
    family: str | None,
    console: Console,
) -> Iterator[Path]:
    """Train ``network`` and yield each file or pipeline in ``folder`` when it is written.

    steps, seed: None = those of the shipped network. kinds: which scorers; empty = all. family: of a pipeline.
    """
    given: dict[str, Any] = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
    match network:
        case "vae":
            yield _fitted(vae_job(**given), folder / "shapes_vae.safetensors", resume, console)
        case "teacher":
            own = folder / "shapes_vae.safetensors"
            source = own if own.is_file() else asset_path("shapes_vae")
            console.print(f"encoding images with {source}", markup=False, highlight=False, soft_wrap=True)
            vae = load_vae(load_asset(source).tensors).eval().requires_grad_(False)
            yield _fitted(teacher_job(vae, **given), folder / "shapes_teacher.safetensors", resume, console)
        case "pipeline":
            yield from _pipeline(family, given, folder, resume, console)
        case _:
            yield from _scorers(kinds, given, folder, resume, console)


def _pipeline(
    family: str | None, given: dict[str, Any], folder: Path, resume: bool, console: Console
) -> Iterator[Path]:
    """The VAE that all pipelines share, unless the folder holds it already; then the denoiser and the whole pipeline."""
    from gdmd.shapes.pretrain.miniatures import MINIATURES, SIZE, build_miniature
    from gdmd.shapes.pretrain.pipelines import denoiser_job, kl_vae_job, save_miniature, set_vae

    if family is None or family not in MINIATURES:
        got = repr(family) if family else "none"
        raise ValueError(f"pretrain pipeline needs a family, got {got}; name {listed(list(MINIATURES), quoted=False)}")
    one = MINIATURES[family]
    steps, seed = given.get("steps", one.steps), given.get("seed", one.seed)
    vae, denoiser = folder / "shapes_kl_vae.safetensors", folder / f"shapes_{family}.safetensors"
    if not vae.is_file():
        yield _fitted(kl_vae_job(), vae, resume, console)
    console.print(f"encoding images with {vae}", markup=False, highlight=False, soft_wrap=True)
    pipe = build_miniature(family, seed)
    set_vae(pipe, load_asset(vae).tensors, seed)
    job = denoiser_job(pipe, steps, seed)
    yield _fitted(job, denoiser, resume, console)
    facts = {"family": family, "command": job.command, "seed": seed, "steps": steps}
    facts |= {"height": SIZE, "width": SIZE, "max_tokens": one.max_tokens}
    save_miniature(pipe, folder / f"shapes_{family}", facts)
    yield folder / f"shapes_{family}"


def _scorers(
    kinds: Sequence[str], given: dict[str, Any], folder: Path, resume: bool, console: Console
) -> Iterator[Path]:
    """Train these scorers; with ``resume`` one that is finished, with the same command, is left as it is."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"--kind {unknown[0]}: unknown scorer; the scorers are {', '.join(KINDS)}")
    for kind in KINDS:
        if kinds and kind not in kinds:
            continue
        path = folder / f"{kind}.safetensors"
        steps, seed = (given.get(key, own) for key, own in zip(("steps", "seed"), SHIPPED[kind], strict=True))
        command = ScorerConfig(kind, steps, seed).command
        if not (resume and path.is_file() and load_asset(path).metadata.get("command") == command):
            with _progress(kind, steps, console) as shown:
                pretrain_scorer(kind, steps, seed, path, resume=resume, on_step=shown)
        yield path


def _fitted(job: PretrainJob, path: Path, resume: bool, console: Console) -> Path:
    """Run a job; with ``resume`` one that is finished, with the same command and frozen network, is read instead."""
    if resume and path.is_file():
        asset = load_asset(path)
        if (asset.metadata.get("command"), asset.metadata.get("reads")) == (job.command, job.reads):
            job.module.load_state_dict(asset.tensors)
            return path
    with _progress(job.name, job.steps, console) as shown:
        for step, loss in fit(job, path, resume=resume, save_every=max(1, min(500, job.steps // 10))):
            shown(step, loss.item())
    return path


@contextmanager
def _progress(name: str, steps: int, console: Console) -> Iterator[OnStep]:
    """A callback (step, loss): a bar on a terminal, else about twenty lines."""
    if not console.is_terminal:
        every = max(1, steps // LINES)

        def line(step: int, loss: float) -> None:
            if (step + 1) % every == 0 or step + 1 == steps:
                console.print(f"{name}: step {step + 1}/{steps}  loss {loss:.4f}", markup=False, highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as bar:
        task = bar.add_task(name, total=steps, loss=float("nan"))
        yield lambda step, loss: bar.update(task, completed=step + 1, loss=loss)
