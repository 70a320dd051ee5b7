"""One frozen network that wears one adapter at a time: LoRA (arXiv 2106.09685) through PEFT.

y = W x + scale (alpha / rank) B A x with W frozen in the trunk's dtype, A and B in fp32; B = 0 at the start, so that
every adapter begins as the trunk itself.
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

from gdmd.models.activation_checkpointing import recomputed


@dataclass(frozen=True)
class Wear:
    """Which adapter is on, and how strongly; no adapter is the frozen network."""

    adapter: str | None = None
    scale: float = 1.0


BARE = Wear()


class NarrowLinear(nn.Linear):
    """A linear layer that keeps fp32 weights and computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Trunk:
    """The network, its adapters, and what it wears now.

    What is worn stays on until the next ``wear``: everybody who runs the network says first what it shall wear, and
    a block that is recomputed in the backward pass puts on again what it wore in the forward pass.
    """

    def __init__(self, net: Any, rank: int, alpha: float, targets: Sequence[str], *, checkpointing: bool) -> None:
        self.net = net.requires_grad_(False).eval()
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.worn = BARE
        self.compiled = False
        self._layers: list[Any] = []
        if checkpointing:
            self.recompute(on=True)

    def add(self, adapter: str, seed: int) -> None:
        """A new adapter with B = 0 and A uniform in +-1/sqrt(inputs), drawn from ``seed`` alone."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config: Any = LoraConfig(r=self.rank, target_modules=list(self.targets))
        config.lora_alpha = self.alpha
        with warnings.catch_warnings():  # PEFT warns of the second adapter on a network, which is the point here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self.net, adapter)
        self._layers = [module for module in self.net.modules() if isinstance(module, LoraLayer)]
        generator = torch.Generator().manual_seed(seed)
        for layer in self._layers:
            _start(layer, adapter, generator)
        self.net.requires_grad_(False)
        for name, weights in self.net.named_parameters():
            weights.requires_grad_(_trained(name))
        self._dress(self.worn)

    def recompute(self, *, on: bool) -> None:
        """Switch activation checkpointing."""
        if on:
            self.net.enable_gradient_checkpointing(self._checkpointed)
        else:
            self.net.disable_gradient_checkpointing()

    def weights(self, adapter: str) -> dict[str, Parameter]:
        """The adapter's A and B by names that do not hold the adapter's: BLOCK.to_q.lora_A.weight."""
        own = f".{adapter}."
        return {k.replace(own, "."): v for k, v in self.net.named_parameters() if own in k and ".lora_" in k}

    def wear(self, wanted: Wear) -> Any:
        """Put on an adapter, or none, and return the network."""
        if wanted != self.worn:
            self._dress(wanted)
        return self.net

    def _dress(self, wanted: Wear) -> None:
        # PEFT's own set_adapter also switches requires_grad off and on, which belongs to the optimizers here
        for layer in self._layers:
            layer._disable_adapters = wanted.adapter is None
            layer._active_adapter = [] if wanted.adapter is None else [wanted.adapter]
            if wanted.adapter is not None:
                layer.scaling[wanted.adapter] = self._scaling(wanted.scale)
        self.worn = wanted

    def _scaling(self, scale: float) -> float | Tensor:
        """scale alpha / rank. A graph is compiled for every number but for no value of a 0-d tensor (annealed scales).

        Not for scale 1, which most calls wear: a number is folded into their graphs.
        """
        number = scale * self.alpha / self.rank
        return torch.tensor(number, device="cpu") if self.compiled and scale != 1 else number

    def _checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        """Activation checkpointing of one block, recomputed in what it wears now."""
        worn = self.worn
        return recomputed(block, inputs, lambda: self._trained(worn), lambda: self.wear(worn))

    def _trained(self, worn: Wear) -> bool:
        return worn.adapter is not None and bool(self._layers[0].lora_A[worn.adapter].weight.requires_grad)


def check_targets(net: nn.Module, targets: Sequence[str]) -> None:
    """ValueError that names every target of model.lora_targets without a layer, or with one that takes no adapter.

    A target is a layer's name, or the end of one, as PEFT reads a list; its patterns and "all-linear" are not read.
    """
    layers = {name: module for name, module in net.named_modules() if name}
    wrong = []
    for target in targets:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        refused = next((name for name in matched if not _adaptable(layers[name])), None)
        if not matched and (target == "all-linear" or re.search(r"[^\w.\s-]", target)):
            wrong.append(
                f"{target!r} is a pattern, and only names of layers or ends of them are read, such as to_q; [] takes the "
                "usual ones of the model"
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
    """Linear layers and ungrouped convolutions: what adapters are made for, merged and exported here."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _nearest(target: str, layers: Mapping[str, nn.Module]) -> str:
    """The words "; did you mean ...?" with the layer whose name, or end of a name of as many parts, is most like it."""
    counts = (target.count(".") + 1, target.count(".") + 2)
    names = [name.split(".")[-n:] for name, module in layers.items() if _adaptable(module) for n in counts]
    ends = {".".join(parts).lower(): ".".join(parts) for parts in names if not parts[0].isdigit()}
    near = difflib.get_close_matches(target.lower(), sorted(ends, key=lambda end: (end.count("."), end)), 1)
    return f"; did you mean {ends[near[0]]!r}?" if near else f"; known are {', '.join(sorted(ends.values())[:8])}"


def _trained(name: str) -> bool:
    """Student and fake are trained; the old policy only follows."""
    return ".lora_" in name and (".student." in name or ".fake." in name)


@torch.no_grad()
def _start(layer: Any, adapter: str, generator: torch.Generator) -> None:
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    bound = 1 / math.sqrt(down.weight[0].numel())
    start = (2 * torch.rand(down.weight.shape, generator=generator) - 1) * bound
    down.weight.data = start.to(down.weight.device)
    up.weight.data = torch.zeros_like(up.weight, dtype=torch.float32)
    if isinstance(down, nn.Linear):
        layer.lora_A[adapter], layer.lora_B[adapter] = _narrow(down), _narrow(up)
        layer.cast_input_dtype_enabled = False


def _narrow(linear: nn.Linear) -> NarrowLinear:
    own = NarrowLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    own.weight = linear.weight
    return own
