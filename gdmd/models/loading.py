"""Open a diffusers pipeline: find its family, check that it is complete, and explain what to do if it is not.

A local folder never needs the network. Heavy libraries are imported inside the functions.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gdmd.config.extras import install
from gdmd.config.model import DiffusersModel
from gdmd.config.shapes_pipeline import HUB_ID
from gdmd.diffusion.device import DTYPES
from gdmd.hub import hub_file, hub_reason, offline, unreachable
from gdmd.io import weights_fingerprint
from gdmd.models.families.base import Family, PipelineText, network_dtype
from gdmd.models.families.flux import Flux
from gdmd.models.families.flux2 import Flux2, Flux2Klein
from gdmd.models.families.krea2 import Krea2
from gdmd.models.families.qwen_image import QwenImage
from gdmd.models.families.qwen_image21 import QwenImage21
from gdmd.models.families.sana import Sana
from gdmd.models.families.sd3 import Sd3
from gdmd.models.families.sd15 import Sd15
from gdmd.models.families.sdxl import Sdxl
from gdmd.models.families.z_image import ZImage
from gdmd.models.lora import remove_adapters
from gdmd.models.lora_files import factors_content, fuse_loras, lora_factors, of_text
from gdmd.models.pipeline_files import (
    EXTRAS,
    INDEX,
    absent,
    check_files,
    check_folders,
    check_needed,
    components,
    instead_of_pipeline,
    load_errors,
    local_index,
    note_revision,
    refuse_offloaded,
    refuse_quantized,
)
from gdmd.models.quantization import quantization_config, require_quantizer
from gdmd.models.tokens import ENCODER, TOKENIZERS, fit_limits
from gdmd.types import Cond

log = logging.getLogger(__name__)
FAMILIES: tuple[type[Family], ...] = (
    *(Sd15, Sdxl, Sd3, Flux, Flux2, Flux2Klein, ZImage, QwenImage, QwenImage21, Sana, Krea2),
)
EXTRA_LIBRARIES = {"PixtralProcessor": "torchvision", "Qwen3VLProcessor": "torchvision"}
"""Classes of transformers that need another library (the tokenizers of FLUX.2-dev and Qwen-Image-2.1)."""
_FUSED = {"to_qkv", "to_kv", "to_added_qkv"}
"""Layers that diffusers' fuse_qkv_projections() adds; unfuse_qkv_projections() leaves them in some networks."""


def open_family(
    cfg: DiffusersModel,
    device: str = "cpu",
    *,
    encoders: bool = True,
    extras: bool = False,
    shared: Family | None = None,
) -> Family:
    """Open the pipeline at cfg.path as a Family, its weights frozen, in cfg.dtype, on ``device``.

    cfg.teacher_loras are fused into its denoiser and text encoders; cfg.student and cfg.student_lora are opened by
    ``open_start``.
    Without ``encoders`` the text encoders are not loaded; ``LazyTextEncoder`` loads them on first use. ``extras``: also
    load its safety checker and the like, for an export of the whole pipeline. ``shared``: a family whose VAE, text
    encoders and tokenizers are used as they are instead of loading them again.
    ValueError for a path or id that does not exist or is gated, an unknown or different family, or a missing component.
    """
    require_diffusers()
    require_quantizer(cfg, device)
    local, index = is_local(cfg.location, cfg.field), local_or_hub_index(cfg)
    family = family_of(index, cfg)
    what = cfg.what
    if local:
        check_pipeline(Path(cfg.location), index, family, cfg)
    else:
        check_needed(index, family.needs, family.pipeline, what)
    _check_tokens(family, cfg)
    if local:
        note_revision(what, cfg.revision)
    if shared is None:
        _note_t5(family, cfg)
    check_libraries(index, what)
    left_out: dict[str, Any] = {**_left_out(index, family, cfg, extras=extras)}
    own = {"unet", "transformer", "scheduler"}
    if shared is not None:
        left_out |= {k: part for k, part in shared.pipe.components.items() if k in index and k not in own}
    left_out |= {} if encoders else dict.fromkeys(name for name in components(index) if name.startswith(ENCODER))
    pipe = _load(family, cfg, local, left_out)
    later = not encoders or shared is not None
    loras = [lora_factors(pipe, one, unloaded=later) for one in cfg.teacher_loras]
    fuse_loras(pipe, loras, own if later else None)
    fit_limits(pipe, lambda encoder: _positions(cfg, encoder))
    _freeze(pipe)
    opened = family(pipe, cfg)
    if shared is None and cfg.student is None:  # else ``open_start`` knows both networks
        note_guidance(opened)
    opened.encoder.loras = tuple(map(of_text, loras))
    opened.check_sizes()
    opened.place(device, () if shared is None else shared.pipe.components.keys() - own)
    return opened


def adopt(pipe: Any, cfg: DiffusersModel, device: str = "cpu") -> Family:
    """A pipeline that is already open as a Family. Its networks are frozen and moved to ``device``.

    ValueError for a class without a family, a missing component, a LoRA that is not fused, projections that are, FreeU,
    offloading, and a dtype other than cfg.dtype.
    """
    require_diffusers()
    ours = {"student", "fake", "old"}  # of an earlier training on the same pipeline: replaced by new ones
    adapted = [name for name, part in pipe.components.items() if set(getattr(part, "peft_config", None) or ()) - ours]
    if adapted:  # only one adapter is active at a time, and training has its own
        raise ValueError(
            f"the given {type(pipe).__name__} has a LoRA in {', '.join(adapted)} as separate adapters, which training would "
            "leave out; call fuse_lora() and then unload_lora_weights() on it, or give a folder or hub id as model and the "
            "LoRA as model.teacher_loras"
        )
    given = {name: part for name, part in pipe.components.items() if part is not None}
    if compiled := [name for name, part in given.items() if hasattr(part, "_orig_mod")]:
        raise ValueError(
            f"{', '.join(compiled)} of the given {type(pipe).__name__} is compiled, and training adds adapters to the "
            "network itself: load the pipeline without torch.compile, and set model.compile=true"
        )
    refuse_offloaded(pipe)
    index = {"_class_name": type(pipe).__name__, **{name: ["", part] for name, part in given.items()}}
    family = family_of(index, cfg)
    missing = [name for name in family.needs if name not in index]
    if missing:
        raise ValueError(
            f"the {family.pipeline} was given without {', '.join(missing)}; load it with all its components"
        )
    _check_tokens(family, cfg)
    fit_limits(pipe, lambda encoder: None)
    opened = family(pipe, cfg)
    remove_adapters(opened.net)
    if fused := sorted(_FUSED & {name.rpartition(".")[2] for name, _ in opened.net.named_modules()}):
        raise ValueError(
            f"the denoiser of the given {family.pipeline} has fused projections ({', '.join(fused)}), and adapters on to_q, "
            "to_k and to_v would do nothing; load the pipeline again, without fuse_qkv_projections()"
        )
    if any(getattr(block, "b1", None) is not None for block in getattr(opened.net, "up_blocks", ())):
        raise ValueError(
            f"the given {family.pipeline} has FreeU on, which full copies and exported students would not have; call "
            "disable_freeu() on it"
        )
    opened.check_sizes()
    if (got := network_dtype(opened.net)) != DTYPES[cfg.dtype]:
        raise ValueError(
            f"the weights of the given {family.pipeline} are {str(got).removeprefix('torch.')}, and model.dtype is "
            f"{cfg.dtype}; load the pipeline in fp32 or bf16, and set dtype to the same"
        )
    _freeze(pipe)
    note_guidance(opened)
    pipe.set_progress_bar_config(disable=True)
    opened.place(device)
    return opened


class LazyTextEncoder:
    """The text encoders of a family that was opened without them, loaded when a caption is first embedded."""

    def __init__(self, family: Family) -> None:
        self.family, self._loaded = family, False

    def encode(self, texts: Sequence[str]) -> Cond:
        """See PipelineText."""
        return self.load().encode(texts)

    def null(self, count: int) -> Cond:
        """See PipelineText."""
        return self.load().null(count)

    def unload(self) -> None:
        """Free their memory; a no-op if they were never loaded."""
        if self._loaded:
            self.family.encoder.unload()

    def load(self) -> PipelineText:
        """Put them into the family's pipeline, unless this has done so before."""
        encoder, pipe = self.family.encoder, self.family.pipe
        if not self._loaded:
            kept = (ENCODER, *TOKENIZERS)
            others = dict.fromkeys(name for name in pipe.components if not name.startswith(kept))
            missing = _left_out(local_or_hub_index(self.family.cfg), type(self.family), self.family.cfg)
            loaded = _load(type(self.family), self.family.cfg, is_local(self.family.cfg.location), others | missing)
            _freeze(loaded)
            encoders = {name: part for name, part in loaded.components.items() if name.startswith(ENCODER)}
            fuse_loras(loaded, encoder.loras)
            pipe.register_modules(**{name: part.to(encoder.device) for name, part in encoders.items() if part})
            fit_limits(pipe, lambda encoder: None)
            self._loaded = True
        return encoder


def encoder_identity(family: Family) -> str:
    """What text embeddings depend on: content of encoders, their LoRAs and tokenizers, precision, length, libraries.

    The location of a folder does not matter: a moved copy shares the embeddings, a different model at the same path does
    not.
    """
    cfg, index = family.cfg, local_or_hub_index(family.cfg)
    left_out = _left_out(index, type(family), cfg)
    names = sorted(name for name in components(index, left_out) if name.startswith((ENCODER, *TOKENIZERS)))
    empty = family.pipe.config.get("force_zeros_for_empty_prompt")
    facts = [family.name, cfg.dtype, cfg.max_tokens, empty, *versions(), *content_of(cfg, names)]
    layers = family.pipe.config.get("text_encoder_select_layers")
    loras = [factors_content(one) for one in family.encoder.loras if one]
    blank = family.encoder.no_caption
    more = [*([layers] if layers else []), *([loras] if loras else []), *([{"no_caption": blank}] if blank else [])]
    return json.dumps([*facts, *more])


def content_of(cfg: DiffusersModel, names: Sequence[str]) -> list[object]:
    """What identifies the content of these components: fingerprints in a folder, or a hub id with its commit."""
    if is_local(cfg.location):
        return [[name, weights_fingerprint(Path(cfg.location) / name, cfg.variant)] for name in names]
    return [cfg.path, snapshot_of(cfg).name, cfg.variant, list(names)]


def snapshot_of(cfg: DiffusersModel) -> Path:
    """The pipeline's folder; for a hub id its folder in the cache, whose name is the commit."""
    return snapshot(cfg.location, cfg.revision, cfg.what)


def snapshot(path: str, revision: str | None, what: str) -> Path:
    """The folder at ``path``, or that of a hub id at a revision in the cache. ValueError starting with ``what``."""
    return _index_file(path, revision, what, local=is_local(path)).parent


def versions() -> tuple[str, str]:
    """Versions of the libraries that compute embeddings and latents: templates and attention change between them."""
    from importlib.metadata import version

    return f"diffusers {version('diffusers')}", f"transformers {version('transformers')}"


def _positions(cfg: DiffusersModel, encoder: str) -> int | None:
    """Size of the position table of a text encoder that is not loaded; None if its config is not available."""
    file = snapshot_of(cfg) / encoder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not downloaded yet: the limit is set when the encoder is loaded


def _check_tokens(family: type[Family], cfg: DiffusersModel) -> None:
    """ValueError for more caption tokens than the pipeline accepts: neither it nor the export could use them."""
    if cfg.max_tokens and family.fixed_captions:
        log.warning(
            "model.max_tokens = %d has no effect: the encoders of a %s read 77 tokens; leave it out",
            *(cfg.max_tokens, family.pipeline),
        )
    most = family.caption_limit
    if most is not None and cfg.max_tokens > most:
        raise ValueError(
            f"model.max_tokens = {cfg.max_tokens}: a {family.pipeline} reads at most {most} caption tokens; set {most} or "
            "less"
        )


def _note_t5(family: type[Family], cfg: DiffusersModel) -> None:
    """Warn about model.t5 = false for a family that needs all its text encoders."""
    if not cfg.t5 and not family.optional:
        log.warning(
            "model.t5 = false has no effect: a %s is used with all its text encoders; leave it out. model.embeddings "
            "unloads them before training",
            family.pipeline,
        )


def note_guidance(*families: Family) -> None:
    """Warn about a model.embedded_guidance that was set for networks of which none reads it."""
    first = families[0]
    given, default = first.cfg.embedded_guidance, type(first.cfg).model_fields["embedded_guidance"].default
    if given != default and not any(one.guidance_is_embedded for one in families):
        log.warning(
            "model.embedded_guidance = %g has no effect: this %s has no guidance embedding; leave it out. The guidance of "
            "the teacher is method.guidance",
            *(given, first.pipeline),
        )


def require_diffusers() -> None:
    """ValueError with the install command if the optional libraries are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers", "peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(f"diffusers pipelines need {', '.join(missing)}; do: {install('diffusers')}")


def is_local(path: str, field: str = "model.path", holds: str = INDEX) -> bool:
    """Whether ``path`` is a folder; false for a hub id. ValueError, naming ``field``, for a folder that does not exist."""
    if Path(path).is_dir():
        return True
    if Path(path).is_file():
        instead = instead_of_pipeline(Path(path)) if holds == INDEX else ""
        raise ValueError(f"{field} {path!r} is a file; give the folder that holds {holds}.{instead}")
    if re.fullmatch(HUB_ID, path) and not Path(path).parent.is_dir():
        return False
    raise ValueError(
        f"{field} {path!r}: there is no such folder, and it is not a hub id (ORG/NAME). {_suggestion(path, holds)}"
    )


def _suggestion(path: str, holds: str) -> str:
    """What to give instead of a path that does not exist."""
    if found := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path):
        return f"Give the id: {found[1]}"
    if path.startswith("~") and Path(path).expanduser().exists():
        return f"~ is not expanded here: give {Path(path).expanduser()}"
    return f"Give the folder that holds {holds}, or an id."


def family_of(index: dict[str, Any], cfg: DiffusersModel) -> type[Family]:
    """The family whose pipeline class the index names."""
    named = index.get("_class_name")
    for family in FAMILIES:
        if named == family.pipeline and cfg.family in (None, family.name):
            return family
        if named == family.pipeline:
            own = cfg.field == "model.path"
            remedy = f", use a recipe of {family.name}, or set model.family=null" if own else f" of {cfg.family}"
            raise ValueError(
                f"{cfg.what} is a {named} (family {family.name}), but model.family = {cfg.family}; give another path{remedy}"
            )
    known = ", ".join(f"{family.pipeline} ({family.name})" for family in FAMILIES)
    raise ValueError(
        f"{cfg.what}: {INDEX} names {named!r}, which has no adapter here; "
        + (from_an_image(named) or f"supported: {known}")
    )


_FROM_IMAGES = ("Img2Img", "Inpaint", "ControlNet")


def from_an_image(named: Any) -> str | None:
    """What to do about a pipeline that starts from an image, by its class name; None for other classes."""
    if not isinstance(named, str) or not any(word in named for word in _FROM_IMAGES):
        return None
    plain = [family.pipeline for family in FAMILIES if named.startswith(family.pipeline.removesuffix("Pipeline"))]
    remedy = "give a text-to-image pipeline"
    if plain:
        remedy = (
            "save its model as a text-to-image pipeline once, in diffusers: "
            f"{max(plain, key=len)}.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
        )
    return f"it starts from an image, but gdmd passes only prompts: {remedy}"


def family_of_pipeline(pipe: Any) -> type[Family] | None:
    """The family of a loaded pipeline; None for a class that has none."""
    return next((family for family in FAMILIES if family.pipeline == type(pipe).__name__), None)


def check_pipeline(folder: Path, index: Mapping[str, Any], family: type[Family], cfg: DiffusersModel) -> None:
    """ValueError for a folder that lacks what the family needs, or contains what cannot be loaded as it is.

    Folders with configs but no weights, which can be planned, are only checked for their components.
    """
    what = cfg.what
    left_out = _left_out(index, family, cfg)
    check_needed(index, family.needs, family.pipeline, what)
    check_folders(folder, index, left_out, what)
    if cfg.t5:
        check_t5(folder, index, family, what, "model.t5=false")
    if any(folder.glob("*/*.safetensors")) or any(folder.glob("*/*.bin")):
        check_files(folder, index, left_out, cfg.variant, what, "model.variant")


def check_t5(folder: Path, index: Mapping[str, Any], family: type[Family], what: str, remedy: str) -> None:
    """ValueError for a T5 without its tokenizer; a warning for one that the index names but the folder lacks."""
    lacks = absent(index, family.optional, folder)
    encoders = [name for name in family.optional if name.startswith(ENCODER)]
    if lacks and any(name not in lacks for name in encoders):
        raise ValueError(
            f"{what}: {', '.join(lacks)} is missing, but {', '.join(encoders)} is there; copy it, or leave both out"
            + (f" with {remedy}" if remedy else "")
        )
    for name in set(encoders) & set(lacks) & set(components(index)):
        log.warning("%s: %s has no folder, so captions are encoded without it", what, name)


def check_libraries(index: dict[str, Any], what: str) -> None:
    """ValueError for a component whose class needs a missing library; diffusers' own message does not name it."""
    from importlib.util import find_spec

    kinds = {name: given[1] for name, given in index.items() if isinstance(given, list) and len(given) == 2}
    for name, kind in kinds.items():
        library = EXTRA_LIBRARIES.get(str(kind))
        if library is not None and find_spec(library) is None:
            raise ValueError(
                f"{what}: component {name!r} ({kind}) needs {library}: install it with pip install {library}"
            )


def _left_out(
    index: Mapping[str, Any], family: type[Family], cfg: DiffusersModel, *, extras: bool = False
) -> dict[str, None]:
    """Optional components that are unwanted or missing, to be passed as None."""
    optional = (*family.optional, *(name for name in EXTRAS if name in index))
    missing = absent(index, optional, Path(cfg.location))
    unwanted = () if cfg.t5 else family.optional
    return dict.fromkeys(name for name in optional if name in (*missing, *unwanted, *(() if extras else EXTRAS)))


def has_safety_checker(index: Mapping[str, Any]) -> bool:
    """Whether the stock pipeline replaces flagged images by black ones."""
    return "safety_checker" in components(index)


def checker_off(index: Mapping[str, Any], where: str) -> str | None:
    """A message for a pipeline whose safety checker is not used; None if it has none."""
    if not has_safety_checker(index):
        return None
    return f"the safety checker of {where} is off, so no image is blacked out"


def local_or_hub_index(cfg: DiffusersModel) -> dict[str, Any]:
    """The model_index.json at cfg.path."""
    where = cfg.location
    return read_index(where, cfg.revision, cfg.what, local=is_local(where, cfg.field))


def read_index(path: str, revision: str | None, what: str, *, local: bool) -> dict[str, Any]:
    """The model_index.json of a folder or a hub id. ValueError starting with ``what`` if it cannot be read."""
    return local_index(_index_file(path, revision, what, local=local).parent, what)


def _index_file(path: str, revision: str | None, what: str, *, local: bool) -> Path:
    """The file itself; for a hub id, in the snapshot of its revision in the cache."""
    return Path(path) / INDEX if local else _hub_index(path, revision, what)


def _hub_index(path: str, revision: str | None, what: str) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hub_file(path, INDEX, revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        away = offline()
        raise ValueError(f"{what}: no such folder, and {hub_reason(error, INDEX, revision, away)}") from error


def _freeze(pipe: Any) -> None:
    """All networks of a pipeline: no gradients, eval mode."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()


def explain(error: Exception, path: str, revision: str | None, what: str, *, local: bool) -> None:
    """Raise a clearer ValueError for what is known only after the download of a hub id: quantized, or another variant."""
    if local:
        return
    folder = _index_file(path, revision, what, local=False).parent
    for config in sorted(folder.glob("*/config.json")):
        refuse_quantized(config.parent, config.parent.name, what)
    if "no file named" in str(error) or "variant" in str(error):
        raise ValueError(f"{what}: {error} If its files are named *.fp16.safetensors, set variant=fp16.") from error


def _load(family: type[Family], cfg: DiffusersModel, local: bool, left_out: Mapping[str, Any]) -> Any:
    import diffusers
    from transformers.utils import logging

    for library in (diffusers.utils.logging, logging):  # no bar per weight file: the run has its own
        library.disable_progress_bar()
    options = {"dtype": DTYPES[cfg.dtype], "variant": cfg.variant, "use_safetensors": True}
    options["local_files_only"] = local or bool(unreachable(cfg.location, INDEX, cfg.revision))
    options |= {"requires_safety_checker": False} if "safety_checker" in left_out else {}
    denoiser = "unet" if "unet" in family.needs else "transformer"
    options |= {} if denoiser in left_out else quantization_config(cfg, denoiser, DTYPES[cfg.dtype])
    try:
        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            cfg.location, **options, **left_out, **({} if local else {"revision": cfg.revision})
        )
    except load_errors() as error:
        what = cfg.what
        explain(error, cfg.location, cfg.revision, what, local=local)
        raise ValueError(f"{what}: the {family.pipeline} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
