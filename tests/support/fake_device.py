"""A pretended accelerator: tensors that say they are on another device, keep their numbers here, and count waits.

Where the host would wait for a GPU an event is counted: a number that is read (``item``, ``tolist``), a shape that the
data decide (``nonzero``, a mask as an index), a copy between host and device that is not asked to be asynchronous, a
tensor made of Python's numbers on the device. Work on tensors of both sides together is refused, as on a GPU. The
device is called "meta": besides "cpu" the only one whose gradients need no driver. Not seen: waits inside of kernels.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import gdmd

DEVICE = "meta"
PACKAGE = Path(gdmd.__file__).parent
READ = {"_local_scalar_dense", "equal", "is_nonzero"}
SHAPED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}


class Elsewhere(Tensor):
    """A tensor of the pretended device; ``host`` has its numbers."""

    host: Tensor
    waits: Waits

    @staticmethod
    def __new__(cls, host: Tensor, waits: Waits) -> Elsewhere:
        own = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        own.host, own.waits = host, waits
        return own

    def tolist(self) -> Any:
        self.waits.count("tolist")
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended device")


class Waits(TorchDispatchMode):
    """Inside, the device exists. ``places``: how often each line of the project waited while ``counting``."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.counting = False

    def count(self, what: str) -> None:
        if self.counting:
            self.places[f"{what} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, named = func.overloadpacket.__name__, dict(kwargs or {})
        tensors: list[Tensor] = []
        own_args, own_named = _on_host((args, named), tensors)
        there = any(isinstance(one, Elsewhere) for one in tensors)
        wanted = named.get("device")
        if not there and (wanted is None or torch.device(wanted).type != DEVICE):
            return func(*args, **named)
        self._judge(name, args, named, tensors)
        if wanted is not None:
            own_named["device"] = torch.device("cpu")
        answer = func(*own_args, **own_named)
        back = name == "_to_copy" and wanted is not None and torch.device(wanted).type == "cpu"
        if back or name in READ:
            return answer
        answer = self._moved(answer)
        return return_and_correct_aliasing(func, args, named, answer) if there else answer

    def _moved(self, answer: Any) -> Any:
        """The answer of an operation, its tensors on the device."""
        if isinstance(answer, (list, tuple)):
            return type(answer)(self._moved(one) for one in answer)
        return Elsewhere(answer, self) if isinstance(answer, Tensor) and not isinstance(answer, Elsewhere) else answer

    def _judge(self, name: str, args: Any, named: dict[str, Any], tensors: list[Tensor]) -> None:
        here = [one for one in tensors if not isinstance(one, Elsewhere)]
        assert not any(one.is_meta for one in here), f"{name} at {_place()}: a tensor that has no numbers"
        later = named.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if name == "copy_" and len(here) == 1 and not later:
            self.count(name)
        elif name == "_to_copy" and named.get("device") is not None and not later:
            if isinstance(args[0], Elsewhere) != (torch.device(named["device"]).type == DEVICE):
                self.count(name)
        elif name in READ | SHAPED_BY_DATA:
            self.count(name)
        elif name in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.count(f"{name} by a mask")
        if name not in COPIES:
            strangers = [tuple(one.shape) for one in here if one.ndim]
            assert not strangers, f"{name} at {_place()}: tensors of the host {strangers} among those of the device"


def _on_host(given: Any, tensors: list[Tensor]) -> Any:
    """What an operation was given, with the numbers of its tensors, which are noted (torch's pytree takes far longer)."""
    if isinstance(given, Tensor):
        tensors.append(given)
        return given.host if isinstance(given, Elsewhere) else given
    if isinstance(given, (list, tuple)):
        return type(given)(_on_host(one, tensors) for one in given)
    if isinstance(given, dict):
        return {name: _on_host(one, tensors) for name, one in given.items()}
    return given


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Waits, with those functions of torch wrapped that reach their device below its dispatcher."""
    waits = Waits()
    whole = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "where", "autocast")}

    def made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(values: Any, **options: Any) -> Tensor:
            device = options.pop("device", None)
            if device is None or torch.device(device).type != DEVICE or isinstance(values, Elsewhere):
                return function(values, **options, **({} if device is None else {"device": device}))
            waits.count(function.__name__)
            return function(values, **options).to(DEVICE, non_blocking=True)

        return make

    def where(condition: Tensor, *values: Any) -> Any:
        if isinstance(condition, Elsewhere):
            numbers = {"device": DEVICE}
            values = tuple(one if isinstance(one, Tensor) else torch.full((), one, **numbers) for one in values)
        return whole["where"](condition, *values)

    def autocast(device: str, *args: Any, **options: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device == DEVICE else whole["autocast"](device, *args, **options)

    patch.setattr(torch, "tensor", made(whole["tensor"]))
    patch.setattr(torch, "as_tensor", made(whole["as_tensor"]))
    patch.setattr(torch, "where", where)
    patch.setattr(torch, "autocast", autocast)
    with waits:
        yield waits


def _place() -> str:
    """The innermost line of the package, wherever that is installed."""
    own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
    return f"{Path(own[-1].filename).relative_to(PACKAGE).as_posix()}:{own[-1].name}" if own else "a test"
