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

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from gdmd.config.model import DiffusersModel
from gdmd.hub import hub_file
from gdmd.models.families.base import Family
from gdmd.models.loading import family_of, is_local, local_or_hub_index, note_guidance, open_family
from gdmd.models.schedulers import FEW_STEPS
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
    vae = _vae_config(cfg)
    differing = [key for key in LATENTS if vae.get(key) != family.pipe.vae.config.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{cfg.what} has other latents than the teacher {family.cfg.path!r}: the {key} of its VAE is {vae.get(key)}, "
            f"not {family.pipe.vae.config.get(key)}; give a student that was distilled from a model with the same VAE"
        )
    if family.cfg.student:
        note_guidance(family, start)
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


def compare_samplers(start: Family, uniform: Sequence[float], sampler: StudentSampler) -> None:
    """Warn if the student's first images will not be those of the pipeline in model.student: another sampler or times.

    uniform: method.student_steps. A pipeline that re-noises was sampled at times that its scheduler does not tell.
    """
    if start.cfg.field != "model.student":
        return
    scheduler, few = start.pipe.scheduler, len(uniform)
    noisy = type(scheduler).__name__ in FEW_STEPS or bool(scheduler.config.get("stochastic_sampling"))
    own: StudentSampler = "renoise" if noisy else "ode"
    if own != sampler:
        _log.warning(
            "%s is sampled with %s, which adds %s noise between the steps, unlike method.student_sampler = %s: the first "
            "images differ from those of that pipeline. method.student_sampler=%s keeps them",
            *(start.cfg.what, type(scheduler).__name__, "new" if noisy else "no", sampler, own),
        )
        return
    wanted = start.teacher_times(few)[:-1].tolist()
    if own == "ode" and max(abs(a - b) for a, b in zip(wanted, start.student_times(uniform), strict=True)) > SAME_TIME:
        _log.warning(
            "a call of %s with %d steps is at the times %s, but method.student_steps are at %s: the first images differ "
            "from those of that call. method.student_steps=[%s] are its times",
            *(start.cfg.what, few, _shown(wanted), _shown(start.student_times(uniform))),
            ",".join(f"{u:.6g}" for u in start.uniform_times(wanted)),
        )


def _shown(times: Sequence[float]) -> str:
    return ", ".join(f"{t:.3g}" for t in times)


def _vae_config(cfg: DiffusersModel) -> dict[str, object]:
    """The config of the VAE that belongs to the student's pipeline."""
    file = "vae/config.json"
    place = Path(cfg.location) / file if is_local(cfg.location) else Path(hub_file(cfg.path, file, cfg.revision))
    return dict(json.loads(place.read_text(encoding="utf-8")))
