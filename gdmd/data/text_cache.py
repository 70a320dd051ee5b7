"""Text embeddings computed once: shards of safetensors on disk, so that training holds no text encoder.

FOLDER/KEY/shard_NAME.safetensors holds the named tensors of up to SHARD captions, [n, ...] each, and the captions in its
header, with a checksum for each; NAME is a hash of the captions, so that processes which write at the same time (two runs,
or ranks that do not see each other's disks) never take each other's place. null.safetensors holds the unconditional input.
KEY is a hash of the encoder's identity (content of encoders and tokenizers, precision, length), so that embeddings of
another encoder are never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gdmd.data.checksums import Verified, checksums, opened
from gdmd.diffusion.device import to_device_async
from gdmd.io import follow_umask, replaced
from gdmd.types import Cond, TextEncoder

SHARD = 64
"""Captions per file: what an interruption costs at most."""
BATCH = 8
"""Captions per call of the encoder."""
AGAIN = "delete it where it is damaged, and start again: what it held is embedded again"


class LiveEncoder(TextEncoder, Protocol):
    """An encoder whose memory can be given back."""

    def unload(self) -> None: ...


class CachedText:
    """A TextEncoder that reads what is on disk and asks ``encoder`` for the rest, while that is loaded."""

    def __init__(self, encoder: LiveEncoder, folder: Path, identity: str, device: torch.device | str = "cpu") -> None:
        self.encoder: LiveEncoder | None = encoder
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.device = device
        self._place: dict[str, tuple[Path, int]] = {}
        self._written = Verified()
        self._null: Cond | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is on disk, where another process may have written."""
        for shard in sorted(self.folder.glob("shard_*.safetensors")):
            self._index(shard)

    def __contains__(self, text: str) -> bool:
        return text in self._place

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those that are not on disk, each once."""
        return [text for text in dict.fromkeys(texts) if text not in self._place]

    def prepare(self, texts: Sequence[str], seen: Callable[[int], object] = lambda count: None) -> int:
        """Embed the captions that are not on disk, shard by shard, then unload the encoder; returns how many.

        ``seen`` is called after every shard with the number of its captions.
        """
        missing = self.missing(texts)
        if missing and self.encoder is None:
            raise ValueError(f"{len(missing)} captions are not in {self.folder} and the text encoders are unloaded")
        for start in range(0, len(missing), SHARD):
            shard = missing[start : start + SHARD]
            self._write_shard(shard)
            seen(len(shard))
        self.null(1)
        if self.encoder is not None:
            self.encoder.unload()
            self.encoder = None
        return len(missing)

    def encode(self, texts: Sequence[str]) -> Cond:
        """Rows in the order of ``texts``. ValueError for an unknown caption when the encoder is unloaded."""
        unknown = [text for text in texts if text not in self._place]
        if not unknown:
            return self._read(texts)
        if self.encoder is None:
            raise ValueError(
                f"caption {unknown[0]!r} is not among the embedded ones in {self.folder}, and the text encoders were "
                "unloaded; add it to prompts.file, or set model.embeddings to null"
            )
        return self.encoder.encode(texts)

    def null(self, count: int) -> Cond:
        """The unconditional input, one row on disk shared by all samples."""
        if self._null is None:
            self._null = {name: row.to(self.device) for name, row in self._null_row().items()}
        return {name: row.expand(count, *row.shape[1:]) for name, row in self._null.items()}

    def _null_row(self) -> Mapping[str, Tensor]:
        file = self.folder / "null.safetensors"
        if file.is_file():
            with opened(file, AGAIN) as found:
                row = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
                self._written.learn(file, found.metadata() or {}, 1)
            self._written.check((file, 0), row)
            return row
        if self.encoder is None:
            raise ValueError(f"{file} is missing and the text encoders are unloaded; start again to make it")
        row = {name: part.cpu() for name, part in self.encoder.null(1).items()}
        _save(file, row, checksums(row))
        return row

    def _write_shard(self, texts: Sequence[str]) -> None:
        assert self.encoder is not None
        parts = [self.encoder.encode(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        file = shard_of(self.folder, texts)
        _save(file, joined, {"texts": json.dumps(list(texts)), **checksums(joined)})
        self._index(file)

    def _index(self, shard: Path) -> None:
        """Remember where the captions of a shard are; only its header is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(shard, "pt") as found:
                header = found.metadata()
                texts = json.loads(header["texts"])
            self._written.learn(shard, header, len(texts))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"text embeddings {shard}: damaged ({error}); delete the file, and its captions are embedded again"
            ) from error
        self._place |= {text: (shard, row) for row, text in enumerate(texts)}

    def _read(self, texts: Sequence[str]) -> Cond:
        wanted = [self._place[text] for text in texts]
        rows: dict[tuple[Path, int], dict[str, Tensor]] = {}
        for shard in {file for file, _ in wanted}:
            with opened(shard, AGAIN) as stored:
                slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                for file, row in set(wanted):
                    if file == shard:
                        rows[file, row] = {name: part[row : row + 1] for name, part in slices.items()}
                        self._written.check((file, row), rows[file, row])
        names = rows[wanted[0]].keys()
        return {
            name: to_device_async(torch.cat([rows[place][name] for place in wanted]), self.device) for name in names
        }


def shard_of(folder: Path, entries: Sequence[str]) -> Path:
    """The file of a folder that holds these entries, in this order, and can hold no others."""
    return folder / f"shard_{hashlib.sha256(json.dumps(list(entries)).encode()).hexdigest()[:16]}.safetensors"


def _save(file: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a shard atomically."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as partial:
        save_file({name: part.detach().cpu().contiguous().clone() for name, part in tensors.items()}, partial, header)
        follow_umask(partial)
