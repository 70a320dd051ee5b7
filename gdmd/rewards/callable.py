"""Any Python function as a reward: ``module:function`` or ``path/to/file.py:function``.

    def function(images: Tensor[B, 3, H, W] in [0, 1], prompts: Sequence[str]) -> Tensor[B] | Sequence[float]

The function runs in this process with all its rights: name only code you trust. NaN means "not scored".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.config.rewards import function_label
from gdmd.diffusion.device import refuse_where, sent
from gdmd.rewards.images import check_images

if TYPE_CHECKING:
    from gdmd.types import PromptBatch

Scoring = Callable[[Tensor, Sequence[str]], "Tensor | Sequence[float]"]


class CallableReward:
    """A function as a ``Reward``. Without ``differentiable`` it runs without gradient."""

    def __init__(self, function: Scoring, name: str, differentiable: bool = False) -> None:
        self.function, self.name, self.differentiable = function, name, differentiable

    @classmethod
    def from_target(cls, target: str, differentiable: bool = False) -> CallableReward:
        """From "module:function" or "file.py:function". ValueError when it cannot be imported or is no function."""
        return cls(imported(target), function_label(target), differentiable)

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32. ValueError unless the function gives one number per image."""
        check_images(self.name, images, len(prompts))
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            answer = self.function(images, prompts.text)
        scores = torch.as_tensor(answer, dtype=torch.float32)
        if scores.shape != (len(images),):
            raise ValueError(
                f"reward {self.name} returned shape {list(scores.shape)} for {len(images)} images; "
                "return one number per image"
            )
        refuse_where(
            scores.isinf(),
            lambda places: ValueError(
                f"reward {self.name} is infinite at samples {places}; return NaN for an image without a score"
            ),
        )
        return sent(scores, images.device)


def imported(target: str) -> Any:
    """The function "module:function" or "path/to/file.py:function". ValueError when it cannot be had.

    Modules are looked up as Python does, the current folder last (the ``gdmd`` program itself lies elsewhere).
    """
    module, colon, name = target.rpartition(":")
    if not (module and colon and name):
        raise ValueError(f"reward function {target!r}: write it as module:function, for example my_rewards:brightness")
    try:
        found = getattr(_from_file(module) if module.endswith(".py") else _from_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward function {target!r} cannot be imported ({error}); check the name, and that its folder is on "
            "PYTHONPATH, or write path/to/file.py:function"
        ) from error
    if not callable(found):
        raise ValueError(f"reward {target!r} is a {type(found).__name__}, not a function; name a function")
    return found


def _from_module(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


def _from_file(file: str) -> Any:
    """A file as a module, once; what lies beside it can be imported by it."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    known = [one for one in list(sys.modules.values()) if getattr(one, "__file__", None) == str(path)]
    if known:
        return known[0]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"gdmd_reward_{path.stem}_{abs(hash(str(path)))}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
