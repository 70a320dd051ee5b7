"""Diffusers pipelines and exported students as sources of images, their noise keyed by image.

LCM, SDXL-Lightning, Hyper-SD, Turbo, TDM and other published checkpoints enter a comparison this way: pipeline, LoRA,
scheduler, steps and guidance are all that they need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gdmd.backbones.packing import in_patches, pack
from gdmd.backbones.pipelines import INDEX, check_libraries, is_local, load_errors, read_index, require_diffusers
from gdmd.config.sources import SourceConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.export.lora import DIFFUSERS_FILE
from gdmd.hub import offline, unreachable
from gdmd.io import RunError
from gdmd.programs.source_schedulers import set_scheduler, step_arguments
from gdmd.programs.sources import EXPORT_FILE, Facts, Place, to_images

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HASHED = 64 * 2**20
"""Bytes of a weight file that enter its fingerprint."""


class KeyedNoise(TorchFunctionMode):
    """While it is entered, every ``torch.randn`` of a pipeline's batch gives the noises of its images.

    Draw n of image k is that of ``SampleRng`` for (seed, key of k): n = 0 the initial latents, n >= 1 the re-noising, as
    in gdmd's own sampler. Pipelines draw for the batch (generator None) or image by image (each its own generator).
    ``patched``: what they draw first stands in patches of 2 x 2.
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
        if func is not torch.randn:
            return func(*args, **given)
        generator = given.get("generator")
        shape = tuple(args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args)
        count = len(self._draws)
        alone = generator is not None and count > 1
        rows = [self._place[id(generator)]] if alone else list(range(count))
        if len(shape) < 2 or shape[0] != len(rows):
            raise ValueError(
                f"a pipeline drew noise of shape {list(shape)} for {count} images, which cannot be keyed by image; "
                "use another scheduler"
            )
        noise = torch.cat([self._noise(k, shape[1:]) for k in rows])
        return noise.to(device=given.get("device"), dtype=given.get("dtype"))

    def _noise(self, k: int, shape: tuple[int, ...]) -> Tensor:
        """Draw n of image k, [1, *shape]. A packed shape holds the noise of the first draw's latents, packed."""
        n, self._draws[k] = self._draws[k], self._draws[k] + 1
        own = SampleRng(self.rng.seed, self.rng.step, self.rng.index[k : k + 1])
        purpose = "eval_rollout" if n else "eval_noise"
        self._first = self._first or shape
        if self.patched:
            c, h, w = self._first
            noise = own.normal(purpose, (c // 4, 2 * h, 2 * w), n)
            return pack(noise) if len(shape) == 2 else in_patches(noise)
        packed = len(shape) == 2 and len(self._first) > 2
        noise = own.normal(purpose, self._first if packed else shape, n)
        return pack(noise.reshape(1, *self._first[-3:])) if packed else noise


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers pipeline and the arguments of its call."""

    facts: Facts
    pipe: Any
    arguments: Mapping[str, Any]

    def check(self, texts: Sequence[str]) -> None:
        """Any text is a prompt."""

    @torch.no_grad()
    def make(self, places: Sequence[Place], seed: int) -> list[Image]:
        rng = SampleRng(seed, 0, torch.tensor([place.key for place in places]))
        words = [hashlib.sha256(f"image {seed} {place.key}".encode()).digest() for place in places]
        generators = [torch.Generator().manual_seed(int.from_bytes(word[:6], "big")) for word in words]
        texts, patched = [place.text for place in places], type(self.pipe).__name__.startswith("Flux2")
        with KeyedNoise(rng, generators, patched=patched):
            made = self.pipe(prompt=texts, generator=generators, output_type="pt", **self.arguments)
        return to_images(made.images.float(), self.facts.name)


def open_pipeline(cfg: SourceConfig) -> PipelineSource:
    """The pipeline with its LoRA and scheduler, on its device."""
    pipe = _load(cfg, cfg.where)
    if cfg.lora:
        _add_lora(pipe, cfg.lora, cfg.lora_scale)
    if cfg.scheduler or cfg.spacing or cfg.shift is not None:
        set_scheduler(pipe, cfg)
    guided = "true_cfg_scale" if type(pipe).__name__ == "QwenImagePipeline" else "guidance_scale"
    asked = {"num_inference_steps": cfg.steps, guided: cfg.guidance, "height": cfg.height, "width": cfg.width}
    if guided == "true_cfg_scale" and cfg.guidance is not None and cfg.guidance > 1:
        asked["negative_prompt"] = " "  # without one the pipeline leaves guidance off
    arguments = {key: value for key, value in asked.items() if value is not None} | step_arguments(pipe, cfg)
    beside = {"name", "where", "checkpoint", "batch", "device", "trained", "lora", "base"}
    beside |= {"shift", "timesteps", "eta"} - cfg.model_fields_set  # folders made before there were these go on
    settings = cfg.model_dump(mode="json", exclude=beside)
    identity = {"kind": "pipeline", **settings, "weights": _fingerprint(cfg.where), "lora": _fingerprint(cfg.lora)}
    facts = Facts(cfg.name, "pipeline", cfg.where, trained=cfg.trained or None, batch=cfg.batch or 4, identity=identity)
    return PipelineSource(facts, pipe, arguments)


def open_export(cfg: SourceConfig) -> PipelineSource:
    """An exported folder: its LoRA on the base pipeline, or the merged pipeline, called as its card says."""
    folder = Path(cfg.where)
    facts = read_export(folder)
    given = set(cfg.model_fields_set)
    own = cfg if "dtype" in given else cfg.model_copy(update={"dtype": facts["dtype"]})
    if facts["merged"]:
        pipe = _load(own, cfg.where)
    else:
        revision = {key: facts.get(key) for key in ("revision", "variant") if key not in given and not cfg.base}
        pipe = _load(own.model_copy(update=revision), cfg.base or facts["base"], facts["without"])
        _add_lora(pipe, str(folder / DIFFUSERS_FILE), 1.0)
        pipe.scheduler = _from_folder(facts["scheduler"], folder / "scheduler")
    weights = _fingerprint(cfg.where)
    known = Facts(
        name=cfg.name,
        kind="export",
        where=cfg.where,
        nfe=int(facts["arguments"]["num_inference_steps"]),
        step=facts["step"],
        trained=cfg.trained or tuple(facts["rewards"]),
        batch=cfg.batch or 4,
        identity={"kind": "export", "weights": weights, "dtype": own.dtype, "arguments": facts["arguments"]},
    )
    return PipelineSource(known, pipe, facts["arguments"])


def read_export(folder: Path) -> dict[str, Any]:
    """The facts that ``gdmd export`` wrote. RunError for a damaged file."""
    path = folder / EXPORT_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        missing = {"base", "dtype", "merged", "scheduler", "arguments", "rewards", "step"} - facts.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}); export the run again") from error
    if missing or not isinstance(facts["arguments"], dict) or "num_inference_steps" not in facts["arguments"]:
        raise RunError(f"{path} lacks {', '.join(sorted(missing)) or 'its arguments'}; export the run again")
    facts.setdefault("without", [])
    lists = all(isinstance(facts[key], list) for key in ("rewards", "without"))
    if facts["dtype"] not in DTYPES or not isinstance(facts["base"], str) or not lists:
        raise RunError(f"{path} is damaged; export the run again")
    return dict(facts)


def _load(cfg: SourceConfig, where: str, without: Sequence[str] = ()) -> Any:
    """``without``: components that are not to be loaded."""
    require_diffusers()
    import diffusers
    from transformers.utils import logging

    for library in (diffusers.utils.logging, logging):
        library.disable_progress_bar()
    try:
        local = is_local(where)
    except ValueError as error:
        raise ValueError(
            f"source {where!r}: there is no such folder, and it is no hub id (ORG/NAME); name the pipeline below an "
            "exported LoRA, where it has moved, with base=FOLDER"
        ) from error
    what = f"source {where!r}"
    check_libraries(read_index(where, cfg.revision, what, local=local), what)
    options = {"dtype": DTYPES[cfg.dtype], "variant": cfg.variant, "use_safetensors": True}
    try:
        options["local_files_only"] = local or bool(unreachable(where, INDEX, cfg.revision))
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            where, **options, **dict.fromkeys(without), **({} if local else {"revision": cfg.revision})
        )
    except load_errors() as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{what}: the pipeline cannot be loaded: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _add_lora(pipe: Any, lora: str, scale: float) -> None:
    """A .safetensors file, a folder that holds one, or a hub id with or without a file."""
    place = Path(lora)
    if place.is_file():
        folder, options = str(place.parent), {"weight_name": place.name, "local_files_only": True}
    elif place.is_dir():
        folder, options = lora, {"weight_name": _one_file(place), "local_files_only": True}
    elif lora.count("/") in (1, 2) and not lora.startswith((".", "/", "~")) and not Path(lora.split("/")[0]).exists():
        org, name, *file = lora.split("/")
        folder, options = f"{org}/{name}", {"weight_name": file[0]} if file else {}
        options["local_files_only"] = bool(offline())
    else:
        raise ValueError(f"lora {lora!r}: no such file or folder, and no hub id; give ORG/NAME/FILE.safetensors")
    if not str(options.get("weight_name", ".safetensors")).endswith(".safetensors"):
        raise ValueError(f"lora {lora!r}: only .safetensors files are read; convert it first")
    try:
        pipe.load_lora_weights(folder, use_safetensors=True, adapter_name="source", **options)
    except (KeyError, *load_errors()) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"lora {lora!r} cannot be loaded into a {type(pipe).__name__}: {first}") from error
    if not pipe.get_list_adapters():
        raise ValueError(f"lora {lora!r} changes no layer of a {type(pipe).__name__}; give one of this model")
    if scale != 1.0:
        pipe.set_adapters("source", scale)


def _one_file(folder: Path) -> str:
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if DIFFUSERS_FILE in found or len(found) == 1:
        return DIFFUSERS_FILE if DIFFUSERS_FILE in found else found[0]
    raise ValueError(f"lora {folder}: it holds {len(found)} .safetensors files; name the one that is meant")


def _from_folder(kind: str, folder: Path) -> Any:
    """The scheduler of an export: one of the two that ``gdmd export`` writes."""
    import diffusers

    if kind not in ("LCMScheduler", "FlowMatchEulerDiscreteScheduler"):
        raise RunError(f"{folder.parent / EXPORT_FILE} names the scheduler {kind!r}; export the run again")
    return getattr(diffusers, kind).from_pretrained(folder)


def _fingerprint(where: str | None) -> str | None:
    """Of local weights: a hash over names, sizes and beginnings of the files; of a hub id: the id."""
    place = Path(where) if where else None
    if place is None or not place.exists():
        return where
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(place)} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HASHED))
    return digest.hexdigest()
