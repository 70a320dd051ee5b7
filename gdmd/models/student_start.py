"""What the student starts as, if that is not the teacher: another pipeline of the family, or the teacher with a LoRA.

    teacher   T = base model + teacher_loras              frozen; they may change the text encoders, which all roles share
    start     S = T, or T + student_lora, or student (+ student_lora): frozen too, a second network
    student   S + B A, or a full copy of S that is trained;  at step 0 it equals S
    fake      T + B A (fake_from = teacher) or S + B A
    old       S + B A, a copy of the student's adapter

Adapters, their EMA, checkpoints and the old policy are thus those of any run. The exported LoRA is for the published
pipeline of S: B A with the LoRAs in S, whose factors are concatenated, or B A alone. S is a separate Family: what its
network predicts and reads, and the shift of its times, are those of its pipeline.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from gdmd.config.model import DiffusersModel
from gdmd.hub import hub_file
from gdmd.models.families.base import ENCODERS, Family
from gdmd.models.loading import family_of, is_local, local_or_hub_index, note_guidance, open_family
from gdmd.models.pipeline_files import weight_files
from gdmd.models.schedulers import sampler_of
from gdmd.types import StudentSampler

_log = logging.getLogger(__name__)
LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Keys of a VAE's config that set the latents' scale."""
SAME_TIME = 1e-3
"""Largest difference of two times that are the same: a training step of 1000."""


def open_start(family: Family, device: str = "cpu") -> Family:
    """What the student starts as, with the teacher's VAE and text encoders; ``family`` if it starts as the teacher.

    ValueError for a student of another family, noise schedule, latent space or text encoder, and for LoRAs that would change
    the text encoders of only one of the two.
    """
    cfg = family.cfg.start
    if cfg is family.cfg:
        return family
    texts = next(
        (lora.path for lora, one in zip(family.cfg.teacher_loras, family.encoder.loras, strict=True) if one), None
    )
    if family.cfg.student and texts:
        raise ValueError(
            f"model.teacher_loras: {texts!r} also changes the text encoders, but teacher and student read the same "
            f"embeddings, and {cfg.what} was made for those without it. Fuse the LoRA into both pipelines in diffusers "
            "(load_lora_weights, fuse_lora, save_pretrained) and give their folders, or leave model.student out"
        )
    kind = family_of(local_or_hub_index(cfg), cfg)
    if kind is not type(family):
        raise ValueError(
            f"{cfg.what} is a {kind.pipeline} ({kind.name}), but the teacher {family.cfg.path!r} is a {family.pipeline} "
            f"({family.name}); give a student of the teacher's family"
        )
    start = open_family(cfg, device, shared=family)
    if (lora := family.cfg.student_lora) and start.encoder.loras[-1]:
        raise ValueError(
            f"model.student_lora {lora.path!r} also changes the text encoders ({len(start.encoder.loras[-1])} layers), but "
            "student, teacher and fake score read the same embeddings, and the teacher's are without it. Give a LoRA that "
            "was trained without the text encoders, or remove these layers from the file"
        )
    check_alike(family, start)
    vae = _vae_config(cfg, type(family.pipe.vae))
    differing = [key for key in LATENTS if vae.get(key) != family.pipe.vae.config.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{cfg.what} has other latents than the teacher {family.cfg.path!r}: the {key} of its VAE is {vae.get(key)}, "
            f"not {family.pipe.vae.config.get(key)}; give a student that was distilled from a model with the same VAE"
        )
    if family.cfg.student:
        note_guidance(family, start)
        _note_encoders(family.cfg, cfg)
    return start


def check_alike(family: Family, start: Family) -> None:
    """ValueError unless the start reads the teacher's noise levels and captions."""
    shapes = [{k: v.shape for k, v in one.blank_text(1).items()} for one in (family, start)]
    if start.schedule != family.schedule:
        wrong = "has another noise schedule (betas)"
    elif shapes[0] != shapes[1]:
        wrong = "reads other text embeddings"
    else:
        return
    raise ValueError(
        f"{start.cfg.what} {wrong} than the teacher {family.cfg.path!r}; give a student that was distilled from that "
        "teacher, or from a model like it"
    )


def _note_encoders(teacher: DiffusersModel, student: DiffusersModel) -> None:
    """Warn about a student whose text encoders have other weights than the teacher's, which all roles read.

    Only folders are compared: the encoders of a student on the hub are not downloaded.
    """
    if not (is_local(teacher.location) and is_local(student.location, student.field)):
        return
    places = [(Path(one.location), one.variant) for one in (teacher, student)]
    differing = [name for name in ENCODERS if not _same_weights(*(weight_files(at / name, v) for at, v in places))]
    if differing:
        _log.warning(
            "%s has other weights in %s than the teacher %r, whose text encoders the student reads in training, too: its "
            "first images differ from those of that pipeline, and later images from those of its export, which is for "
            "that pipeline. Give a teacher with the same text encoders, or copy the teacher's into the student's folder",
            *(student.what, " and ".join(differing), teacher.path),
        )


def _same_weights(one: Sequence[Path], other: Sequence[Path]) -> bool:
    """Whether two networks have the same weights, by some rows of some of them. True if their files cannot be compared."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack, suppress(SafetensorError):
        opened = [[stack.enter_context(safe_open(path, "pt")) for path in paths] for paths in (one, other)]
        here, there = ({key: file for file in files for key in file.keys()} for files in opened)  # noqa: SIM118
        shared = sorted(here.keys() & there.keys())
        return all(_alike(here[key], there[key], key) for key in shared[:: max(len(shared) // 8, 1)])
    return True


def _alike(one: Any, other: Any, key: str) -> bool:
    """Compares a weight in the narrower of its two dtypes, in which one that was rounded twice may differ."""
    a, b = (file.get_slice(key) for file in (one, other))
    if a.get_shape() != b.get_shape():
        return False
    rows = [part[:64] for part in (a, b) if part.get_shape()]
    if not rows or not all(part.is_floating_point() for part in rows):
        return True
    narrow = max((part.dtype for part in rows), key=lambda dtype: torch.finfo(dtype).eps)
    a, b = (part.to(narrow).float() for part in rows)
    return bool(((a - b).abs() <= 1e-7).float().mean() > 0.8)  # 1e-7: fp16 loses digits below 6e-5


def compare_samplers(start: Family, uniform: Sequence[float], sampler: StudentSampler) -> None:
    """Warn if the student's first images will not be those of the pipeline in model.student: another sampler or times.

    uniform: method.student_steps. A pipeline that re-noises was sampled at times that its scheduler does not tell.
    """
    if start.cfg.field != "model.student":
        return
    scheduler, few = start.pipe.scheduler, len(uniform)
    own, sampled = sampler_of(scheduler), f"{start.cfg.what} is sampled with {type(scheduler).__name__}"
    if own is None and few > 1:
        _log.warning(
            "%s, which replaces a part of the noise between the steps: method.student_sampler=renoise replaces all of it, "
            "ode none, so the first images differ from those of that pipeline",
            sampled,
        )
        return
    if own != sampler and few > 1:
        _log.warning(
            "%s, which adds %s noise between the steps, unlike method.student_sampler = %s: the first images differ from "
            "those of that pipeline. method.student_sampler=%s keeps them",
            *(sampled, "new" if own == "renoise" else "no", sampler, own),
        )
        return
    wanted = start.teacher_times(few)[:-1].tolist()
    if (
        own != "renoise"
        and max(abs(a - b) for a, b in zip(wanted, start.student_times(uniform), strict=True)) > SAME_TIME
    ):
        _log.warning(
            "a call of %s with %d steps is at the times %s, but method.student_steps are at %s: the first images differ "
            "from those of that call. method.student_steps=[%s] are its times",
            *(start.cfg.what, few, _shown(wanted), _shown(start.student_times(uniform))),
            ",".join(f"{u:.6g}" for u in start.uniform_times(wanted)),
        )


def _shown(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.3g}" for t in times)


def _vae_config(cfg: DiffusersModel, kind: type[object]) -> dict[str, object]:
    """The config of the VAE that belongs to the student's pipeline; keys that old files lack have the class's defaults."""
    file = "vae/config.json"
    place = Path(cfg.location) / file if is_local(cfg.location) else Path(hub_file(cfg.path, file, cfg.revision))
    defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
    return defaults | dict(json.loads(place.read_text(encoding="utf-8")))
