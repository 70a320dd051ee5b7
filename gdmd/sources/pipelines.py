"""Diffusers pipelines and exported students as sources of images, with noise keyed by image.

LCM, SDXL-Lightning, Hyper-SD, Turbo, TDM and other published checkpoints are compared this way: each is a pipeline with
a LoRA, a scheduler, steps and guidance.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gdmd.config.image_source import SourceConfig
from gdmd.config.model import LoraFile
from gdmd.config.shapes_pipeline import located, read_shapes_pipeline
from gdmd.diffusion.device import DTYPES, pick_device
from gdmd.diffusion.generate import BATCH
from gdmd.diffusion.prompt_length import long_prompts
from gdmd.diffusion.rng import SampleRng
from gdmd.hub import unreachable
from gdmd.io import RunError
from gdmd.models.distilled import why_distilled
from gdmd.models.families.qwen_image import QwenText
from gdmd.models.loading import (
    FAMILIES,
    check_libraries,
    check_t5,
    checker_off,
    explain,
    family_of_pipeline,
    from_an_image,
    is_local,
    read_index,
    require_diffusers,
)
from gdmd.models.lora_files import add_lora, fuse_loras, lora_factors
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.models.packing import in_patches, pack
from gdmd.models.pipeline_files import (
    EXTRAS,
    INDEX,
    absent,
    check_files,
    check_folders,
    check_needed,
    components,
    load_errors,
)
from gdmd.models.tokens import fit_limits, readers_of
from gdmd.models.vae import on_white
from gdmd.recipes.contents import lora_content
from gdmd.rewards.weights import weights_content
from gdmd.runs.student_file import EXPORT_FILE
from gdmd.shapes.grammar import tokenize
from gdmd.sources.base import ImageSlot, SourceInfo, device_name, to_images
from gdmd.sources.schedulers import check_scheduler, set_scheduler, step_arguments

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
BINNING = "use_resolution_binning"
"""Argument of pipelines that generate at a size from a table and rescale the image to the requested size."""
ONE_BY_ONE = ("QwenImage21Pipeline",)
"""Pipelines whose images depend on the other captions of a batch: their padding moves the image's position."""
_UNKEYED = (
    *(torch.normal, torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.bernoulli),
    *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.random_, torch.Tensor.bernoulli_),
)
"""Draws that ``KeyedNoise`` cannot key by image."""
_OTHER = "use another scheduler, or generate the images elsewhere and evaluate the folder"


class KeyedNoise(TorchFunctionMode):
    """Makes ``torch.randn`` and ``randn_like`` in a pipeline return the noise of each image of the batch.

    Draw n of image k is that of ``SampleRng`` for (seed, key of k): n = 0 the initial latents, n >= 1 the re-noising, as
    in gdmd's own sampler. Pipelines draw for the batch (generator None) or per image (one generator each).
    patched: the first draw is in 2 x 2 patches.
    """

    def __init__(self, rng: SampleRng, generators: Sequence[torch.Generator], *, patched: bool = False) -> None:
        super().__init__()
        self.patched = patched
        self.rng, self._place = rng, {id(one): k for k, one in enumerate(generators)}
        self._draws = [0] * len(generators)
        self._first: tuple[int, ...] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _UNKEYED:
            raise ValueError(f"a pipeline drew from torch.{func.__name__}, which cannot be keyed by image; {_OTHER}")
        if func is torch.randn_like:
            like = args[0] if args else given["input"]
            given = {"device": like.device, "dtype": like.dtype, **given}
            args = tuple(like.shape)
        elif func is not torch.randn:
            return func(*args, **given)
        generator = given.get("generator")
        size = args or (given["size"],)
        shape = tuple(size[0] if isinstance(size[0], (tuple, list, torch.Size)) else size)
        count = len(self._draws)
        alone = generator is not None and count > 1
        rows = [self._place.get(id(generator), -1)] if alone else list(range(count))
        if len(shape) < 2 or shape[0] != len(rows) or -1 in rows:
            raise ValueError(
                f"a pipeline drew noise of shape {list(shape)} for {count} images, which cannot be keyed by image; {_OTHER}"
            )
        noise = torch.cat([self._noise(k, shape[1:]) for k in rows])
        return noise.to(device=given.get("device"), dtype=given.get("dtype"))

    def _noise(self, k: int, shape: tuple[int, ...]) -> Tensor:
        """The next draw of image k, [1, *shape]. A packed shape gets the packed noise of the first draw's latents."""
        n, self._draws[k] = self._draws[k], self._draws[k] + 1
        own = SampleRng(self.rng.seed, self.rng.step, self.rng.index[k : k + 1])
        purpose = "eval_rollout" if n else "eval_noise"
        self._first = self._first or shape
        if self.patched:
            c, h, w = self._first
            noise = own.normal(purpose, (c // 4, 2 * h, 2 * w), n)
            return pack(noise) if len(shape) == 2 else in_patches(noise)
        if len(shape) != 2 or len(self._first) == 2:
            return own.normal(purpose, shape, n)
        noise = own.normal(purpose, self._first, n).reshape(1, *self._first[-3:])
        return noise.flatten(2).mT if shape[-1] == self._first[-3] else pack(noise)


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers pipeline and the arguments of its call."""

    info: SourceInfo
    pipe: Any
    arguments: Mapping[str, Any]

    def check(self, texts: Sequence[str]) -> None:
        """Warn about prompts that the text encoders truncate. ValueError for an unknown word of the Shapes language."""
        for text in texts if self.info.shapes else ():
            tokenize(text)
        readers = readers_of(self.pipe, int(self.arguments.get("max_sequence_length") or 0))
        if message := long_prompts(readers, texts, "shorten them"):
            log.warning("%s", message)

    @torch.no_grad()
    def generate(self, slots: Sequence[ImageSlot], seed: int) -> list[Image]:
        if type(self.pipe).__name__ in ONE_BY_ONE and len(slots) > 1:
            return [image for slot in slots for image in self.generate([slot], seed)]
        rng = SampleRng(seed, 0, torch.tensor([slot.key for slot in slots]))
        digests = [hashlib.sha256(f"image {seed} {slot.key}".encode()).digest() for slot in slots]
        generators = [torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")) for digest in digests]
        texts, patched = [slot.text for slot in slots], type(self.pipe).__name__.startswith("Flux2")
        with KeyedNoise(rng, generators, patched=patched):
            output = self.pipe(prompt=texts, generator=generators, output_type="pt", **self.arguments)
        return to_images(on_white(output.images.float()), self.info.name)


def open_pipeline(cfg: SourceConfig) -> PipelineSource:
    """The pipeline with its LoRA and scheduler, on its device; a Shapes pipeline at the size that it was trained at."""
    trained = read_shapes_pipeline(cfg.where)
    _check_revision(cfg, cfg.where)
    if trained is not None:
        cfg = cfg.changed({"height": cfg.height or trained.height, "width": cfg.width or trained.width})
    pipe = _load(cfg, cfg.where)
    if cfg.lora:
        add_lora(pipe, cfg.lora, cfg.lora_scale, partial=cfg.lora_partial)
    if cfg.scheduler or cfg.spacing or cfg.shift is not None:
        set_scheduler(pipe, cfg)
    check_scheduler(pipe, cfg)
    _check_size(pipe, cfg)
    guidance = _guidance(pipe, cfg)
    asked = {"num_inference_steps": cfg.steps, "height": cfg.height, "width": cfg.width} | guidance
    arguments = {key: value for key, value in asked.items() if value is not None} | step_arguments(pipe, cfg)
    arguments |= {key: False for key in _unprocessed(pipe) if key == BINNING}
    length = {"max_sequence_length": trained.max_tokens} if trained is not None and trained.max_tokens else {}
    unrewarded = () if trained is not None and cfg.lora is None else None
    info = SourceInfo(
        name=cfg.name,
        kind="pipeline",
        where=cfg.where,
        shapes=trained is not None,
        trained=cfg.trained or unrewarded,
        batch=cfg.batch or (4 if trained is None else BATCH),
        device=device_name(pipe.device),
        identity=_identity(cfg, guidance) | length | _unprocessed(pipe),
    )
    return PipelineSource(info, pipe, arguments | length)


def _identity(cfg: SourceConfig, guidance: Mapping[str, Any]) -> dict[str, Any]:
    """What the images depend on: the settings, and the content of the weights."""
    excluded = {"name", "where", "checkpoint", "batch", "device", "trained", "lora", "lora_partial", "base"}
    newer = {"shift", "timesteps", "eta", "guidance_rescale"}  # older images have no such key
    settings = cfg.model_dump(mode="json", exclude=excluded | (newer - cfg.model_fields_set))
    settings["guidance"] = guidance.get("true_cfg_scale", cfg.guidance)  # same images as the default
    weights = weights_content(located(cfg.where), cfg.revision, cfg.variant)
    return {"kind": "pipeline", **settings, "weights": weights, "lora": cfg.lora and lora_content(cfg.lora)}


def _unprocessed(pipe: Any) -> dict[str, bool]:
    """Post-processing of the stock pipeline that is switched off here; part of the identity."""
    checker = {"safety_checker": False} if "requires_safety_checker" in pipe.config else {}
    binning = {BINNING: False} if BINNING in inspect.signature(type(pipe).__call__).parameters else {}
    return checker | binning


def _guidance(pipe: Any, cfg: SourceConfig) -> dict[str, Any]:
    """The guidance arguments. Qwen-Image ignores guidance without a negative prompt, so the one of training is given.

    ValueError for a guidance that the pipeline would ignore.
    """
    name, config = (
        type(pipe).__name__,
        pipe.components["transformer"].config if "transformer" in pipe.components else {},
    )
    ignored = name == "Flux2KleinPipeline" and pipe.config.get("is_distilled") and (cfg.guidance or 0) > 1
    ignored = ignored or (name in ("FluxPipeline", "Flux2Pipeline") and not config.get("guidance_embeds"))
    if cfg.guidance is not None and ignored:
        raise ValueError(
            f"source {cfg.where!r}: guidance={cfg.guidance:g} does nothing for this {name}, because "
            f"{why_distilled(pipe, located(cfg.where)) or 'it has no guidance embedding'}; leave it out"
        )
    if cfg.guidance_rescale is not None and "guidance_rescale" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"source {cfg.where!r}: guidance_rescale is set, but a {name} does not read it; leave it out")
    if name not in ("QwenImagePipeline", "QwenImage21Pipeline"):
        return {"guidance_scale": cfg.guidance, "guidance_rescale": cfg.guidance_rescale}
    own = inspect.signature(pipe.__call__).parameters["true_cfg_scale"].default
    guidance = own if cfg.guidance is None else cfg.guidance
    return {"true_cfg_scale": guidance} | ({"negative_prompt": QwenText.no_caption} if guidance > 1 else {})


def _check_revision(cfg: SourceConfig, where: str) -> None:
    """ValueError for a revision of a folder, which has only one."""
    if cfg.revision is not None and Path(located(where)).is_dir():
        raise ValueError(
            f"source {cfg.where!r}: revision={cfg.revision} is for a hub id, but {where} is a folder; leave it out"
        )


def _check_size(pipe: Any, cfg: SourceConfig) -> None:
    """ValueError for a size beyond the network's positions, or between its patches.

    Some pipelines fail only in their first step, and some make an image of another size.
    """
    family = family_of_pipeline(pipe)
    if family is None:
        return
    unit = pipe.vae_scale_factor * max(family.patch, family.multiple)
    for side, pixels in (("height", cfg.height), ("width", cfg.width)):
        if pixels is not None and pixels % unit:
            raise ValueError(
                f"source {cfg.where!r}: {side} = {pixels}: {family.name} works on multiples of {unit} pixels; use "
                f"{max(unit, round(pixels / unit) * unit)}"
            )
    if "transformer" in pipe.components:
        unit = pipe.vae_scale_factor * family.patch
        family.check_positions(pipe.transformer, unit, cfg.height, cfg.width, f"source {cfg.where!r}: ")


def open_export(cfg: SourceConfig) -> PipelineSource:
    """An exported folder: its LoRA on the base pipeline, or the merged pipeline, with the arguments of its card."""
    folder = Path(cfg.where)
    info = read_export(folder)
    given = set(cfg.model_fields_set)
    own = cfg if "dtype" in given else cfg.model_copy(update={"dtype": info["dtype"]})
    base = None
    loras = [LoraFile(**one) for one in info.get("loras", ())]
    _check_revision(cfg, cfg.where if info["merged"] else cfg.base or info["base"])
    if info["merged"]:
        pipe = _load(own, cfg.where, info["without"])
    else:
        revision = {key: info.get(key) for key in ("revision", "variant") if key not in given and not cfg.base}
        below, where = own.model_copy(update=revision), cfg.base or info["base"]
        pipe = _load(below, where, info["without"])
        base = weights_content(located(where), below.revision, below.variant)
        trained_on = info.get("base_content", base)
        if base != trained_on and "@" not in base + trained_on:  # a hub id and a folder cannot be compared
            log.warning("the LoRA in %s was trained on another base model: %s has different content", folder, where)
        fuse_loras(pipe, [lora_factors(pipe, one) for one in loras])
        add_lora(pipe, str(folder / DIFFUSERS_FILE), 1.0, quiet=True)
        pipe.scheduler = _from_folder(info["scheduler"], folder / "scheduler")
    weights: dict[str, Any] = {"weights": weights_content(cfg.where), "base": base, **_unprocessed(pipe)}
    weights |= {"loras": [lora_content(one.path, one.revision) for one in loras]} if loras else {}
    known = SourceInfo(
        name=cfg.name,
        kind="export",
        where=cfg.where,
        shapes=info["shapes"],
        nfe=int(info["arguments"]["num_inference_steps"]),
        step=info["step"],
        trained=tuple(dict.fromkeys((*info["rewards"], *cfg.trained))),
        batch=cfg.batch or (BATCH if info["shapes"] else 4),
        device=device_name(pipe.device),
        identity={"kind": "export", **weights, "dtype": own.dtype, "arguments": info["arguments"]},
    )
    return PipelineSource(known, pipe, info["arguments"])


def read_export(folder: Path) -> dict[str, Any]:
    """The description that ``gdmd export`` wrote. RunError for a damaged file."""
    path = folder / EXPORT_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        missing = {"base", "dtype", "merged", "scheduler", "arguments", "rewards", "step"} - info.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}); export the run again") from error
    if missing or not isinstance(info["arguments"], dict) or "num_inference_steps" not in info["arguments"]:
        raise RunError(f"{path} lacks {', '.join(sorted(missing)) or 'its arguments'}; export the run again")
    info = {"without": [], "shapes": False, **info}
    lists = all(isinstance(info[key], list) for key in ("rewards", "without"))
    known = info["dtype"] in DTYPES and isinstance(info["base"], str) and isinstance(info["shapes"], bool)
    if not known or not lists:
        raise RunError(f"{path} is damaged; export the run again")
    return info


def _load(cfg: SourceConfig, where: str, without: Sequence[str] = ()) -> Any:
    """The pipeline on its device. without: components that are not loaded."""
    require_diffusers()
    what, where, device = f"source {where!r}", located(where), pick_device(cfg.device)
    import diffusers
    from transformers.utils import logging

    for library in (diffusers.utils.logging, logging):
        library.disable_progress_bar()
    try:
        local = is_local(where)
    except ValueError as error:
        raise ValueError(
            f"{what}: there is no such folder, and it is not a hub id (ORG/NAME); if the base model of "
            "an exported LoRA has moved, give base=FOLDER"
        ) from error
    index = read_index(where, cfg.revision, what, local=local)
    _check_index(index, where, what, without)
    left_out = _left_out(index, without, Path(where))
    if local:
        check_folders(Path(where), index, left_out, what)
        check_files(Path(where), index, left_out, cfg.variant, what, "variant")
    options = {"dtype": DTYPES[cfg.dtype], "variant": cfg.variant, "use_safetensors": True}
    try:
        options["local_files_only"] = local or bool(unreachable(where, INDEX, cfg.revision))
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            where, **options, **left_out, **({} if local else {"revision": cfg.revision})
        )
    except load_errors() as error:
        explain(error, where, cfg.revision, what, local=local)
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{what}: the pipeline cannot be loaded: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    fit_limits(pipe, lambda encoder: None)
    return pipe.to(device)


def _check_index(index: dict[str, Any], where: str, what: str, without: Sequence[str]) -> None:
    """ValueError for a pipeline that cannot be loaded with these libraries, or that lacks a component."""
    _check_class(index, what)
    check_libraries(index, what)
    if message := checker_off(index, where):
        log.warning("%s", message)
    for family in FAMILIES:
        if family.pipeline == index["_class_name"]:
            check_needed(index, family.needs, family.pipeline, what)
            if is_local(where) and not set(family.optional) & set(without):
                check_t5(Path(where), index, family, what, "")


def _check_class(index: Mapping[str, Any], what: str) -> None:
    """ValueError for a pipeline class that diffusers does not have, or that needs an input image."""
    import diffusers

    named = index.get("_class_name")
    if not isinstance(named, str) or not hasattr(diffusers, named):
        raise ValueError(
            f"{what}: {INDEX} names the pipeline class {named!r}, which diffusers {diffusers.__version__} does not have. "
            "If it is a newer class, update diffusers; custom pipeline code is not loaded"
        )
    if advice := from_an_image(named):
        raise ValueError(f"{what} is a {named}: {advice}")


def _left_out(index: Mapping[str, Any], without: Sequence[str], folder: Path) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that leave out components, the safety checker and the watermark.

    Missing components are passed as None: not every pipeline treats them as optional.
    """
    import diffusers

    known = [name for name, given in index.items() if given == [None, None] or name in components(index)]
    optional = [name for family in FAMILIES if family.pipeline == index.get("_class_name") for name in family.optional]
    missing = [*absent(index, known), *absent(index, [name for name in optional if name in known], folder)]
    arguments: dict[str, Any] = dict.fromkeys(name for name in known if name in (*without, *missing, *EXTRAS))
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    switches = inspect.signature(kind.__init__).parameters if kind is not None else ()
    return arguments | {name: False for name in ("requires_safety_checker", "add_watermarker") if name in switches}


def _from_folder(kind: str, folder: Path) -> Any:
    """The scheduler of an export, of a kind that ``gdmd export`` writes."""
    import diffusers

    if kind not in ("LCMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        raise RunError(f"{folder.parent / EXPORT_FILE} names the scheduler {kind!r}; export the run again")
    return getattr(diffusers, kind).from_pretrained(folder)
