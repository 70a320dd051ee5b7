"""The model card of an exported student: what it is, how to use it, how it was trained and what was measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdmd.config.describe import METHODS, is_trained, student_updates, trained_rewards
from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import PREFIX, is_shapes_pipeline
from gdmd.config.validation import split_size
from gdmd.diffusion.device import DTYPES
from gdmd.export.front_matter import base_id, front_matter
from gdmd.export.pipeline import left_out
from gdmd.models.families.base import Family
from gdmd.models.loading import has_safety_checker, local_or_hub_index
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.runs.inputs import INPUTS, change_lines
from gdmd.runs.run_folder import TRAINED_BEFORE, config_change_lines
from gdmd.types import StudentSampler

OWN = "apache-2.0, ships with gdmd"
"""License of the Shapes captions and rewards."""


def model_card(
    cfg: RunConfig,
    family: Family,
    arguments: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    merged: bool,
    measured: Mapping[str, Any] | None = None,
    license: Mapping[str, str] | None = None,
    samples: str | None = None,
    where: str = "THIS_FOLDER",
    separate: Sequence[LoraFile] = (),
    dtype: str | None = None,
) -> str:
    """README.md: the Hub's metadata, example code, training, metrics, licenses, configuration.

    measured: the results of ``gdmd eval preference`` for this checkpoint; None = not evaluated. license: the license
    fields, if known. samples: an image file in the folder. where: the folder or hub id from which the code loads.
    separate: LoRAs that the exported one needs and does not contain. dtype: the name of that in which the code loads the
    pipeline; default: that of the training.
    """
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    rewards = [reward.label for reward in cfg.rewards] if cfg.method.rewarded else []
    before = [label for label in facts.get(TRAINED_BEFORE, ()) if label not in trained_rewards(cfg)]
    config = json.dumps(cfg.model_dump(mode="json"), indent=2)
    head = (
        f"# {cfg.name}: {len(cfg.method.student_steps)}-step student of {family.cfg.path}",
        "",
        f"Distilled by {METHODS[cfg.method.kind]} with the gdmd library. No classifier-free guidance: one network call "
        "per step.",
        *_incomplete(cfg, license or {}),
        *(["", f"![samples]({samples})"] if samples else []),
    )
    sections: tuple[Sequence[str], ...] = (
        head,
        (
            "## Use",
            "```python",
            *_use(family, given, merged, where, separate, cfg.method.student_sampler, dtype or family.cfg.dtype),
            "```",
            *_advice(where, cfg.method.student_sampler),
            *_several_ranks(family, merged, separate),
            *_safety(family, merged),
        ),
        ("## Training", *_table(cfg, facts, rewards, before, _start(cfg, family, separate))),
        ("## Metrics", *_metrics(measured, facts, cfg), *_validation(facts, cfg)),
        ("## Licenses", *_licenses(cfg, [*rewards, *before], license or {})),
        ("## Configuration", "```json", config, "```"),
    )
    text = "\n".join(line for section in sections for line in (*section, ""))
    return f"---\n{front_matter(cfg, license or {}, samples, lora=not merged)}---\n\n" + text.rstrip("\n") + "\n"


def _incomplete(cfg: RunConfig, license: Mapping[str, str]) -> Sequence[str]:
    """What the Hub needs to know and the card does not say."""
    assert isinstance(cfg.model, DiffusersModel)
    base = cfg.model.start
    name, shipped = Path(base.path).name, base.path.startswith(PREFIX)
    lacks = [] if base_id(base) or shipped else [f"`base_model`: the hub id of {name}"]
    lacks += [] if license else [f"`license`: that of {name}, by `gdmd export --license NAME`"]
    return ("", f"> **Complete before publishing** (metadata of this file): {'; '.join(lacks)}.") if lacks else ()


def _advice(where: str, sampler: StudentSampler) -> Sequence[str]:
    steps = "re-noises at every step" if sampler == "renoise" else "is deterministic (Euler, DDIM)"
    return (
        f"The scheduler {steps}; other schedulers give worse images. With gdmd, "
        f'`gdmd.load_student("{where}")` returns this pipeline, and these arguments are the defaults of its call.',
    )


def _several_ranks(family: Family, merged: bool, separate: Sequence[LoraFile]) -> Sequence[str]:
    """What a LoRA that contains others needs: earlier versions of diffusers scale layers by another layer's rank."""
    if merged or separate or not family.cfg.teacher_loras:
        return ()
    return (
        "",
        "Its layers may have several ranks, which needs diffusers 0.42 or later: some earlier ones scale them wrongly.",
    )


def _safety(family: Family, merged: bool) -> Sequence[str]:
    """What diffusers and gdmd do with the safety checker of the base model."""
    if not has_safety_checker(local_or_hub_index(family.cfg)) or "safety_checker" in left_out(family):
        return ()
    whose = "This folder includes the base model's safety checker" if merged else "The base model has a safety checker"
    return (
        "",
        f"{whose}: diffusers returns a black image for what it flags. To load without it, add `safety_checker=None, "
        "requires_safety_checker=False`. gdmd samples and evaluates without it.",
    )


def _example(family: Family) -> str:
    """A prompt that the model can draw."""
    return "a red circle and a blue ring" if is_shapes_pipeline(family.cfg.path) else "a red cube on a blue sphere"


def _start(cfg: RunConfig, family: Family, separate: Sequence[LoraFile]) -> Mapping[str, str]:
    """Rows: the teacher, if the student started as another model, and the run's LoRAs."""
    model, loras = cfg.model, [f"{Path(one.path).name} ({one.weight:g})" for one in family.cfg.teacher_loras]
    rows = {}
    if isinstance(model, DiffusersModel) and model.start is not model:
        more = ", ".join(f"{Path(one.path).name} ({one.weight:g})" for one in model.teacher_loras)
        rows = {"teacher": model.path + (f" with {more}" if more else ""), "student starts as": family.cfg.path}
        rows["student starts as"] += f" with {', '.join(loras)}" if loras else ""
    how = "not contained: load them first, as above" if separate else "contained in these weights"
    how += ", also in the text encoders" if _changes_text(family, separate) else ""
    return rows | ({"LoRAs": f"{', '.join(loras)}: {how}"} if loras else {})


def _changes_text(family: Family, separate: Sequence[LoraFile]) -> bool:
    """Whether the exported weights change the text encoders, as LoRAs in them do."""
    return any(family.encoder.loras) and not separate


def _use(
    family: Family,
    given: str,
    merged: bool,
    folder: str,
    separate: Sequence[LoraFile],
    sampler: StudentSampler,
    dtype: str,
) -> Sequence[str]:
    """Code that runs as it is printed: on a GPU, for a small Shapes pipeline on the CPU."""
    path = family.cfg.path
    small, shipped = is_shapes_pipeline(path), path.startswith(PREFIX)
    device = "" if small else '.to("cuda")'
    pinned = {"revision": family.cfg.revision, "variant": family.cfg.variant}
    options = "".join(f", {key}={value!r}" for key, value in pinned.items() if value is not None and not merged)
    options += "".join(f", {name}=None" for name in left_out(family))
    base = f'files("gdmd") / "assets/pipelines/{path.removeprefix(PREFIX)}"' if shipped else f'"{path}"'
    where = f'"{folder}"' if merged else base
    net = "unet" if "unet" in family.needs else "transformer"
    fused = [
        line
        for one, texts in zip(separate, family.encoder.loras, strict=False)  # none are separate, or all
        for line in (
            f"pipe.load_lora_weights({_named(one)})",
            f"pipe.fuse_lora({_fused_parts(net, texts)}lora_scale={one.weight:g})",
            "pipe.unload_lora_weights()",
        )
    ]
    # without layers of the text encoders, load_lora_weights would warn that the file has none
    load, only = (
        ("load_lora_weights", "")
        if _changes_text(family, separate)
        else (f"{net}.load_lora_adapter", f', prefix="{net}"')
    )
    lora = (
        *fused,
        f'pipe.scheduler = diffusers.{family.student_scheduler(sampler)}.from_pretrained("{folder}", subfolder="scheduler")',
        f'pipe.{load}("{folder}", weight_name="{DIFFUSERS_FILE}"{only})',
    )
    return (
        *(["from importlib.resources import files", ""] if shipped and not merged else []),
        "import torch, diffusers",
        # without a dtype, text encoders would be loaded as stored (fp16) and networks in fp32
        f"pipe = diffusers.{family.pipeline}.from_pretrained({where}, dtype={DTYPES[dtype]}{options}){device}",
        *(() if merged else lora),
        f'image = pipe(prompt="{_example(family)}", {given}).images[0]',
    )


def _fused_parts(net: str, texts: Iterable[str]) -> str:
    """The argument of ``fuse_lora`` for a LoRA with these layers of text encoders: FLUX's leaves them out by default."""
    parts = [net, *dict.fromkeys(name.partition(".")[0] for name in texts)]
    return f"components={parts}, " if len(parts) > 1 else ""


def _named(lora: LoraFile) -> str:
    """Arguments of ``load_lora_weights``, which takes a file in a hub repository as a separate argument."""
    repository, file = lora.path, ""
    if not Path(lora.path).exists() and lora.path.count("/") > 1:
        org, name, file = lora.path.split("/", 2)
        repository = f"{org}/{name}"
    given = {"weight_name": file, "revision": lora.revision}
    return ", ".join([repr(repository), *(f"{key}={value!r}" for key, value in given.items() if value)])


def _table(
    cfg: RunConfig, facts: Mapping[str, Any], rewards: Sequence[str], before: Sequence[str], start: Mapping[str, str]
) -> Sequence[str]:
    steps = facts.get("step", cfg.loop.steps)
    rows = {
        "method": METHODS[cfg.method.kind],
        **start,
        "teacher guidance": cfg.method.guidance,
        "iterations": steps,
        "student updates": steps * student_updates(cfg.method),
        "batch": cfg.loop.batch_size,
        **_sizes(cfg),
        "rewards": ", ".join(rewards) or "none",
        **({"rewards of earlier runs": ", ".join(before)} if before else {}),
        **_scoring(facts.get("scoring")),
        **_data(cfg, facts),
        **({"inputs changed": "; ".join(changed)} if (changed := change_lines(facts)) else {}),
        **({"changed on resume": "; ".join(changed)} if (changed := config_change_lines(facts)) else {}),
        "seed": cfg.loop.seed,
        "code": facts.get("commit") or "not recorded",
    }
    table = (f"| {key} | {value} |" for key, value in rows.items())
    return ("| | |", "|---|---|", *table, "", *_command(facts.get("command") or ()))


def _sizes(cfg: RunConfig) -> Mapping[str, str]:
    """The row of a run with several image sizes."""
    given = cfg.model.sizes if isinstance(cfg.model, DiffusersModel) else ()
    return (
        {"image sizes (height x width)": ", ".join(f"{height} x {width}" for height, width in given)} if given else {}
    )


def _command(words: Sequence[str]) -> Sequence[str]:
    """The command as typed into a shell, without the folder of the program."""
    if not words:
        return ("Command: not recorded.",)
    program, *rest = map(str, words)
    name = "gdmd" if Path(program).name in ("__main__.py", "gdmd") else program
    return ("```sh", shlex.join([name, *rest]), "```")


def _scoring(found: Mapping[str, Any] | None) -> Mapping[str, str]:
    """The row of a run whose rewards used another decoder."""
    return {"decoder for rewards": "; ".join([Path(found["decoder"]).name, *found["lines"]])} if found else {}


def _data(cfg: RunConfig, facts: Mapping[str, Any]) -> Mapping[str, str]:
    """The rows of training data: prompts, and real images if the method read any."""
    if cfg.real_data is None:
        shapes = cfg.prompts.file is None and cfg.shapes_world
        return {"prompts": "captions of the Shapes world" if shapes else _prompts(cfg.prompts.file, facts)}
    captions = "the captions of the real images"
    prompts = _prompts(cfg.prompts.file, facts) if cfg.prompts.file else captions
    return {"prompts": prompts, "real images": ", ".join(_names(cfg))}


def _names(cfg: RunConfig) -> Sequence[str]:
    """Names of the folders and archives of real images, without their location."""
    return [Path(source).name for source in cfg.real_data.source] if cfg.real_data else []


def _prompts(file: str | None, facts: Mapping[str, Any]) -> str:
    """The name of the prompt file and the SHA-256 that the run recorded."""
    if file is None:
        return "not recorded"
    fingerprint = facts.get(INPUTS, {}).get("prompts.file", {}).get("fingerprint") or ""
    return Path(file).name + (f", SHA-256 {fingerprint.removeprefix('sha256:')}" if fingerprint else "")


def _metrics(measured: Mapping[str, Any] | None, facts: Mapping[str, Any], cfg: RunConfig) -> Sequence[str]:
    """A row per scorer: mean, 95 % interval over prompts, and whether the student was trained on it."""
    if facts.get("last_weights"):
        return (
            "Not evaluated: these are the last weights of the run, and its scores are those of their average (EMA). "
            "`gdmd eval preference THIS_FOLDER --prompts FILE` measures these.",
        )
    if not measured:
        prompts = "" if cfg.shapes_world else " --prompts FILE"
        return (f"Not evaluated. Run `gdmd eval preference RUN{prompts}`, then export again.",)
    head = f"{measured['prompts']} prompts of {measured['prompt_file']}, {measured['images_per_prompt']} images each, "
    rows = [
        f"| {name} | {_number(one['mean'])} | [{_number(one['low'])}, {_number(one['high'])}] | "
        f"{'trained on' if one['trained'] else 'unseen'} |"
        for name, one in measured["scores"].items()
    ]
    return (
        f"{head}seed {measured['seed']}; intervals are 95 % bootstrap over prompts.",
        "",
        "| scorer | mean | interval | in training |",
        "|---|---|---|---|",
        *rows,
    )


def _validation(facts: Mapping[str, Any], cfg: RunConfig) -> Sequence[str]:
    """A row per scorer of the run's validation prompts: the student, its teacher, and whether it was trained on it."""
    scores: Mapping[str, tuple[float, float | None]] = facts.get("validation") or {}
    if not scores:
        return ()
    trained = (*trained_rewards(cfg), *facts.get(TRAINED_BEFORE, ()))
    rows = (
        f"| {name} | {_number(student)} | {_number(teacher)} | {'trained on' if is_trained(own, trained) else 'unseen'} |"
        for name, (student, teacher) in scores.items()
        for own, _ in [split_size(name)]
    )
    head = ("| scorer | student | teacher | in training |", "|---|---|---|---|")
    return ("", "Means on the validation prompts of the run:", "", *head, *rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _more_weights(cfg: RunConfig) -> Sequence[tuple[str, str]]:
    """(what, name) of the weights besides the base model that the student was made with."""
    assert isinstance(cfg.model, DiffusersModel)
    loras = dict.fromkeys(one.path for one in (*cfg.model.teacher_loras, *cfg.model.start.teacher_loras))
    teacher = [("teacher", cfg.model.path)] if cfg.model.student else []
    return *teacher, *(("LoRA", Path(path).name) for path in loras)


def _licenses(cfg: RunConfig, rewards: Sequence[str], license: Mapping[str, str]) -> Sequence[str]:
    """A table for the owner to complete."""
    base = cfg.model.start.path if isinstance(cfg.model, DiffusersModel) else "-"
    named = license.get("license_name") or license.get("license") or "fill in"
    prompts = f"{Path(cfg.prompts.file).name if cfg.prompts.file else '-'} | fill in source and license"
    if cfg.shapes_world and cfg.prompts.file is None:
        prompts = f"captions of the Shapes world | {OWN}"
    return (
        "| what | | license |",
        "|---|---|---|",
        f"| base model | {base} | {named}; its terms bind this student |",
        *(f"| {what} | {name} | fill in; its terms bind this student |" for what, name in _more_weights(cfg)),
        *(f"| reward model | {reward} | {OWN if reward.startswith('shapes_') else 'fill in'} |" for reward in rewards),
        f"| prompts | {prompts} |",
        *(f"| real images | {name} | fill in source and license |" for name in _names(cfg)),
    )
