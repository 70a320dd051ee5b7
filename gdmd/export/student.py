"""A student as a stock diffusers pipeline in memory, with its sampler as the defaults of the call."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.export.lora import folded
from gdmd.export.pipeline import call_arguments, student_scheduler
from gdmd.models.families.base import Family
from gdmd.types import StudentSampler

STEPS = ("num_inference_steps", "timesteps", "sigmas")
"""Arguments of a call that say at which times the network is called: one that the caller gives replaces all."""


def student_pipeline(
    family: Family, weights: Mapping[str, Tensor], uniform: Sequence[float], sampler: StudentSampler = "renoise"
) -> Any:
    """The family's pipeline with the student ``weights`` (adapters, or all weights), its scheduler and its call.

    ``family``: what the student starts as, with its text encoders. It may be in training: its frozen weights are shared,
    everything else is copied, so that neither disturbs the other.
    """
    component = denoiser_of(family.pipe)
    net = without_adapters(family.net)
    if any(".lora_A." in name for name in weights):
        layers = {f"{component}.{name}": value for name, value in folded(family, weights).items()}
        net.load_lora_adapter(layers, prefix=component)
    else:
        place, dtypes = family.encoder.device, {name: one.dtype for name, one in net.named_parameters()}
        own = {name: value.detach().to(place, dtypes[name], copy=True) for name, value in weights.items()}
        net.load_state_dict(own, strict=False, assign=True)
        net.to(place)
    pipe = copy.copy(family.pipe)
    scheduler = student_scheduler(family, uniform, sampler)
    pipe.register_modules(**{component: net.requires_grad_(False).eval()}, scheduler=scheduler)
    return with_call(pipe, call_arguments(family, uniform))


def with_call(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """The same pipeline, whose call has these defaults.

    Its class becomes a subclass of the same name. ``save_pretrained`` writes a plain pipeline, with the LoRA merged.
    """
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **given: Any) -> Any:
        known = inspect.signature(kind.__call__).bind_partial(self, *args, **given).arguments
        replaced = STEPS if any(name in known for name in STEPS) else ()
        own = {name: value for name, value in arguments.items() if name not in known and name not in replaced}
        return kind.__call__(self, *args, **given, **own)

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **given: Any) -> Any:
        plain = copy.copy(self)
        plain.__class__ = kind
        adapted = [name for name, part in self.components.items() if hasattr(part, "peft_config")]
        plain.register_modules(**{name: without_adapters(getattr(self, name), merged=True) for name in adapted})
        return plain.save_pretrained(*args, **given)

    names = ("__module__", "__qualname__", "__doc__")
    methods = {"__call__": call, "save_pretrained": save_pretrained}
    pipe.__class__ = type(kind.__name__, (kind,), {name: getattr(kind, name) for name in names} | methods)
    return pipe


def denoiser_of(pipe: Any) -> str:
    """The name of the component that is distilled."""
    return "unet" if "unet" in pipe.components else "transformer"


@torch.no_grad()
def without_adapters(net: nn.Module, *, merged: bool = False) -> Any:
    """A copy of a network that shares its weights, without LoRA layers; ``merged``: with the active ones added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    plain: Any = copy.deepcopy(net, shared)
    layers: list[tuple[str, Any]] = [(n, one) for n, one in plain.named_modules() if isinstance(one, BaseTunerLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        if merged:
            change = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            base.weight = nn.Parameter((base.weight.float() + change).to(base.weight.dtype), requires_grad=False)
        plain.set_submodule(name, base)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    for block in plain.modules():
        if hasattr(vars(block).get("forward"), "_torchdynamo_orig_callable"):  # compiled: calls the original's block
            del block.forward
    if hasattr(plain, "disable_gradient_checkpointing") and plain.is_gradient_checkpointing:  # a diffusers network
        plain.disable_gradient_checkpointing()
    return plain
