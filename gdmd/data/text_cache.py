"""Text embeddings computed once and stored on disk, so that training needs no text encoder.

FOLDER/KEY holds the shards (see ``shards``; keys: captions) and null.safetensors, the unconditional input. KEY is a hash of
the encoder's identity (content of encoders and tokenizers, precision, length), so that embeddings of another encoder are
never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gdmd.data.shards import SHARD, Shards, save_rows
from gdmd.diffusion.device import to_device_async
from gdmd.types import Cond, TextEncoder

BATCH = 8
"""Captions per call of the encoder."""


class LiveEncoder(TextEncoder, Protocol):
    """An encoder that can free its memory."""

    def unload(self) -> None: ...


class CachedText:
    """A TextEncoder that reads embeddings from disk and computes missing ones with ``encoder`` while it is loaded."""

    def __init__(self, encoder: LiveEncoder, folder: Path, identity: str, device: torch.device | str = "cpu") -> None:
        self.encoder: LiveEncoder | None = encoder
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.device = device
        advice = "delete the file and start again: its captions are embedded again"
        self._shards = Shards(self.folder, "texts", "text embeddings", advice)
        self._null: Cond | None = None

    def refresh(self) -> None:
        """Find what is on disk; another process may have written more."""
        self._shards.refresh()

    def __contains__(self, text: str) -> bool:
        return text in self._shards

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts that are not on disk, without duplicates."""
        return [text for text in dict.fromkeys(texts) if text not in self._shards]

    def prepare(self, texts: Sequence[str], seen: Callable[[int], object] = lambda count: None) -> int:
        """Embed the captions that are not on disk, shard by shard, then unload the encoder; returns their number.

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
        """Rows in the order of ``texts``. ValueError for an unknown caption if the encoder is unloaded."""
        if not (unknown := self.missing(texts)):
            rows = self._shards.read(texts)
            return {name: to_device_async(part, self.device) for name, part in rows.items()}
        if self.encoder is None:
            raise ValueError(
                f"no embedding of caption {unknown[0]!r} in {self.folder}, and the text encoders are unloaded; add it to "
                "prompts.file, or set model.embeddings to null"
            )
        return self.encoder.encode(texts)

    def null(self, count: int) -> Cond:
        """The unconditional input: one row on disk, expanded to all samples."""
        if self._null is None:
            self._null = {name: row.to(self.device) for name, row in self._null_row().items()}
        return {name: row.expand(count, *row.shape[1:]) for name, row in self._null.items()}

    def _null_row(self) -> Mapping[str, Tensor]:
        file = self.folder / "null.safetensors"
        if file.is_file():
            return self._shards.read_file(file)
        if self.encoder is None:
            raise ValueError(f"{file} is missing and the text encoders are unloaded; start again to create it")
        row = {name: part.cpu() for name, part in self.encoder.null(1).items()}
        save_rows(file, row, {})
        return row

    def _write_shard(self, texts: Sequence[str]) -> None:
        assert self.encoder is not None
        parts = [self.encoder.encode(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        self._shards.write(texts, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
