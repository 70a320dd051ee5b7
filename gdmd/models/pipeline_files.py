"""Check the folder of a pipeline before anything is loaded: its index, components, weights and tokenizers."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from gdmd.io import weight_variant

log = logging.getLogger(__name__)
INDEX = "model_index.json"
EXTRAS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Components of stock pipelines that check, mark or read images; not used here."""
_PICKLES = ("*.bin", "*.pt", "*.ckpt")


def local_index(folder: Path, what: str | None = None) -> dict[str, Any]:
    """The model_index.json of a folder; ``what`` starts the error for a folder that is not a pipeline."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        named = what or f"model.path {str(folder)!r}"
        raise ValueError(
            f"{named}: not a diffusers pipeline: {INDEX} is missing.{instead_of_pipeline(folder)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); copy the pipeline again") from error
    if not isinstance(index, dict):
        raise ValueError(f"{file}: expected an object, got {type(index).__name__}; copy the pipeline again")
    return index


def instead_of_pipeline(path: Path) -> str:
    """A sentence, after a space, about what is at ``path`` instead of a pipeline; empty if unknown."""
    if path.is_file():
        return _single_file(path)
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if names & {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}:
        return _LORA
    if "config.yaml" in names:
        return " It is a gdmd run folder: give its base model, and the run as loop.start_from."
    inner = [
        *(entry.parent for entry in sorted(path.glob(f"*/{INDEX}"))),
        *(entry.parent for entry in sorted(path.glob(f"snapshots/*/{INDEX}"))),
    ]
    if (path.parent / INDEX).is_file():
        inner = [path.parent]
    if inner:
        return f" Give {inner[-1]}."
    files = sorted(path.glob("*.safetensors"))
    return _single_file(files[0]) if files and "config.json" not in names else ""


_LORA = (
    " It is a LoRA: give its base model. To train on both, merge them once, in diffusers: pipe.load_lora_weights(LORA), "
    "pipe.fuse_lora(), pipe.unload_lora_weights(), pipe.save_pretrained(FOLDER)."
)


def _single_file(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    if path.name == INDEX:
        return f" Give {path.parent}."
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".bin"):
        return ""
    try:
        with safe_open(path, "numpy") as opened:
            lora = any("lora" in name.lower() for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        lora = False
    if lora:
        return _LORA
    return (
        f" {path.name} is a single-file checkpoint: convert it to a pipeline once, in diffusers: "
        "StableDiffusionXLPipeline (the class of its family).from_single_file(FILE).save_pretrained(FOLDER)."
    )


def components(index: Mapping[str, Any], without: Container[str] = ()) -> dict[str, str]:
    """The components named in an index, with their classes."""
    given = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    classes = {name: value[1] for name, value in given.items() if isinstance(value[1], str)}  # others are settings
    return {name: kind for name, kind in classes.items() if kind and name not in without}


def absent(index: Mapping[str, Any], names: Sequence[str], folder: Path | None = None) -> list[str]:
    """Which of these components the index does not name, or have no subfolder in ``folder``.

    A safety checker without its feature extractor counts as absent: diffusers rejects it.
    """
    named = components(index)
    lacks = [name for name in names if name not in named]
    if folder is not None and folder.is_dir():
        lacks += [name for name in names if name not in lacks and not (folder / name).is_dir()]
    if "feature_extractor" in lacks and "safety_checker" in names:
        lacks.append("safety_checker")
    return list(dict.fromkeys(lacks))


def check_needed(index: Mapping[str, Any], needs: Sequence[str], pipeline: str, what: str) -> None:
    """ValueError, starting with ``what``, for the first component that a ``pipeline`` needs and the index lacks."""
    for name in needs:
        if name not in components(index):
            raise ValueError(
                f"{what}: component {name!r} is missing from {INDEX}; a {pipeline} needs it. Save the pipeline again with "
                "all its components."
            )


def check_folders(folder: Path, index: Mapping[str, Any], without: Container[str], what: str) -> None:
    """ValueError for a component without a folder: diffusers would read files of other components instead."""
    for name, kind in components(index, without).items():
        if not (folder / name).is_dir():
            raise ValueError(
                f"{what}: component {name!r} ({kind}) has no folder {folder / name}; copy it there, or save the pipeline "
                "again"
            )


def check_files(
    folder: Path, index: Mapping[str, Any], without: Container[str], variant: str | None, what: str, option: str
) -> None:
    """ValueError for components that cannot be loaded, or would be loaded wrongly.

    These are quantized networks, weights in pickles or only in another variant (``option`` sets it), and tokenizers
    without their vocabulary, which transformers loads as empty ones.
    """
    found: set[str | None] = set()
    for name in components(index, without):
        part = folder / name
        if name.startswith("tokenizer"):
            _check_vocabulary(part, what)
            continue
        refuse_quantized(part, name, what)
        variants = {weight_variant(file.name) for file in part.glob("*.safetensors")}
        if variants and not variants & {None, variant}:
            found_variants = sorted(map(str, variants))
            raise ValueError(
                f"{what}: component {name!r} has weight files of the variant {', '.join(found_variants)} only; set "
                f"{option}={found_variants[0]}"
            )
        if not variants and any(file for kind in _PICKLES for file in part.glob(kind)):
            raise ValueError(
                f"{what}: the weights of component {name!r} are pickles (.bin), which are not read because they can run "
                "code. If you trust them, convert them to safetensors once, in diffusers: "
                "DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
            )
        found |= variants
    if variant is not None and found and variant not in found:
        log.warning(
            "%s: no component has weight files of the variant %r; those without a variant are read", what, variant
        )


def _check_vocabulary(folder: Path, what: str) -> None:
    names = {file.name for file in folder.iterdir()}
    whole = any(name in ("tokenizer.json", "vocab.txt", "tekken.json") or name.endswith(".model") for name in names)
    if not whole and not {"vocab.json", "merges.txt"} <= names:
        raise ValueError(
            f"{what}: {folder} contains no vocabulary (tokenizer.json, vocab.json with merges.txt, or a .model file): "
            "all captions would be read as empty; copy the folder again"
        )


def refuse_offloaded(pipe: Any) -> None:
    """ValueError for an open pipeline whose weights accelerate's hooks move, or keep on the meta device."""
    parts = {name: part for name, part in pipe.components.items() if hasattr(part, "modules")}
    hooked = [name for name, part in parts.items() if any(hasattr(one, "_hf_hook") for one in part.modules())]
    if hooked:
        raise ValueError(
            f"the given {type(pipe).__name__} offloads {', '.join(hooked)} to the CPU, which would move weights during "
            "training; call remove_all_hooks() on it, and set model.offload (idle or base) to save memory"
        )


def refuse_quantized(folder: Path, name: str, what: str) -> None:
    """ValueError for a component with quantized weights, as its config says."""
    try:
        quantized = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        method = quantized.get("quant_method")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # not a network's config, or a damaged one, which loading will report
    raise ValueError(
        f"{what}: component {name!r} is quantized ({method}), which is not supported; give the pipeline with its "
        "original weights (bf16 or fp32)"
    )


def note_revision(what: str, revision: str | None) -> None:
    """Warn about a revision of files on this machine, where there is only one."""
    if revision is not None:
        log.warning(
            "%s is not a hub id but on this machine, so its revision %r has no effect; leave it out", what, revision
        )


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors of a component that are loaded: those of the variant, else those without one."""
    files = sorted(folder.glob("*.safetensors"))
    chosen = [file for file in files if weight_variant(file.name) == variant]
    return chosen or [file for file in files if weight_variant(file.name) is None]


def load_errors() -> tuple[type[Exception], ...]:
    """What ``from_pretrained`` raises for files that are missing, damaged, of another shape or of an unknown class.

    diffusers turns a truncated weight file into an OSError; transformers, which loads the text encoders, does not.
    """
    from safetensors import SafetensorError

    return OSError, ValueError, ImportError, AttributeError, TypeError, LookupError, RuntimeError, SafetensorError
