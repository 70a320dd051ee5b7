"""``gdmd rewards serve``: scores, and a reason for every refused request."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
from typing import Any

import pytest
import torch
from fuzzing import CASES, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gdmd.programs import reward_server
from gdmd.programs.reward_server import HTTPError, Limits, make_app, read_request, serve
from gdmd.rewards.callable import CallableReward

TOKEN = "a-token-of-some-length"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def scored_brightness(images: Tensor, prompts: Any) -> Tensor:
    """Mean of the image plus the length of the prompt; NaN for white images."""
    mean = images.mean((1, 2, 3))
    return torch.where(mean == 1, torch.nan, mean + torch.tensor([float(len(text)) for text in prompts]))


def png(size: tuple[int, int], color: str = "red", kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


RED = png((4, 3))
GOOD = {"protocol": 1, "reward": "bright", "prompts": ["a", "bb"], "meta": [{}, {"k": 1}], "images": [RED, RED]}
REWARDS = {"bright": CallableReward(scored_brightness, "bright")}


def make_client(rate: int = 10**9) -> Any:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    app = make_app(REWARDS, TOKEN, Limits(images=3, size=20_000, rate=rate))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def web() -> Any:
    return make_client()


def test_scores_health_and_version(web: Any) -> None:
    body = GOOD | {"prompts": ["a", "bb", "ccc"], "images": [RED, RED, png((4, 5), "white")], "meta": []}
    answer = web.post("/score", json=body, headers=AUTHORIZED)
    assert answer.status_code == 200
    assert answer.json()["scores"] == [pytest.approx(1 + 1 / 3), pytest.approx(2 + 1 / 3), None]
    assert web.get("/health").json() == {"status": "ok"}
    version = web.get("/version", headers=AUTHORIZED).json()
    assert version["protocol"] == 1 and version["rewards"] == ["bright"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (GOOD | {"protocol": 7}, 400, "protocol 1, got 7"),
        (GOOD | {"protocol": "1"}, 400, "protocol: Input should be a valid integer"),
        (GOOD | {"reward": "other"}, 404, "no reward 'other'"),
        (GOOD | {"prompts": ["a"]}, 400, "2 images, 1 prompts"),
        (GOOD | {"prompts": ["a", 3]}, 400, "prompts.1: Input should be a valid string"),
        (GOOD | {"prompts": ["a", "p" * 5000]}, 400, "prompts.1: String should have at most 4000 characters"),
        (GOOD | {"images": ["", "x y"]}, 400, "not a base64 PNG"),
        (GOOD | {"images": [RED, RED[:-9]]}, 400, "not a base64 PNG"),
        (GOOD | {"images": [png((4, 3), kind="JPEG")] * 2}, 400, "not a base64 PNG"),
        (GOOD | {"images": [png((5000, 1))] * 2}, 413, "5000 x 1 pixels"),
        (GOOD | {"meta": [{}]}, 400, "1 metadata objects"),
        (GOOD | {"meta": [1, 2]}, 400, "meta.0: Input should be an object"),
        (GOOD | {"prompts": ["a"] * 4, "images": ["x"] * 4, "meta": []}, 413, "4 images in a request"),
        (GOOD | {"images": [], "prompts": [], "meta": []}, 413, "0 images"),
        ({"reward": "bright"}, 400, "protocol: Field required"),
        ([1, 2], 400, "the body: Input should be an object"),
        (GOOD | {"prompts": ["a" * 15_000] * 2}, 413, "larger than 20000 bytes"),
        (b"{", 400, "Invalid JSON"),
        (b"[" * 3000, 400, "Invalid JSON"),
        (b"\xff", 400, "Invalid JSON"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(web: Any, body: Any, status: int, reason: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = web.post("/score", content=content, headers=AUTHORIZED)
    assert answer.status_code == status and reason in answer.json()["error"]


@CASES
@given(body=mutated([json.dumps(GOOD).encode()], st.sampled_from([b"", b"null", rb'"\ud800"']) | st.binary(max_size=6)))
def test_any_bytes_are_scored_or_refused(body: bytes, web: Any) -> None:
    answer = web.post("/score", content=body, headers=AUTHORIZED)
    row = json.loads(answer.text)
    if answer.status_code == 200:
        assert all(score is None or math.isfinite(score) for score in row["scores"])
    else:
        assert 400 <= answer.status_code < 500 and len(row["error"]) > 8


@pytest.mark.parametrize(
    "header", ["", TOKEN, "Bearer wrong", f"Bearer {TOKEN}x", f"bearer {TOKEN}", f"Bearer {TOKEN[:-1]}"]
)
def test_wrong_tokens_are_refused(web: Any, header: str) -> None:
    for answer in (web.post("/score", json=GOOD, headers={"Authorization": header}), web.get("/version")):
        assert answer.status_code == 401 and TOKEN not in answer.text


def test_requests_above_the_rate_limit_are_refused() -> None:
    web = make_client(rate=4)
    answers = [web.get("/version", headers=AUTHORIZED) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
    assert 50 < int(answers[-1].headers["Retry-After"]) <= 60 and "Retry-After" not in answers[0].headers


def test_pixels_of_a_request_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    image = png((reward_server.MAX_SIDE, 16))
    assert len(image) < 2000
    body = json.dumps(GOOD | {"prompts": ["a"] * 3, "images": [image] * 3, "meta": []}).encode()
    assert len(read_request(body, REWARDS, Limits())[1]) == 3
    monkeypatch.setattr(reward_server, "MAX_PIXELS", 2 * 16 * reward_server.MAX_SIDE)
    with pytest.raises(HTTPError, match="pixels in a request; use a smaller batch") as error:
        read_request(body, REWARDS, Limits())
    assert error.value.status == 413


def test_public_address_needs_a_long_token() -> None:
    with pytest.raises(ValueError, match="can be reached from other machines, so a token is needed"):
        serve(["math:sqrt"], "0.0.0.0", 0, "cpu", None, Limits(), print)
    with pytest.raises(ValueError, match="at least 16"):
        serve(["math:sqrt"], "0.0.0.0", 0, "cpu", "short", Limits(), print)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: .*choose others with --host"):
            serve(["test_reward_server:scored_brightness"], "127.0.0.1", port, "cpu", None, Limits(), print)


def test_a_free_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uvicorn, said = pytest.importorskip("uvicorn"), []
    ports: list[int] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: ports.extend(one.getsockname()[1] for one in sockets)
    )
    serve(["test_reward_server:scored_brightness"], "127.0.0.1", 0, "cpu", None, Limits(), said.append)
    assert ports[0] > 0 and said == [
        f"http://127.0.0.1:{ports[0]} serves test_reward_server:scored_brightness without a token"
    ]
