"""Reading and writing files: atomic writes, JSON lines, content hashes, and the error for what the user can fix."""

from __future__ import annotations

import difflib
import errno
import hashlib
import ipaddress
import json
import math
import os
import shlex
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SHARDS_STAY = "Finished shards are kept; run the same command again to continue."
"""The consequence of a full disk for work that is done in shards."""
READ_WITH_WEIGHTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Extensions of configs and vocabularies next to safetensors."""
REMEMBERED = 4 * 2**20
"""File size, in bytes, from which the hash is kept in ~/.cache/gdmd/hashes."""


class RunError(ValueError):
    """A run folder, checkpoint or asset that cannot be read or written; the message says what to do."""


def all_errors(*checks: Callable[[], object]) -> None:
    """Run every check, then raise their ValueErrors as one with all messages; a single one is raised as it is."""
    found: list[ValueError] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        raise ValueError("\n".join(map(str, found)))


_ADVICE = {
    errno.ENOSPC: "Free some disk space, or choose another folder",
    errno.EDQUOT: "Free some of the disk quota, or choose another folder",
    errno.EACCES: "Check the folder's permissions, or choose another folder",
    errno.EPERM: "Check the folder's permissions, or choose another folder",
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.EEXIST: "A part of the path is a file: choose another folder",
    errno.ENOTDIR: "A part of the path is a file: choose another folder",
}


@contextmanager
def writing(what: str, path: Path, consequence: str = "", option: str = "--run") -> Iterator[None]:
    """Turn a full disk or unwritable folder met while writing ``path`` into one clear RunError.

    ``option``: the option that names the folder. Errors of safetensors contain the system's error as text.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        number = error.errno if isinstance(error, OSError) else number_in(str(error))
        advice = _ADVICE.get(number or 0, "Check the disk and the folder, or choose another folder")
        reason = getattr(error, "strerror", None) or str(error)
        sentences = [f"cannot write {what} {path}: {reason}.", consequence, f"{advice} with {option}."]
        raise RunError(" ".join(filter(None, sentences))) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError met while reading ``path`` into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. Check that it exists and is readable.") from error


def number_in(message: str) -> int:
    """The errno in a safetensors message such as "I/O error: No space left on device (os error 28)"."""
    tail = message.partition("os error ")[2]
    digits = tail.partition(")")[0]
    return int(digits) if digits.isdigit() else 0


def write_atomic(path: Path, content: str | bytes, what: str, option: str = "--run") -> None:
    """Write a file so that a reader, also after a crash, sees the old or the new content and never a part of it.

    ``what`` and ``option`` are for the error: what could not be written, and which option names another folder.
    """
    with writing(what, path, option=option), replaced(path) as partial, partial.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden file next to ``path`` to write to; it replaces ``path`` if the block succeeds and is deleted otherwise.

    Each process has its own, also on a shared file system. Use with ``writing``, which explains the errors.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def follow_umask(*files: Path) -> None:
    """Give files the mode of a new file in their folder: safetensors writes its files with mode 0600.

    The mode is read from an empty file, because asking for the umask would change it for every thread.
    """
    if not files:
        return
    probe = files[0].with_name(f".{files[0].name}.{os.getpid()}.mode")
    try:
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        file.chmod(mode)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file. RunError with the file's name and ``advice`` if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {error}. {advice}") from error
    return content


def read_jsonl(path: Path, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; blank lines are skipped.

    ``torn_tail``: for files that gdmd appends to. A last line without a newline that is not a JSON object was cut off
    by a crash and is left out. Any other damage is a RunError that names the line. Lines end at newlines only:
    ``str.splitlines`` would also split at U+2028, which JSON allows inside a string.
    """
    return [row for _, row in numbered_jsonl(path, torn_tail=torn_tail)]


def numbered_jsonl(path: Path, *, torn_tail: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """``read_jsonl`` with the number of each line, counted from 1: for errors about what a row holds."""
    rows = []
    for number, line, whole in _lines(path):
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            if torn_tail and not whole:
                break
            raise RunError(f"{path}, line {number}: {error}. Fix or delete that line.") from error
        rows.append((number, row))
    return rows


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], what: str, option: str = "--run") -> None:
    """Append rows to a JSON lines file. NaN and infinity are written as null; a torn last line is removed first."""
    text = "".join(json.dumps(finite_or_none(row)) + "\n" for row in rows)
    with writing(what, path, option=option):
        if path.exists():
            _mend_tail(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """(number, content, ends in a newline) of each line that is not blank."""
    with reading(path):
        content = path.read_bytes()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line, number < len(lines)


def _mend_tail(path: Path) -> None:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
    content = path.read_bytes()
    kept, newline, tail = content.rpartition(b"\n")
    try:
        complete = isinstance(json.loads(tail), dict)
    except (ValueError, RecursionError):
        complete = False
    write_atomic(path, content + b"\n" if complete else kept + newline, "the repaired file")


def finite_or_none(value: Any) -> Any:
    """NaN and infinity as None (JSON cannot represent them), through mappings and lists."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def typed(path: str | Path) -> str:
    """A path as it is typed in a shell, for the commands that messages suggest."""
    return shlex.quote(str(path))


def near_name(path: str | Path, also: Iterable[str] = ()) -> str:
    """ " Did you mean X?" for a path that does not exist, with X similar to it, from its folder or from ``also``; or ""."""
    path = Path(path)
    try:
        there = {str(path.parent / entry.name) for entry in path.parent.iterdir() if not entry.name.startswith(".")}
    except OSError:
        there = set()
    near = difflib.get_close_matches(str(path)[:200], sorted((there | set(also)) - {str(path)}), 1, 0.75)
    return f" Did you mean {near[0]}?" if near else ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. RunError where it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(path: Path, variant: str | None = None) -> str:
    """SHA-256 over what a model is loaded from: names and content of its safetensors, configs and vocabularies.

    ``path``: a diffusers folder (its components and model_index.json count, other files do not), any other folder of
    weights, or one file. ``variant``: as in ``from_pretrained``; weight files of other variants do not count. The
    location of the folder does not matter: a moved copy has the same fingerprint. RunError if there is nothing to read.

    Every byte is read: a sample, or the size and time, would miss weights that were replaced in place. The hash of a
    large file is remembered by its inode, size, mtime and ctime, so it is computed once. The ctime changes with every
    write, even where the mtime is set back.
    """
    if path.is_file():
        return content_hash(_remembered_hash(path))
    files = sorted(_model_files(path, variant)) if path.is_dir() else []
    if not files:
        raise RunError(f"{path} holds no model files (.safetensors, .json). Check the folder.")
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_remembered_hash, files))
    names = [file.relative_to(path).as_posix() for file in files]
    return content_hash(*(part for pair in zip(names, hashes, strict=True) for part in pair))


def _model_files(folder: Path, variant: str | None) -> Iterator[Path]:
    """What ``from_pretrained`` reads of a folder."""
    index = folder / "model_index.json"
    if not index.is_file():
        yield from _files_with_weights(folder, variant)
        return
    yield index
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        components = [name for name, given in parts.items() if isinstance(given, list)]
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{index} cannot be read ({error}). Copy the pipeline again.") from error
    for name in components:
        yield from _files_with_weights(folder / name, variant)


def _files_with_weights(folder: Path, variant: str | None) -> Iterator[Path]:
    there = [file for file in folder.rglob("*") if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    weights = [file for file in there if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")]
    variants = {file: weight_variant(file.name) for file in weights}
    wanted = variant if variant in variants.values() else None
    chosen = {file for file, of in variants.items() if of == wanted} or set(weights)
    for file in there:
        if file in chosen or (file not in variants and file.suffix in READ_WITH_WEIGHTS):
            yield file


def weight_variant(name: str) -> str | None:
    """ "fp16" for model.fp16.safetensors and its shards, None for model.safetensors and model-00001-of-00002.safetensors."""
    parts = [part.partition("-")[0] for part in name.split(".")[1:]]
    return next((part for part in parts if part not in ("safetensors", "index", "json")), None)


def _remembered_hash(path: Path) -> str:
    """``file_hash``, remembered between processes for large files."""
    with reading(path):
        before = path.stat()
    if before.st_size < REMEMBERED:
        return file_hash(path)
    try:
        note = Path.home() / ".cache" / "gdmd" / "hashes" / content_hash(str(path.resolve()))
    except RuntimeError:  # a user without a home folder, as in some containers
        return file_hash(path)
    state = _state(before)
    with suppress(OSError, UnicodeDecodeError):  # no note yet, or not a readable one
        known, _, digest = note.read_text(encoding="ascii").rpartition(" ")
        if known == state:
            return digest
    digest = file_hash(path)
    settled = time.time() - before.st_ctime > 2  # a file system's clock is coarse: a later write could look the same
    if settled and _state(path.stat()) == state:
        with suppress(OSError, RunError):  # it cannot be written there: the hash is computed again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, f"{state} {digest}", "the hash")
    return digest


def _state(file: os.stat_result) -> str:
    return f"{file.st_dev} {file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}"


def content_hash(*parts: str | bytes) -> str:
    """SHA-256 of several parts, in hexadecimal; the boundaries between the parts count."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Of all host names, only localhost counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. RunError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RunError(
            f"cannot listen on {host}, port {port}: {error}; choose others with --host and --port"
        ) from error


def address_of(listening: socket.socket) -> str:
    """http://HOST:PORT for a browser; this machine's name if the server listens on every address."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
