"""A reward server that is killed inside its answer, or repeats what it was sent; who may get a token in the clear.

And small pictures that claim many pixels, to the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from test_remote_rewards import TOKEN, answering, batch_of, brightness, client, expected, good, pictures, png, reply

from gdmd.rewards.callable import CallableReward
from gdmd.rewards.remote import RemoteError


def half_an_answer(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "60")
    handler.end_headers()
    handler.wfile.write(b'{"protocol": 1, "reward": "bri')


def a_refusal_without_its_body(handler: Any) -> None:
    handler.send_response(503)
    handler.send_header("Content-Length", "60")
    handler.end_headers()
    handler.wfile.flush()
    time.sleep(1.5)


@pytest.mark.parametrize("breaks", [half_an_answer, a_refusal_without_its_body], ids=lambda one: one.__name__)
def test_a_server_that_is_killed_inside_its_answer_is_asked_again(breaks: Callable[[Any], None]) -> None:
    with answering(lambda handler, number: good(handler) if number else breaks(handler)) as (url, seen):
        scores = client(url, timeout_s=0.5).score(pictures(2), batch_of(2))
    torch.testing.assert_close(scores, expected(pictures())[:2])
    assert len(seen) == 2


@pytest.mark.parametrize("status", [200, 403, 503])
def test_a_token_that_a_server_repeats_is_in_no_error(status: int) -> None:
    said = b"x" * 70 + TOKEN.encode() + b" is not welcome"
    with answering(lambda handler, _: reply(handler, said, status)) as (url, _):
        with pytest.raises(RemoteError) as refused:
            client(url, TOKEN, retries=0).score(pictures(1), batch_of(1))
    assert "xxxx..." in str(refused.value) and TOKEN[:5] not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *(("localhost", True), ("127.0.0.1", True), ("127.8.0.1", True), ("[::1]", True)),
        *(("127.example.org", False), ("127.0.0.1.example.org", False), ("10.0.0.1", False)),
    ],
)
def test_only_this_machine_gets_a_token_without_encryption(host: str, here: bool) -> None:
    url = f"http://{host}:8766"
    if here:
        client(url, TOKEN)
        return
    with pytest.raises(ValueError, match="would send the token unencrypted"):
        client(url, TOKEN)


def test_small_files_of_many_pixels_are_refused_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdmd.programs import reward_server as server

    picture = png(Image.new("RGB", (server.LARGEST_SIDE, 16)))
    assert len(picture) < 2000
    body = {"protocol": 1, "reward": "bright", "prompts": ["a"] * 3, "images": [picture] * 3}
    known, asked = {"bright": CallableReward(brightness, "bright")}, json.dumps(body).encode()
    assert len(server.read_request(asked, known, server.Limits())[3]) == 3
    monkeypatch.setattr(server, "MOST_PIXELS", 2 * 16 * server.LARGEST_SIDE)
    with pytest.raises(server.Refused, match="pixels in a request; give a smaller batch") as refused:
        server.read_request(asked, known, server.Limits())
    assert refused.value.status == 413
