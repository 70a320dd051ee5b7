"""A Python function as a reward, with TRL's contract:

    function(images, prompts, **columns) -> one number per image, as a list, an array or a tensor [B]

images: a tensor [B, 3, H, W] in [0, 1] or, if the function has the attribute ``image_type = "pil"``, a list of PIL images.
prompts: a list of texts. columns: the metadata of the prompts (other columns of the file or dataset) that the function
has a parameter for, each a list with one entry per image. NaN, or None in a list, means "not scored".

An instance with ``__call__`` and an nn.Module work as well; a module is frozen and moved to the device of the images.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gdmd.config.load import validated
from gdmd.config.rewards import CallableConfig, FunctionConfig, function_label
from gdmd.diffusion.device import raise_where, to_device_async
from gdmd.rewards.base import RewardModel
from gdmd.rewards.preprocessing import check_images, to_pil
from gdmd.rewards.user_code import called, imported, location_of, object_source, own_function

if TYPE_CHECKING:
    from gdmd.types import PromptBatch, Reward

FIXED = ("images", "prompts")
"""What every function gets; a column cannot have these names."""


class CallableReward(RewardModel):
    """A function as a ``Reward``; unless ``differentiable``, it runs without gradient.

    differentiable, image_type: default: the attributes of the function with these names, else False and "tensor".
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "",
        differentiable: bool | None = None,
        image_type: str | None = None,
    ) -> None:
        self.function, self.name = function, name or function_name(function)
        self._device: str | None = None  # None: that of the images
        marked = bool(getattr(function, "differentiable", False))
        self.differentiable = marked if differentiable is None else differentiable
        self.image_type = image_type or getattr(function, "image_type", "tensor")
        facts = {"name": self.name, "differentiable": self.differentiable, "image_type": self.image_type}
        self.config = validated(
            FunctionConfig, facts | {"source": object_source(function)}, f"reward {self.name}{location_of(function)}"
        )
        if inspect.iscoroutinefunction(own_function(function)):
            raise ValueError(
                f"reward {self.name}{location_of(function)} is async; write an ordinary function that calls "
                "asyncio.run on the parts that wait"
            )
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)
        self._parameters = _Parameters.of(function)
        if problem := self._parameters.problem:
            raise ValueError(
                f"reward {self.name}{location_of(function)} cannot be called with (images, prompts): {problem}; give it "
                "these two parameters"
            )

    @classmethod
    def from_config(
        cls, config: CallableConfig | FunctionConfig, function: Callable[..., Any] | None = None
    ) -> CallableReward:
        """From "module:function" or "file.py:function", or the given object. ValueError if it cannot be imported."""
        if isinstance(config, CallableConfig):
            name, function = function_label(config.target), imported(config.target)
        else:
            name = config.name
        assert function is not None
        reward = cls(function, name, config.differentiable, config.image_type)
        reward.config = config
        return reward

    def to(self, device: str) -> CallableReward:
        """Move the weights of an nn.Module; any function then gets its images on this device."""
        self._device = device
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32.

        ValueError unless the function returns one number per image, does not modify the images and, if
        ``differentiable``, passes a gradient to them.
        """
        check_images(self.name, images, len(prompts))
        before = images._version
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            given = to_pil(images) if self.image_type == "pil" else images.to(self._device or images.device)
            positional, named = self._parameters.arguments(self._shown, given, list(prompts.text), columns_of(prompts))
            answer = called(f"reward {self.name}", self.function, *positional, **named)
        if images._version != before:
            raise self.modified()
        scores = _numbers(self._shown, answer)
        wanted = torch.is_grad_enabled() and images.requires_grad  # another reward may have set requires_grad itself
        constant = wanted and self.differentiable and not scores.requires_grad
        if constant and not scores.isnan().all():
            raise self.without_gradient()
        if scores.shape != (len(images),):
            raise ValueError(
                f"{self._shown} returned shape {list(scores.shape)} for {len(images)} images; "
                "return one number per image"
            )
        raise_where(
            scores.isinf(),
            lambda samples: ValueError(
                f"{self._shown} is infinite at samples {samples}; return NaN for an image without a score"
            ),
        )
        scores = to_device_async(scores, images.device)
        return scores + 0 * images.flatten(1).sum(1) if constant else scores  # nothing was scored: a gradient of 0

    def modified(self) -> ValueError:
        """The error for a function that changed its images."""
        return ValueError(
            f"{self._shown} modified the images in place, but other rewards also read them; use images.clone()"
        )

    def without_gradient(self) -> ValueError:
        """The error for a function that is marked differentiable and is not."""
        return ValueError(
            f"{self._shown} is marked differentiable, but its scores carry no gradient; compute them in torch "
            "without detach, item or numpy, or set differentiable=false"
        )

    @property
    def _shown(self) -> str:
        """For errors: the name, and where the function is defined."""
        return f"reward {self.name}{location_of(self.function)}"


def as_reward(given: Any) -> Reward:
    """A reward as it is, anything else as a ``CallableReward``."""
    return given if hasattr(given, "score") else CallableReward(given)


def function_name(function: Any) -> str:
    """The name of a function, or of the class of another callable. ValueError for what cannot be called, and classes."""
    if inspect.isclass(function):
        raise ValueError(f"reward {function.__name__} is a class; give an instance: {function.__name__}()")
    if not callable(function):
        raise ValueError(
            f"a reward of type {type(function).__name__} cannot be called; give a function (images, prompts, **columns)"
        )
    while isinstance(function, partial):
        function = function.func
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "<lambda>":
        raise ValueError(f"a lambda{location_of(function)} has no name for the log; write it as a function with def")
    return name


def columns_of(prompts: PromptBatch) -> dict[str, list[Any]]:
    """The metadata of the prompts by column, None where a prompt lacks one; without the prompt itself."""
    found = (*(name for row in prompts.meta for name in row), *sorted(prompts.columns))
    names = dict.fromkeys(name for name in found if name not in (*FIXED, "prompt"))
    return {name: [row.get(name) for row in prompts.meta] for name in names}


@dataclass(frozen=True)
class _Parameters:
    """What a function accepts.

    by_keyword: images and prompts are passed as keywords; otherwise as the first two positional arguments.
    columns: names of its other parameters; everything: it has **columns. required: columns without a default.
    problem: why it cannot be called with images and prompts.
    """

    by_keyword: bool = False
    columns: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()
    everything: bool = False
    problem: str = ""

    @classmethod
    def of(cls, function: Any) -> _Parameters:
        try:
            signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
        except (TypeError, ValueError):  # some functions that are written in C
            return cls()
        found, kinds = signature.parameters, inspect.Parameter
        named = [one for one in found.values() if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        anything = any(one.kind is kinds.VAR_KEYWORD for one in found.values())
        fixed = [one.name for one in named if one.name in FIXED]
        by_keyword = len(fixed) == 2 or (anything and (bool(fixed) or not named))
        others = [one for one in named if one.name not in FIXED] if by_keyword else named[2:]
        required = tuple(one.name for one in others if one.default is kinds.empty)
        problem = "" if by_keyword else _problem(signature)
        return cls(by_keyword, frozenset(one.name for one in others), required, anything, problem)

    def arguments(
        self, shown: str, images: Any, prompts: list[str], columns: Mapping[str, list[Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of one call. ValueError for a column that the prompts lack."""
        if missing := [name for name in self.required if name not in columns]:
            known = f"only {', '.join(map(repr, columns))}" if columns else "none besides the text"
            raise ValueError(
                f"{shown} needs the column {missing[0]!r}, but the prompts have {known}; add it to the prompts, or give "
                "the parameter a default"
            )
        named = {name: values for name, values in columns.items() if self.everything or name in self.columns}
        if self.by_keyword:
            return (), {"images": images, "prompts": prompts, **named}
        return (images, prompts), named


def _problem(signature: inspect.Signature) -> str:
    """Why two positional arguments do not fit; "" if they do."""
    try:
        signature.bind_partial(None, None)
    except TypeError as error:
        return str(error)
    return ""


def _numbers(shown: str, answer: Any) -> Tensor:
    """The scores that a function returned, as fp32."""
    try:
        if isinstance(answer, (list, tuple)):
            answer = _stacked([math.nan if one is None else one for one in answer])
        elif isinstance(answer, np.ndarray) and answer.dtype.kind not in "USc":
            # a copy: the array may be read-only; None and masked entries become NaN
            answer = np.ma.filled(answer.astype(np.float32), np.nan)
        if isinstance(answer, Tensor) and (answer.is_complex() or answer.is_meta):
            raise TypeError("complex numbers" if answer.is_complex() else "on the meta device, without values")
        return torch.as_tensor(answer, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{shown} returned {type(answer).__name__} ({str(error)[:100]}); return one number per image, as a tensor "
            "[B] or a list, NaN or None for an image without a score"
        ) from error


def _stacked(entries: list[Any]) -> Any:
    """A list with tensors of one number as one tensor [B], which has their gradient; any other list as it is."""
    tensors = [one for one in entries if isinstance(one, Tensor)]
    if not tensors:
        return entries
    if any(one.is_complex() for one in tensors):
        raise TypeError("complex numbers")
    place = tensors[0].device
    return torch.stack([torch.as_tensor(one, dtype=torch.float32, device=place).reshape(()) for one in entries])
