"""The user's code: importing "module:function" or "path/to/file.py:function", calling it, and a hash of its source.

It runs in this process with all its permissions: name only code that you trust. Errors show the user's own line.
"""

from __future__ import annotations

import ast
import dis
import importlib
import importlib.util
import inspect
import os
import secrets
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.names import near
from gdmd.io import content_hash


def called(what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """function(*arguments, **named). Any exception, also sys.exit, becomes a ValueError with the user's failing line."""
    try:
        with _torch_defaults_kept():
            return function(*arguments, **named)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first frame is the call above
        raise ValueError(f"{what} failed{_own_line(frames)}: {_named(error)}") from error


@contextmanager
def _torch_defaults_kept() -> Iterator[None]:
    """Restore grad mode, default dtype and default device, which the user's code may change."""
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _own_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """The deepest frame in the folder of the user's first one: their code, not that of a library they call."""
    users = [frame for frame in frames if not _is_library(frame.filename)] or frames
    if not users:
        return " when it was called"
    folder = str(Path(users[0].filename).parent)
    own = [users[0], *(frame for frame in frames if frame.filename.startswith(folder))][-1]
    return f" at {own.filename}:{own.lineno}, in {own.name}" + (f": `{own.line}`" if own.line else "")


def _is_library(file: str) -> bool:
    """Whether a file is installed, such as torch/nn/modules/module.py, which calls the ``forward`` of the user."""
    installed = file.startswith(sysconfig.get_path("stdlib")) or file.startswith("<frozen")
    return installed or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def own_function(given: Any) -> Any:
    """The function that a call of ``given`` runs: forward of a module, __call__ of an instance, func of a partial."""
    while isinstance(given, partial):
        given = given.func
    if isinstance(given, nn.Module):
        return given.forward
    return inspect.unwrap(given) if hasattr(given, "__name__") else given.__call__


def location_of(given: Any) -> str:
    """ " (FILE:LINE)" of the definition of a callable; "" for one that is not written in Python."""
    code = getattr(own_function(given), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def object_source(given: Any) -> str | None:
    """A hash of the source code of a function, or of the class of another callable; None if Python does not know it.

    With the arguments that ``functools.partial`` binds, the variables of an enclosing function, and the arguments of
    ``__init__`` that an instance keeps under their names: numbers, strings, tensors and the parameters of modules by value,
    other objects by their class.
    """
    bound: list[str] = []
    while isinstance(given, partial):
        bound += [_value(one) for one in given.args]
        bound += [f"{name}={_value(one)}" for name, one in sorted(given.keywords.items())]
        given = given.func
    bound += [*_enclosed(given), *_kept(given)]
    own = getattr(given, "__self__", given)  # of a bound method
    bound += [_value(own)] if isinstance(own, nn.Module) else []
    try:
        source = inspect.getsource(given if hasattr(given, "__name__") else type(given))
    except (OSError, TypeError):
        return None
    return content_hash(textwrap.dedent(source), *bound)


def _enclosed(function: Any) -> Iterator[str]:
    """The variables of an enclosing function that a function reads, but not those that it sets, such as a counter."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return
    own = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        with suppress(ValueError):  # a variable without a value yet
            if name not in own:
                yield f"{name}={_value(cell.cell_contents)}"


def _kept(given: Any) -> Iterator[str]:
    """The arguments of ``__init__`` that an instance, also that of a bound method, keeps as NAME or _NAME.

    Other attributes may change during the training, such as a counter.
    """
    instance = getattr(given, "__self__", given)
    if inspect.isroutine(instance) or inspect.ismodule(instance):
        return
    try:
        names = inspect.signature(type(instance).__init__).parameters
    except (TypeError, ValueError):  # some classes that are written in C
        return
    attributes = getattr(instance, "__dict__", {})
    for name in names:
        for attribute in (name, f"_{name}"):
            if attribute in attributes:
                yield f"{attribute}={_value(attributes[attribute])}"


def _value(bound: Any) -> str:
    if bound is None or isinstance(bound, str | int | float):
        return repr(bound)
    tensors: Mapping[str, Tensor] = {"": bound} if isinstance(bound, Tensor) else {}
    if isinstance(bound, nn.Module):  # not its buffers, which a call may change
        tensors = dict(bound.named_parameters())
    return " ".join([type(bound).__qualname__, *(f"{name} {_content(one)}" for name, one in tensors.items())])


def _content(tensor: Tensor) -> str:
    """A hash of a tensor's values; the shape of one that holds none (meta), or not as they are (a quantized one)."""
    plain = tensor.detach()
    if plain.is_meta or type(plain) is not Tensor:
        return str(tuple(plain.shape))
    plain = plain.cpu().contiguous()
    return content_hash(str(plain.dtype), str(tuple(plain.shape)), plain.flatten().view(torch.uint8).numpy().tobytes())


def imported(target: str) -> Any:
    """The function "module:function" or "path/to/file.py:function"; of a class, an instance made without arguments.

    ValueError if it cannot be loaded. Modules are found as usual, and in the current folder last (it is not on the path of
    the ``gdmd`` program).
    """
    found = named(target)
    if inspect.isclass(found):
        found = called(f"reward {target}: creating the class without arguments", found)
        _require_callable(target, found)
    return found


def named(target: str) -> Any:
    """The function that a target names, or the class, not yet instantiated. ValueError if it cannot be loaded or used."""
    found = _found(target)
    if inspect.isclass(found):
        _require_no_arguments(target, found)
    _require_callable(target, found)
    return found


def _require_callable(target: str, found: Any) -> None:
    if not callable(found):
        raise ValueError(
            f"reward {target!r} is of type {type(found).__name__}, which cannot be called; name a function, or a class "
            "with __call__"
        )


def _require_no_arguments(target: str, found: type) -> None:
    """ValueError for a class that cannot be instantiated without arguments."""
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(
            f"reward {target!r} is a class, which is instantiated without arguments ({error}); give the parameters of its "
            "__init__ defaults, or name a function or an instance"
        ) from error
    except ValueError:  # some classes that are written in C have no signature
        return


def _found(target: str) -> Any:
    """The function or class that a target names."""
    module, colon, name = target.rpartition(":")
    if not (module and colon and name):
        raise ValueError(f"reward function {target!r}: write it as module:function, for example my_rewards:brightness")
    try:
        with _torch_defaults_kept():
            loaded = _from_file(module) if module.endswith(".py") else _from_module(module)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(
            f"reward function {target!r}: {error.filename}:{error.lineno}: `{line}`: {error.msg}"
        ) from error
    except (Exception, SystemExit) as error:  # the module may do anything when it is imported
        raise ValueError(f"reward function {target!r}{_not_imported(error)}") from error
    found = getattr(loaded, name, None)
    if found is None and getattr(loaded, "__file__", None) is None and hasattr(loaded, "__path__"):
        raise ValueError(
            f"reward function {target!r} cannot be imported: {module} is a folder ({next(iter(loaded.__path__))}) without "
            f"an __init__.py; write {module}/FILE.py:{name}"
        )
    if found is None:
        where = f"{module} ({getattr(loaded, '__file__', None) or 'built into Python'})"
        meant = near(name, [one for one, own in vars(loaded).items() if callable(own)])
        advice = f"did you mean '{meant[0]}'?" if meant else "check the name, or write path/to/file.py:function"
        raise ValueError(f"reward function {target!r}: {where} has no '{name}'; {advice}")
    return found


def _not_imported(error: BaseException) -> str:
    """Why the import failed: the module was not found, or one of its lines raised."""
    own = [one for one in traceback.extract_tb(error.__traceback__) if not _is_import_machinery(one.filename)]
    if own:
        exits = '; put code that runs as a program below `if __name__ == "__main__":`'
        advice = exits if isinstance(error, SystemExit) else ""
        return f": importing it failed{_own_line(own)}: {_named(error)}{advice}"
    return (
        f" cannot be imported ({error}); check the name, and that its folder is on PYTHONPATH, or write "
        "path/to/file.py:function"
    )


def _is_import_machinery(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _from_module(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(module)


def _from_file(file: str) -> Any:
    """Import a file as a module, once; it can import modules next to it."""
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


def source_hash(target: str) -> str:
    """A hash of the code of a function: its module, and the modules of the same folder that it imports.

    Data files and installed packages do not count. A module without a file gets a random hash.
    """
    _found(target)
    path, _, name = target.rpartition(":")
    module = sys.modules.get(path) or _loaded_from(Path(path).expanduser().resolve())
    return content_hash(name, _module_hash(module))


def _loaded_from(file: Path) -> ModuleType:
    return next(module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == str(file))


@cache  # of the code that was imported, even if the file changes later
def _module_hash(module: ModuleType) -> str:
    if not module.__file__:
        return secrets.token_hex()
    file = Path(module.__file__)
    depth = module.__name__.count(".") + (file.stem == "__init__")
    found: dict[Path, bytes] = {}
    _collect(file, module.__name__, file.parents[depth], found)
    return content_hash(*(found[one] for one in sorted(found)))


def _collect(file: Path, name: str, root: Path, found: dict[Path, bytes]) -> None:
    """Read a module and the modules below ``root`` (the folder it is imported from) that it imports."""
    found[file] = file.read_bytes()
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for other in _imports(found[file], package):
        if root.name in ("site-packages", "dist-packages") and other.split(".")[0] != name.split(".")[0]:
            continue
        path = root.joinpath(*other.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file() and candidate not in found:
                _collect(candidate, other, root, found)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Absolute names that a module may import; none if it is not Python source."""
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
