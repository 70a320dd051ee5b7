"""Loading weights: pinned hub ids, local folders without the network, tokenizers, long prompts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tiny_rewards
from tiny_rewards import prompt_batch, random_images, words_of_clip

from gdmd.rewards.clean import open_clip_clean
from gdmd.rewards.clip import CLIPScore
from gdmd.rewards.hps import HPSv2
from gdmd.rewards.pickscore import PickScore
from gdmd.rewards.weights import CLIP_L, HubRepo, PaddedTokenizer, locate_weights

TEXTS = ("a bad", "mak", "a lie")


def saved_clip(folder: Path, positions: int = 77) -> str:
    tiny_rewards.clip(folder, positions)
    words_of_clip(folder)
    return str(folder)


def test_local_folder_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards with the same weights share one network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = saved_clip(tmp_path)
    first, second, picked = (
        CLIPScore(path=folder),
        CLIPScore(path=folder),
        PickScore(path=folder),
    )
    scores = first.score(random_images(3), prompt_batch(TEXTS))
    assert torch.equal(second.score(random_images(3), prompt_batch(TEXTS)), scores)
    assert first.loaded.net is second.loaded.net
    scale = first.loaded.net.logit_scale.exp()
    torch.testing.assert_close(picked.score(random_images(3), prompt_batch(TEXTS)), scale * scores)
    with pytest.raises(ValueError, match="not a folder with weights"):
        CLIPScore(path=str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("given", "revision", "default", "expected"),
    [
        (None, None, CLIP_L, CLIP_L.revision),
        (CLIP_L.name, None, CLIP_L, CLIP_L.revision),
        ("org/name", "v2", HubRepo("a/b", "c"), "v2"),
        ("org/name", None, HubRepo("a/b", "c"), None),
    ],
)
def test_revision_of_located_weights(
    given: str | None, revision: str | None, default: HubRepo, expected: str | None
) -> None:
    assert locate_weights(given, revision, default).revision == expected
    assert len(CLIP_L.revision or "") == 40


def test_unconverted_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDMD_REWARDS", str(tmp_path))
    with pytest.raises(ValueError, match="gdmd rewards fetch hps.*gdmd rewards convert hps FILE"):
        HPSv2()


MERGES = {
    "i n": 512, "r e": 515, "a r": 516, "e r": 517, "i n</w>": 530, "i s</w>": 533, "\u00f0 \u0141": 558, "' s</w>": 568,
    "t o": 580, "i t</w>": 585, "a r</w>": 625, "d o": 639, "f u": 665, "p ar": 699, "a f": 702, "in e</w>": 715,
    "re d</w>": 736, "ar t</w>": 794, "l l</w>": 865, "r y</w>": 913, "fu ll</w>": 1476, "do g</w>": 1929,
    "\u00f0\u0141 \u0132": 2074, "j er": 2310, "b ar</w>": 2411, "to m</w>": 2435, "par is</w>": 3445, "c af": 3471,
    "f ine</w>": 3797, "\u00c3 \u00a9</w>": 4166, "jer ry</w>": 9164, "\u00f0\u0141\u0132 \u00b6</w>": 10631,
    "caf \u00c3\u00a9</w>": 15304,
}  # fmt: skip
"""The part of CLIP's published vocabulary that the texts below need."""
OPEN_CLIP = {
    "a caf\u00c3\u00a9 &amp; a bar": [320, 15304, 261, 320, 2411],
    "Tom &amp;amp; Jerry": [2435, 261, 9164],
    "a  red\t dog\n": [320, 736, 1929],
    "a \U0001f436 in \u201cParis\u201d": [320, 10631, 530, 257, 3445, 257],
    "cafe\u0301 \uff46\uff55\uff4c\uff4c": [15304, 1476],
    "it&#39;s &lt;b&gt;": [585, 568, 283, 321, 285],
    "\ufb01ne &quot;art&quot;": [3797, 257, 794, 257],
}
"""Token ids from open_clip 3.3.0, without start and end."""


def published_tokenizer() -> Any:
    """CLIPTokenizer with the published ids of bytes, of MERGES, and of start and end."""
    from transformers import CLIPTokenizer

    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = [chr(code) for code in printed] + [chr(256 + k) for k in range(256 - len(printed))]
    vocab = {sign: i for i, sign in enumerate(signs + [sign + "</w>" for sign in signs])}
    vocab |= {pair.replace(" ", ""): i for pair, i in MERGES.items()}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in MERGES], model_max_length=77)


def token_ids(tokenize: Any, text: str) -> list[int]:
    rows = tokenize([text])
    return rows["input_ids"][0][rows["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("text", OPEN_CLIP)
def test_hps_tokenizes_as_open_clip(text: str) -> None:
    ids = token_ids(PaddedTokenizer(published_tokenizer(), 77, open_clip_clean), text)
    assert ids == [49406, *OPEN_CLIP[text], 49407]


@pytest.mark.parametrize("reward", [CLIPScore, PickScore])
def test_clip_and_pickscore_do_not_clean_texts(tmp_path: Path, reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenize = reward(path=saved_clip(tmp_path)).loaded.tokenize
    assert token_ids(tokenize, "b&amp;b") != token_ids(tokenize, "b&b")
    with pytest.raises(ValueError, match="pip install ftfy"):
        HPSv2(path=str(tmp_path)).loaded.tokenize(["a"])  # type: ignore[misc]


@pytest.mark.parametrize(("kind", "positions"), [(CLIPScore, 77), (PickScore, 40), (HPSv2, 77)])
def test_long_prompts_are_reported_once(
    tmp_path: Path, kind: Any, positions: int, caplog: pytest.LogCaptureFixture
) -> None:
    reward = kind(path=saved_clip(tmp_path, positions))
    room = positions - 2
    texts = ["k" * room, "m" * room + "a", "m" * room + "b"]
    for _ in range(2):
        scores = reward.score(random_images(3), prompt_batch(texts))
    assert scores.isfinite().all()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "2 of 3 prompts are longer" in message and f"reward {reward.name} reads {room} tokens: 2 longer" in message
    assert "2 different prompts are the same" in message
