"""LoRA (arXiv 2106.09685) through PEFT: several adapters on one frozen network, of which at most one is active at a time.

y = W x + scale (alpha / rank) B A x with W frozen in the backbone's dtype, A and B in fp32; B = 0 at the start, so that
every adapter starts as the backbone itself.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gdmd.models.activation_checkpointing import checkpointed


@dataclass(frozen=True)
class ActiveAdapter:
    """Which adapter is active, and its scale; without one the network is the frozen backbone."""

    name: str | None = None
    scale: float = 1.0


NO_ADAPTER = ActiveAdapter()


class CastingLinear(nn.Linear):
    """A linear layer that keeps fp32 weights and computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class CastingConv2d(nn.Conv2d):
    """A convolution that keeps fp32 weights and computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(x, self.weight.to(x.dtype), None)
        return output


class SharedBackbone:
    """A frozen network, its adapters, and which of them is active.

    Callers must select the adapter with ``set_adapter`` before each forward pass; a checkpointed block restores the
    adapter that was active in its forward pass.
    """

    def __init__(
        self,
        net: Any,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        device: torch.device | None,
        *,
        checkpointing: bool,
    ) -> None:
        """device: of the adapters; None = with their layers."""
        self.net = net.requires_grad_(False).eval()
        self.rank, self.alpha, self.targets, self.device = rank, alpha, tuple(targets), device
        self.active = NO_ADAPTER
        self.compiled = False
        self._layers: list[Any] = []
        if checkpointing or getattr(net, "is_gradient_checkpointing", False):  # its own would not restore the adapter
            self.set_checkpointing(on=checkpointing)

    def add(self, adapter: str, seed: int) -> None:
        """Add an adapter with B = 0 and A uniform in +-1/sqrt(inputs), drawn from ``seed`` alone."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config: Any = LoraConfig(r=self.rank, target_modules=list(self.targets))
        config.lora_alpha = self.alpha
        with warnings.catch_warnings():  # PEFT warns of a second adapter on a network, which is what we want
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self.net, adapter)
        self._layers = [module for module in self.net.modules() if isinstance(module, LoraLayer)]
        generator = torch.Generator().manual_seed(seed)
        for layer in self._layers:
            _initialize(layer, adapter, generator, self.device)
        self.net.requires_grad_(False)
        for name, weights in self.net.named_parameters():
            weights.requires_grad_(_trained(name))
        self._activate(self.active)

    def set_checkpointing(self, *, on: bool) -> None:
        """Switch activation checkpointing."""
        if on:
            self.net.enable_gradient_checkpointing(self._checkpointed)
        else:
            self.net.disable_gradient_checkpointing()

    def weights(self, adapter: str) -> dict[str, Parameter]:
        """The adapter's A and B, by names without the adapter's own: BLOCK.to_q.lora_A.weight."""
        infix = f".{adapter}."
        return {k.replace(infix, "."): v for k, v in self.net.named_parameters() if infix in k and ".lora_" in k}

    def set_adapter(self, adapter: ActiveAdapter) -> Any:
        """Activate an adapter, or none, and return the network."""
        if adapter != self.active:
            self._activate(adapter)
        return self.net

    def _activate(self, adapter: ActiveAdapter) -> None:
        # PEFT's own set_adapter also toggles requires_grad, which belongs to the optimizers here
        for layer in self._layers:
            layer._disable_adapters = adapter.name is None
            layer._active_adapter = [] if adapter.name is None else [adapter.name]
            if adapter.name is not None:
                layer.scaling[adapter.name] = self._scaling(adapter.scale)
        self.active = adapter

    def _scaling(self, scale: float) -> float | Tensor:
        """scale alpha / rank. A compiled graph is specialized on a number, not on the value of a 0-d tensor.

        So annealed scales are tensors. Scale 1, which most calls use, is a number that is folded into their graphs.
        """
        number = scale * self.alpha / self.rank
        return torch.tensor(number, device="cpu") if self.compiled and scale != 1 else number

    def _checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        """Activation checkpointing of one block, recomputed with the adapter that is active now."""
        active = self.active
        return checkpointed(block, inputs, lambda: self._requires_grad(active), lambda: self.set_adapter(active))

    def _requires_grad(self, adapter: ActiveAdapter) -> bool:
        return adapter.name is not None and bool(self._layers[0].lora_A[adapter.name].weight.requires_grad)


def check_targets(net: nn.Module, targets: Sequence[str]) -> None:
    """ValueError that names every entry of model.lora_targets that matches no layer, or one that cannot take an adapter.

    A target is a layer's name, or the end of one, as in a PEFT list; patterns and "all-linear" are not supported.
    """
    layers = {name: module for name, module in net.named_modules() if name}
    wrong = []
    for target in targets:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        refused = next((name for name in matched if not _adaptable(layers[name])), None)
        if not matched and (target == "all-linear" or re.search(r"[^\w.\s-]", target)):
            wrong.append(
                f"{target!r} is a pattern, but only names of layers or their ends are supported, such as to_q; [] takes "
                "the default ones of the model"
            )
        elif not matched:
            wrong.append(f"{target!r} matches no layer{_nearest(target, layers)}")
        elif refused is not None:
            inside = {
                n.removeprefix(f"{refused}.") for n in layers if n.startswith(f"{refused}.") and _adaptable(layers[n])
            }
            advice = f"; in it are {', '.join(f'{target}.{n}' for n in sorted(inside)[:6])}" if inside else ""
            wrong.append(f"{target!r} matches {refused} ({type(layers[refused]).__name__}), not a linear layer{advice}")
    if wrong:
        raise ValueError(f"model.lora_targets do not fit {type(net).__name__}: {'. '.join(wrong)}")


def _adaptable(layer: nn.Module) -> bool:
    """Linear layers and ungrouped convolutions: what we add adapters to, merge and export."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _nearest(target: str, layers: Mapping[str, nn.Module]) -> str:
    """A hint "; did you mean ...?" with the most similar layer name, or end of one with as many parts."""
    counts = (target.count(".") + 1, target.count(".") + 2)
    names = [name.split(".")[-n:] for name, module in layers.items() if _adaptable(module) for n in counts]
    ends = {".".join(parts).lower(): ".".join(parts) for parts in names if not parts[0].isdigit()}
    near = difflib.get_close_matches(target.lower(), sorted(ends, key=lambda end: (end.count("."), end)), 1)
    return f"; did you mean {ends[near[0]]!r}?" if near else f"; the layers are {', '.join(sorted(ends.values())[:8])}"


def _trained(name: str) -> bool:
    """Student and fake score are trained; the old policy only follows."""
    return ".lora_" in name and (".student." in name or ".fake." in name)


def remove_adapters(net: Any) -> None:
    """Remove the adapters of an earlier training from a network; its own weights stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        net.set_submodule(name, layer.get_base_layer())
    net.__dict__.pop("peft_config", None)


@torch.no_grad()
def _initialize(layer: Any, adapter: str, generator: torch.Generator, device: torch.device | None) -> None:
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    bound = 1 / math.sqrt(down.weight[0].numel())
    start = (2 * torch.rand(down.weight.shape, generator=generator) - 1) * bound
    down.weight.data = start.to(device or down.weight.device)
    up.weight.data = torch.zeros_like(up.weight, dtype=torch.float32, device=device or up.weight.device)
    layer.lora_A[adapter], layer.lora_B[adapter] = _casting(down), _casting(up)
    layer.cast_input_dtype_enabled = False


def _casting(layer: Any) -> nn.Module:
    """The same layer as one that casts its weights."""
    casting: nn.Module
    if isinstance(layer, nn.Linear):
        casting = CastingLinear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        window = (layer.kernel_size, layer.stride, layer.padding)
        casting = CastingConv2d(layer.in_channels, layer.out_channels, *window, bias=False, device="meta")
    casting.weight = layer.weight
    return casting
