"""Third-party LoRAs on a diffusers pipeline: located, checked layer by layer, then loaded by diffusers or fused.

diffusers silently skips layers that do not fit. Here every layer of a file is first looked up in the pipeline.

    _open = locate (file, folder, hub) -> read_lora -> check_kind (a plain LoRA?) -> with_diffusers_keys (from the keys
    and alphas of many programs, lora_keys.py) -> _fit (which layers does the pipeline have?)
    add_lora = _open -> diffusers -> _check_loaded;    lora_factors = _open -> the factors B A of each layer
    fuse_loras = W + B A, in the denoiser and the text encoders
"""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.model import LoraFile
from gdmd.io import content_hash
from gdmd.models.lora_keys import (
    check_kind,
    denoiser_name,
    header_settings,
    layer_of,
    layers_of,
    read_lora,
    scale_of,
    with_diffusers_keys,
)
from gdmd.models.lora_location import locate
from gdmd.models.pipeline_files import load_errors, note_revision
from gdmd.models.tokens import ENCODER

ADAPTER = "source"
"""The name of the loaded adapter."""
_OF_TEXT = re.compile(r"lora_te\d?_|text_encoder")
"""Layers of text encoders, with kohya's, diffusers' and ComfyUI's names."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """The layers of a LoRA as COMPONENT.LAYER: found and missing in the pipeline.

    lost: layers, by their names in the file, that diffusers does not convert.
    """

    found: tuple[str, ...]
    missing: tuple[str, ...]
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For example "unet 22 of 22, text_encoder 0 of 4"."""
        names = [name.partition(".")[0] for name in (*self.found, *self.missing)]
        found = [name.partition(".")[0] for name in self.found]
        counts = [f"{one} {found.count(one)} of {names.count(one)}" for one in dict.fromkeys(names)]
        return ", ".join([*counts, *([f"{len(self.lost)} that diffusers does not convert"] if self.lost else [])])


@dataclass(frozen=True)
class _Opened:
    """A checked file. ``given``: its tensors with diffusers' keys; None if diffusers reads the file correctly itself."""

    file: Path
    weights: Mapping[str, Tensor]
    given: Mapping[str, Tensor] | None
    fit: Fit


def _open(pipe: Any, lora: str, revision: str | None = None, *, unloaded: bool = False) -> _Opened:
    file = locate(lora, revision)
    if Path(lora).exists():
        note_revision(f"lora {lora!r}", revision)
    weights = read_lora(file, lora)
    check_kind(weights, lora)
    given = with_diffusers_keys(weights, file, pipe, lora)
    with _translated(pipe, lora):
        return _Opened(file, weights, given, _fit(pipe, weights if given is None else given, unloaded))


def add_lora(pipe: Any, lora: str, scale: float, *, partial: bool = False, quiet: bool = False) -> None:
    """Load a LoRA into a pipeline: a .safetensors file, a folder with one, a PEFT folder, or a hub id of these.

    partial: accept a file of which the pipeline has only some layers; otherwise, and for another kind of adapter,
    ValueError. Logs how many layers were found unless ``quiet``.
    """
    opened = _open(pipe, lora)
    options: dict[str, Any] = {}
    if opened.given is None:  # diffusers reads the file itself, whose header may have alphas
        options = {"weight_name": opened.file.name, "local_files_only": True, "use_safetensors": True}
    if not (partial and opened.fit.found):
        _check_fit(opened.fit, pipe, lora, ", or set lora_partial=true to use the layers that fit")
    with _translated(pipe, lora), warnings.catch_warnings():
        # PEFT warns if another layer's name has the same ending; _check_loaded checks every layer
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
        ready = str(opened.file.parent) if opened.given is None else _loadable(pipe, opened.given)
        pipe.load_lora_weights(ready, adapter_name=ADAPTER, **options)
    _check_loaded(pipe, opened.fit, lora)
    if not quiet:
        _log.warning("lora %s: layers found in the pipeline: %s", lora, opened.fit)
    if scale != 1.0:
        pipe.set_adapters(ADAPTER, scale)


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""COMPONENT.LAYER -> (A [r, in, ...], B [out, r, ...]) of the change B A of its weight; alpha / rank and the LoRA's weight
are multiplied into B. The layers of a text encoder have the names of published files: text_model.encoder... fp32"""


def lora_factors(pipe: Any, lora: LoraFile, *, unloaded: bool = False) -> Factors:
    """What a LoRA adds to each layer of the pipeline's denoiser and text encoders, which are not changed.

    unloaded: the text encoders are not there yet; ``fuse_loras`` checks their layers. ValueError for layers that the
    pipeline does not have, and for layers of text encoders that diffusers does not load.
    """
    opened = _open(pipe, lora.path, lora.revision, unloaded=unloaded)
    _check_text(opened.fit, pipe, lora.path)
    _check_fit(opened.fit, pipe, lora.path)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with _translated(pipe, lora.path):
        state = _converted(pipe, opened.weights if opened.given is None else opened.given)
    for component in pipe._lora_loadable_modules:
        net = getattr(pipe, component, None)
        header = header_settings(opened.file, component) if opened.given is None else {}
        for layer, pair in _pairs(_of_component(state, component), net).items():
            down, up = pair["A"].float(), pair["B"].float()
            if "B.bias" in pair or (net is not None and down.shape[2:] != _layer(net, layer).weight.shape[2:]):
                raise ValueError(
                    f"lora {lora.path!r}: its layer {layer} has a bias or another kernel; give a plain LoRA"
                )
            scale = scale_of(header, layer, len(down)) if header else 1.0
            name = f"text_model.{layer}" if layer.startswith("encoder.") and component != denoiser_name(pipe) else layer
            found[f"{component}.{name}"] = (down, up * (scale * lora.weight))
    return found


def check_stock_loading(pipe: Any, lora: LoraFile) -> None:
    """ValueError for a LoRA that ``load_lora_weights`` alone does not load, or loads with other scales than we do.

    Examples: PEFT's folders, and ComfyUI's keys of families for which diffusers does not convert them.
    """
    wanted = {name.replace(".text_model.", "."): pair for name, pair in lora_factors(pipe, lora).items()}
    remedy = "Export without --no-loras, so that the exported LoRA contains it"
    try:
        with _translated(pipe, lora.path):
            pipe.load_lora_weights(str(locate(lora.path, lora.revision)), adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    found = {
        f"{component}.{name}".replace(".text_model.", "."): module
        for component in pipe._lora_loadable_modules
        for name, module in _named_modules(getattr(pipe, component, None))
        if ADAPTER in getattr(module, "lora_A", {})
    }
    wrong = sorted(wanted.keys() ^ found.keys())
    wrong += [name for name in wanted.keys() & found.keys() if not _same_change(wanted[name], found[name], lora.weight)]
    pipe.unload_lora_weights()
    if wrong:
        raise ValueError(
            f"lora {lora.path!r}: the code of a model card could not load it: diffusers alone reads {len(wrong)} of its "
            f"{len(wanted)} layers differently or not at all, such as {wrong[0]}. {remedy}"
        )


def _named_modules(net: Any) -> Iterator[tuple[str, Any]]:
    return iter(net.named_modules() if isinstance(net, nn.Module) else ())


def _same_change(pair: tuple[Tensor, Tensor], layer: Any, weight: float) -> bool:
    """Whether the loaded adapter changes its layer as B A does, by the answer to one input."""
    down, up = layer.lora_A[ADAPTER].weight.float().cpu(), layer.lora_B[ADAPTER].weight.float().cpu()
    loaded = down, up * (layer.scaling[ADAPTER] * weight)
    one, other = (up.flatten(1) @ down.flatten(1).sum(1) for down, up in (pair, loaded))
    return bool((one - other).norm() <= 0.02 * one.norm())


def of_text(factors: Factors) -> Factors:
    """The layers of the text encoders."""
    return {name: pair for name, pair in factors.items() if name.startswith(ENCODER)}


def factors_content(factors: Factors) -> str:
    """A hash of what a LoRA changes: layers, factors and weight, wherever its file is."""
    parts = ((name.encode(), *(part.cpu().numpy().tobytes() for part in factors[name])) for name in sorted(factors))
    return content_hash(*itertools.chain.from_iterable(parts))


@torch.no_grad()
def fuse_loras(pipe: Any, loras: Sequence[Factors], components: Collection[str] | None = None) -> None:
    """Add LoRAs to the weights of these components of the pipeline, by default of all.

    W + sum of B A, computed in fp32 and rounded once. ValueError for a layer of a text encoder that does not fit.
    """
    for name in dict.fromkeys(name for factors in loras for name in factors):
        component, _, layer = name.partition(".")
        if components is not None and component not in components:
            continue
        net, pairs = getattr(pipe, component), [factors[name] for factors in loras if name in factors]
        if not all(_fits(net, layer, {"A": down, "B": up}) for down, up in pairs):
            raise ValueError(
                f"a LoRA changes {name}, which this {type(pipe).__name__} does not have or has in another size; give "
                "a LoRA of this model in model.teacher_loras"
            )
        weight = _layer(net, layer).weight
        fused = weight.float()
        for down, up in pairs:
            fused = fused + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape).to(weight.device)
        weight.data = fused.to(weight.dtype)


def _check_text(fit: Fit, pipe: Any, lora: str) -> None:
    """ValueError for layers of text encoders that diffusers does not load: an export could not contain them either."""
    texts = [name for name in (*fit.missing, *fit.lost) if _OF_TEXT.match(name)]
    others = [name for name in texts if name.partition(".")[0] not in pipe._lora_loadable_modules]
    if others:
        raise ValueError(
            f"lora {lora!r} also changes text encoders ({len(others)} layers, the first is {others[0]}), but diffusers does "
            f"not load these layers into a {type(pipe).__name__}, so that an exported student could not have them. Give one "
            "that was trained without the text encoders, or remove these layers from the file"
        )


@contextmanager
def _translated(pipe: Any, lora: str) -> Iterator[None]:
    """Turn what diffusers raises for a file that it cannot convert or load into a ValueError."""
    try:
        yield
    except (KeyError, IndexError, AssertionError, *load_errors()) as error:  # type: ignore[misc]
        lacking = "it lacks " if isinstance(error, KeyError) else ""
        what = lacking + " ".join(str(error).split())[:300] or "its layers have other sizes"
        raise ValueError(f"lora {lora!r} cannot be loaded into a {type(pipe).__name__}: {what}") from error


def _check_fit(fit: Fit, pipe: Any, lora: str, otherwise: str = "") -> None:
    """ValueError unless all layers fit. ``otherwise``: what else to do about some that do not."""
    others, kind = (*fit.missing, *fit.lost), type(pipe).__name__
    total = len(fit.found) + len(others)
    if not fit.found:
        raise ValueError(
            f"lora {lora!r} changes no layer of a {kind}: 0 of its {total} layers are in it"
            + (f" (it has {others[0]})" if others else "")
            + ". Give a LoRA of this model"
        )
    if others:
        raise ValueError(
            f"lora {lora!r}: only {len(fit.found)} of its {total} layers are in a {kind} ({fit}); missing or of another "
            f"size: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}. Give a LoRA of this model{otherwise}"
        )


def _check_loaded(pipe: Any, fit: Fit, lora: str) -> None:
    """ValueError for a layer that diffusers skipped after all."""
    for name in fit.found:
        component, _, layer = name.partition(".")
        if ADAPTER not in getattr(getattr(pipe, component).get_submodule(layer), "lora_A", {}):
            raise ValueError(
                f"lora {lora!r}: diffusers does not load its layer {name}; convert it to PEFT's keys first"
            )


def _fit(pipe: Any, weights: Mapping[str, Tensor], unloaded: bool = False) -> Fit:
    """Which layers of a file diffusers finds in the pipeline; ``unloaded``: all of a component that is not loaded.

    Its conversion may lose some: it is run on tensors of the same sizes that are filled with the number of their layer.
    """
    layers = {layer: number for number, layer in enumerate(sorted(layers_of(weights)), start=1)}
    state = _converted(pipe, {key: _numbered(key, value, layers) for key, value in weights.items()})
    arrived = {int(value.flatten()[0]) for value in state.values() if value.numel()}
    found: list[str] = []
    missing = [key for key in state if key.partition(".")[0] not in pipe._lora_loadable_modules]
    for component in pipe._lora_loadable_modules:
        net = getattr(pipe, component, None)
        for layer, pair in _pairs(_of_component(state, component), net).items():
            fits = unloaded and {"A", "B"} <= pair.keys() if net is None else _fits(net, layer, pair)
            (found if fits else missing).append(f"{component}.{layer}")
    lost = [layer for layer, number in layers.items() if number not in arrived and not _repeated(layer, layers)]
    return Fit(tuple(found), tuple(dict.fromkeys(map(layer_of, missing))), tuple(lost))


def _converted(pipe: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA in diffusers' keys.

    Works around two gaps of its FLUX.1 conversion: layers outside the blocks get no component and would be skipped, and
    Black Forest Labs' layer names are only known with kohya's down and up.
    """
    given = dict(weights)
    if type(pipe).__name__ == "FluxPipeline" and all(key.startswith("diffusion_model.") for key in given):
        parts = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
        given = {re.sub(r"\.lora_[AB]\.", lambda found: parts[found[0]], key): value for key, value in given.items()}
    converted = pipe.lora_state_dict(given, **_unet(pipe))
    state = converted[0] if isinstance(converted, tuple) else converted
    component = denoiser_name(pipe)
    names = {name for name, _ in getattr(pipe, component).named_modules()}
    return {f"{component}.{key}" if layer_of(key) in names else key: value for key, value in state.items()}


def _loadable(pipe: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The argument of ``load_lora_weights``, which converts the keys of UNets, with their alphas, itself."""
    return _converted(pipe, given) if denoiser_name(pipe) == "transformer" else dict(given)


def _numbered(key: str, value: Tensor, layers: Mapping[str, int]) -> Tensor:
    """A tensor of the same size filled with the number of its layer. Alphas are kept: here they equal the rank."""
    return value if key.endswith(".alpha") else torch.tensor(float(layers[layer_of(key)])).expand(value.shape)


def _repeated(layer: str, layers: Container[str]) -> bool:
    """Whether a fused qkv, or "out", comes with its own parts: some Z-Image trainers write both."""
    block, _, name = layer.rpartition(".")
    parts = {"qkv": ("to_q", "to.q"), "out": ("to_out.0",)}.get(name, ())
    return any(f"{block}.{part}" in layers for part in parts)


def _of_component(state: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _layer(net: nn.Module, name: str) -> Any:
    """The layer of this name, in a text encoder of any version of transformers: since 5 some have no text_model."""
    return net.get_submodule(name if hasattr(net, "text_model") else name.removeprefix("text_model."))


def _pairs(own: Mapping[str, Tensor], net: Any) -> dict[str, dict[str, Tensor]]:
    """layer -> {"A": ..., "B": ...} of one component, converted as diffusers' loaders do."""
    from diffusers.utils import state_dict_utils

    convert: Any = state_dict_utils
    state: Any = dict(own)
    if isinstance(net, nn.Module) and hasattr(net, "load_lora_adapter"):
        if state and "lora_A" not in next(iter(state)):
            state = convert.convert_unet_state_dict_to_peft(state)
    elif state:
        state = convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(state))
        if not hasattr(net, "text_model"):
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, marker, rest = key.partition(".lora_")
        if not key.endswith(".alpha"):
            pairs.setdefault(layer, {})[rest.removesuffix(".weight") if marker else key] = value
    return pairs


def _fits(net: nn.Module, layer: str, pair: Mapping[str, Tensor]) -> bool:
    """Whether the network has this layer in this size."""
    if not {"A", "B"} <= pair.keys() <= {"A", "B", "B.bias"}:
        return False
    try:
        weight = _layer(net, layer).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and (pair["B"].shape[0], pair["A"].shape[1]) == tuple(weight.shape[:2])


def _unet(pipe: Any) -> dict[str, Any]:
    """What the SDXL conversion of other programs' block numbers needs."""
    return {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") and hasattr(pipe, "text_encoder_2") else {}
