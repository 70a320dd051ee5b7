"""Any Python function as a reward: ``module:function``.

    def function(images: Tensor[B, 3, H, W] in [0, 1], prompts: Sequence[str]) -> Tensor[B] | Sequence[float]

The function runs in this process with all its rights: name only code you trust. NaN means "not scored".
"""

from __future__ import annotations

import ast
import importlib
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.diffusion.device import refuse_where, sent
from gdmd.io import content_hash
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
        """From "package.module:function". ValueError when it cannot be imported or is no function."""
        return cls(imported(target), target, differentiable)

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
    """The function "package.module:function". ValueError when it cannot be imported or is no function."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"reward function {target!r}: write it as module:function, for example my_rewards:brightness")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward function {target!r} cannot be imported ({error}); check the name, and that its folder is on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"reward {target!r} is a {type(found).__name__}, not a function; name a function")
    return found


def source_hash(target: str) -> str:
    """A hash of the code behind "package.module:function": its module and the modules of its folder that it imports.

    Files that the function reads and installed packages do not enter. A module without a file never equals itself.
    """
    imported(target)
    place, _, name = target.rpartition(":")
    module = sys.modules.get(place) or _loaded_from(Path(place).expanduser().resolve())
    return content_hash(name, _module_hash(module))


def _loaded_from(file: Path) -> ModuleType:
    return next(module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(file))


@cache  # the code that was imported is what counts, also where the file changes later
def _module_hash(module: ModuleType) -> str:
    if not module.__file__:
        return secrets.token_hex()
    file = Path(module.__file__)
    depth = module.__name__.count(".") + (file.stem == "__init__")
    found: dict[Path, bytes] = {}
    _collect(file, module.__name__, file.parents[depth], found)
    return content_hash(*(found[one] for one in sorted(found)))


def _collect(file: Path, name: str, root: Path, found: dict[Path, bytes]) -> None:
    """Read a module and, where they lie below ``root`` (the folder it is imported from), those that it imports."""
    found[file] = file.read_bytes()
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for other in _imports(found[file], package):
        if root.name in ("site-packages", "dist-packages") and other.split(".")[0] != name.split(".")[0]:
            continue
        place = root.joinpath(*other.split("."))
        for candidate in (place.with_suffix(".py"), place / "__init__.py"):
            if candidate.is_file() and candidate not in found:
                _collect(candidate, other, root, found)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """The absolute names that a module may import; none where the file is not Python source."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parts, node.module or ""]))
            yield from filter(None, (base, *(f"{base}.{one.name}".strip(".") for one in node.names)))
