"""Text embeddings on disk: equal to live ones, computed once, resumable, and never those of another encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_roles import same

from gdmd.data.shards import SHARD
from gdmd.data.text_cache import BATCH, CachedText
from gdmd.types import Cond

TEXTS = [f"caption number {i}" for i in range(SHARD + 5)]


class Letters:
    """Embeds a caption as its letters; counts captions, and can be interrupted."""

    def __init__(self, scale: float = 1.0, fails_after: int = 10**9) -> None:
        self.scale, self.fails_after, self.count, self.loaded = scale, fails_after, 0, True

    def encode(self, texts: Sequence[str]) -> Cond:
        self.count += len(texts)
        if self.count > self.fails_after:
            raise KeyboardInterrupt
        rows = [[ord(letter) for letter in text.ljust(20)[-20:]] for text in texts]
        embeds = self.scale * torch.tensor(rows, dtype=torch.bfloat16)
        return {"embeds": embeds[:, :, None], "mask": embeds > 40}

    def null(self, count: int) -> Cond:
        return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in self.encode([""]).items()}

    def unload(self) -> None:
        self.loaded = False


def test_cached_equals_live(tmp_path: Path) -> None:
    cache, live = CachedText(Letters(), tmp_path, "a"), Letters()
    assert cache.prepare(TEXTS + TEXTS[:3]) == len(TEXTS)
    wanted = [TEXTS[-1], TEXTS[0], TEXTS[SHARD], TEXTS[0]]
    assert same(cache.encode(wanted), live.encode(wanted))
    assert same(cache.null(3), live.null(3))


def test_encoder_is_unloaded_and_not_used_again(tmp_path: Path) -> None:
    first, second = Letters(), Letters()
    CachedText(first, tmp_path, "a").prepare(TEXTS)
    assert not first.loaded
    cache = CachedText(second, tmp_path, "a")
    assert cache.prepare(TEXTS) == 0 and second.count == 0
    assert same(cache.encode(TEXTS[:2]), Letters().encode(TEXTS[:2]))


def test_interruption_keeps_finished_shards(tmp_path: Path) -> None:
    broken = Letters(fails_after=SHARD + 1)
    with pytest.raises(KeyboardInterrupt):
        CachedText(broken, tmp_path, "a").prepare(TEXTS)
    again = Letters()
    assert CachedText(again, tmp_path, "a").prepare(TEXTS) == 5
    assert again.count == 5 + 1  # and the unconditional row


def test_new_captions_are_added(tmp_path: Path) -> None:
    CachedText(Letters(), tmp_path, "a").prepare(TEXTS[:3])
    cache = CachedText(Letters(), tmp_path, "a")
    assert cache.prepare(TEXTS[: BATCH + 1]) == BATCH - 2
    assert all(text in cache for text in TEXTS[: BATCH + 1])


def test_another_encoder_shares_nothing(tmp_path: Path) -> None:
    CachedText(Letters(), tmp_path, "a").prepare(TEXTS[:2])
    other = CachedText(Letters(scale=2.0), tmp_path, "b")
    assert TEXTS[0] not in other
    other.prepare(TEXTS[:2])
    assert same(other.encode(TEXTS[:2]), Letters(scale=2.0).encode(TEXTS[:2]))


def test_unknown_caption(tmp_path: Path) -> None:
    cache = CachedText(Letters(), tmp_path, "a")
    assert same(cache.encode(["new"]), Letters().encode(["new"]))
    cache.prepare(TEXTS[:1])
    with pytest.raises(ValueError, match="no embedding of caption 'new'.*model.embeddings"):
        cache.encode(["new"])


def test_flipped_bit_in_the_unconditional_row(tmp_path: Path) -> None:
    cache = CachedText(Letters(), tmp_path, "a")
    cache.prepare(TEXTS[:3])
    file = cache.folder / "null.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match=f"{file.name}: damaged.*delete the file"):
        CachedText(Letters(), tmp_path, "a").null(2)


def test_deleted_shard_is_computed_again(tmp_path: Path) -> None:
    CachedText(Letters(), tmp_path, "a").prepare(TEXTS)
    max(tmp_path.rglob("shard_*"), key=lambda file: file.stat().st_size).unlink()  # that of SHARD captions
    cache = CachedText(Letters(), tmp_path, "a")
    assert cache.prepare(TEXTS) == SHARD
    assert same(cache.encode(TEXTS), Letters().encode(TEXTS))
