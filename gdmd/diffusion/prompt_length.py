"""How many tokens of a prompt are read: reports what text encoders and reward models cut off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

CHUNK = 1024
"""Prompts that are tokenized at once."""
SHOWN = 60
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Reader:
    """A text encoder and its limit of tokens.

    limit: token ids that it reads. tokens: prompts -> all ids without a limit, those of a template around the prompt
    included. plain: whether the ids come from the bare tokenizer, which keeps the end token when it truncates.
    """

    name: str
    limit: int
    tokens: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    plain: bool = True
    head: int = field(init=False)
    tail: int = field(init=False)

    def __post_init__(self) -> None:
        one, other = self.tokens(["a", "1"])
        object.__setattr__(self, "head", _common(one, other))
        object.__setattr__(self, "tail", _common(one[::-1], other[::-1]))

    @property
    def room(self) -> int:
        """Tokens of the prompt itself that are read; below 1 where a template fills the limit."""
        return self.limit - self.head - (self.tail if self.plain else 0)

    def reaching(self, texts: Sequence[str]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Prompts of at least ``room`` tokens: how many tokens they have, and the ids that are read."""
        spare = self.limit - self.head - self.tail - 8
        # a token of ASCII text has one character or more: most prompts need not be tokenized
        wanted = [text for text in texts if not (text.isascii() and len(text) <= spare)]
        found = {}
        for start in range(0, len(wanted), CHUNK):
            part = wanted[start : start + CHUNK]
            for text, ids in zip(part, self.tokens(part), strict=True):
                count = len(ids) - self.head - self.tail
                if count >= self.room:
                    found[text] = count, tuple(ids[: self.head + self.room])
        return found


def long_prompts(readers: Sequence[Reader], texts: Sequence[str], remedy: str) -> str | None:
    """A message that counts and names the prompts whose ends are not read; None where there are none.

    Prompts that differ only in what is cut off, for every reader, are named too. ``remedy``: what to do.
    """
    unique = list(dict.fromkeys(texts))
    reached = [reader.reaching(unique) for reader in readers]
    longer = [
        {text: count for text, (count, _) in found.items() if count > reader.room}
        for reader, found in zip(readers, reached, strict=True)
    ]
    cut = dict.fromkeys(text for one in longer for text in one)
    if not cut:
        return None
    longest = max(cut, key=lambda text: max(one.get(text, 0) for one in longer))
    lines = [
        f"{len(cut)} of {len(unique)} prompts are longer than the text encoder reads; the rest is ignored",
        *(_line(reader, one) for reader, one in zip(readers, longer, strict=True)),
        f"  the longest: {longest[:SHOWN]!r}{'...' if len(longest) > SHOWN else ''}",
        *_same(cut, reached),
        f"  {remedy}",
    ]
    return "\n".join(lines)


def _line(reader: Reader, longer: Mapping[str, int]) -> str:
    if reader.room < 1:
        return (
            f"  {reader.name} reads {reader.limit} tokens, and its template alone has {reader.head}: no prompt is read"
        )
    reads = f"  {reader.name} reads {reader.room} tokens"
    return f"{reads}: {len(longer)} longer, up to {max(longer.values())}" if longer else f"{reads}: none longer"


def _same(cut: Mapping[str, None], reached: Sequence[Mapping[str, tuple[int, tuple[int, ...]]]]) -> Sequence[str]:
    """Prompts that are equal after truncation, for every reader; a reader that reads them whole tells them apart."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for text in dict.fromkeys(text for found in reached for text in found):
        groups.setdefault(tuple(found[text][1] if text in found else text for found in reached), []).append(text)
    shared = [group for group in groups.values() if len(group) > 1 and any(text in cut for text in group)]
    if not shared:
        return ()
    first, second = (f"{'...' if len(text) > SHOWN else ''}{text[-SHOWN:]}" for text in shared[0][:2])
    count = sum(map(len, shared))
    return (f"  {count} different prompts are the same after truncation, for example {first!r} and {second!r}",)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    differ = [k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    return differ[0] if differ else min(len(one), len(other))
