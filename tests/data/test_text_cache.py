"""Text embeddings on disk: equal to live ones, computed once, resumable, and never those of another encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

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


def same(a: Cond, b: Cond) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


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


def test_truncated_shard(tmp_path: Path) -> None:
    cache = CachedText(Letters(), tmp_path, "a")
    cache.prepare(TEXTS[:1])
    (shard,) = cache.folder.glob("shard_*")
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{shard.name}: damaged.*delete the file"):
        CachedText(Letters(), tmp_path, "a")


@pytest.mark.parametrize("which", ["shard_*", "null*"])
def test_flipped_bit(tmp_path: Path, which: str) -> None:
    cache = CachedText(Letters(), tmp_path, "a")
    cache.prepare(TEXTS[:3])
    (file,) = cache.folder.glob(which)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last number of the last tensor: "mask" of the last row
    file.write_bytes(content)
    again = CachedText(Letters(), tmp_path, "a")
    with pytest.raises(ValueError, match=f"{file.name}: damaged.*delete the file"):
        again.encode(TEXTS[:3]) if which == "shard_*" else again.null(2)
    if which == "shard_*":
        assert same(again.encode(TEXTS[:2]), Letters().encode(TEXTS[:2]))  # the other rows are what they were


def test_shard_of_an_earlier_version(tmp_path: Path) -> None:
    cache = CachedText(Letters(), tmp_path, "a")
    cache.prepare(TEXTS[:3])
    (file,) = cache.folder.glob("shard_*")
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"texts": json.dumps(TEXTS[:3])})
    assert same(CachedText(Letters(), tmp_path, "a").encode(TEXTS[:3]), Letters().encode(TEXTS[:3]))


def test_deleted_shard_is_computed_again(tmp_path: Path) -> None:
    CachedText(Letters(), tmp_path, "a").prepare(TEXTS)
    max(tmp_path.rglob("shard_*"), key=lambda file: file.stat().st_size).unlink()  # that of SHARD captions
    cache = CachedText(Letters(), tmp_path, "a")
    assert cache.prepare(TEXTS) == SHARD
    for after in (cache, CachedText(Letters(), tmp_path, "a")):
        assert same(after.encode(TEXTS), Letters().encode(TEXTS))


def between(monkeypatch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """Another run does ``other`` once, just before this one writes its first file."""
    save, waiting = safetensors.torch.save_file, [other]

    def meanwhile(*given: object) -> None:
        if waiting:
            waiting.pop()()
        save(*given)

    monkeypatch.setattr(safetensors.torch, "save_file", meanwhile)


@pytest.mark.parametrize("own", [TEXTS[5:9], TEXTS[:4]], ids=["other captions", "the same"])
def test_concurrent_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str]) -> None:
    one, other = (CachedText(Letters(), tmp_path, "a") for _ in range(2))
    between(monkeypatch, lambda: other.prepare(own))
    one.prepare(TEXTS[:4])
    for cache, texts in ((one, TEXTS[:4]), (other, own), (CachedText(Letters(), tmp_path, "a"), [*TEXTS[:4], *own])):
        assert same(cache.encode(texts), Letters().encode(texts))
    assert not list(tmp_path.rglob(".*"))
