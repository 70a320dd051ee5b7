"""Remote rewards give the same scores as local ones; with a failing server none hangs, is lost or is made up."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from test_reward_server import TOKEN, scored_brightness
from torch import Tensor

pytest.importorskip("transformers")

from tiny_rewards import prompt_batch, random_images

from gdmd.programs.reward_server import Limits, make_app, read_png
from gdmd.recipes.build_rewards import reward_stats
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.preprocessing import from_pil, to_pil
from gdmd.rewards.remote import RemoteError, RemoteReward
from gdmd.types import PromptBatch, score_all

TEXTS = ("a", "bb", "ccc", "dddd", "eeeee")
Behavior = Callable[[Any, int], None]
"""(HTTP handler, number of the request) -> answer it, or misbehave."""


def prompts(count: int = 5) -> PromptBatch:
    return prompt_batch(TEXTS[:count])


def images(count: int = 5) -> Tensor:
    return random_images(count, 12, 10)


def expected(count: int = 5) -> Tensor:
    """The scores of the images as they are saved."""
    return scored_brightness(from_pil(to_pil(images()[:count])), TEXTS[:count])


def client(url: str, token: str | None = None, pauses: list[float] | None = None, **settings: Any) -> RemoteReward:
    options = {"url": url, "reward": "bright", "timeout_s": 0.5, "retries": 2, "batch": 2} | settings
    reward = RemoteReward(token=token, **options)
    reward._pause = ([] if pauses is None else pauses).append
    return reward


@contextmanager
def server(behave: Behavior) -> Iterator[tuple[str, list[int]]]:
    """(address, the numbers of all requests so far)"""
    seen: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(len(seen))
            behave(self, seen[-1])

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients disconnect on purpose
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


def reply(handler: Any, content: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def good(handler: Any, _: int = 0) -> None:
    row = json.loads(handler.body)
    tensors = [from_pil([read_png(text)]) for text in row["images"]]
    scores = [float(scored_brightness(image, [text])) for image, text in zip(tensors, row["prompts"], strict=True)]
    reply(handler, json.dumps({"protocol": 1, "reward": row["reward"], "scores": scores}).encode())


def slow(handler: Any, _: int) -> None:
    time.sleep(0.4)
    good(handler)


# ---------------------------------------------------------------- failures


def test_scores_in_order_over_several_requests() -> None:
    with server(good) as (url, seen):
        torch.testing.assert_close(client(url).score(images(), prompts()), expected())
        with_image = prompt_batch(
            TEXTS[:1], [{"prompt": TEXTS[0], "image": to_pil(images())[0]}]
        )  # which JSON cannot hold
        torch.testing.assert_close(client(url).score(images()[:1], with_image), expected(1))
    assert len(seen) == 3 + 1  # five images, two per request, and one


def disconnect(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def half_a_response(handler: Any) -> None:
    reply(handler, b'{"protocol": 1, "reward": "bri', length=60)


def error_without_body(handler: Any) -> None:
    reply(handler, b"", 503, length=60)
    time.sleep(1.0)


@pytest.mark.parametrize("fail", [disconnect, half_a_response, error_without_body])
def test_a_killed_server_is_asked_again(fail: Callable[[Any], None]) -> None:
    pauses: list[float] = []
    with server(lambda handler, n: fail(handler) if n in (0, 1) else good(handler)) as (url, _):
        reward = client(url, pauses=pauses)
        torch.testing.assert_close(reward.score(images(), prompts()), expected())
    assert pauses == [0.5, 1.0] and reward.stats()["reward/remote_bright/retries"] == 2


@pytest.mark.parametrize(("asked", "pause"), [("7", 7.0), ("600", 60.0), ("0", 0.5), ("soon", 0.5)])
def test_the_client_waits_as_long_as_a_busy_server_asks(asked: str, pause: float) -> None:
    """The limit is per minute: the pauses of the other failures end after 3.5 s, and with them a run of several ranks."""

    def busy(handler: Any, n: int) -> None:
        if n:
            return good(handler)
        handler.send_response(429)
        handler.send_header("Retry-After", asked)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    pauses: list[float] = []
    with server(busy) as (url, _):
        torch.testing.assert_close(client(url, pauses=pauses).score(images(), prompts()), expected())
    assert pauses == [pause]


def test_a_dead_server_is_an_error_after_all_retries() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RemoteError, match="no answer.*after 3 tries.*start the server again and resume"):
        client(url).score(images(), prompts())


def trickle(handler: Any, _: int) -> None:
    reply(handler, b"", length=1000)
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("behave", [lambda handler, _: time.sleep(1.5), trickle], ids=["silent", "trickling"])
def test_timeout_limits_the_whole_response(behave: Behavior) -> None:
    with server(behave) as (url, _):
        start = time.monotonic()
        with pytest.raises(RemoteError, match="after 1 tries"):
            client(url, retries=0, timeout_s=0.3).score(images(1), prompts(1))
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"<html>hello</html>", 200, "did not answer in JSON"),
        (b"\xff\xfe", 200, "did not answer in JSON"),
        (b"[" * 100_000, 200, "did not answer in JSON"),
        (b"9" * 5000, 200, "did not answer in JSON"),
        (b'"\\ud800"', 200, "malformed response"),
        (b"[]", 200, "malformed response"),
        (b'{"protocol": 1, "reward": "bright", "scores": [1.0]}', 200, "expected 2 numbers"),
        (b'{"protocol": 2, "reward": "bright", "scores": [1.0, 2.0]}', 200, "in protocol 1"),
        (b'{"protocol": 1, "reward": "other", "scores": [1.0, 2.0]}', 200, "of bright"),
        (b'{"protocol": 1, "reward": "bright", "scores": [1.0, NaN]}', 200, "malformed response"),
        (b'{"protocol": 1, "reward": "bright", "scores": [1.0, -1e999]}', 200, "malformed response"),
        (b'{"protocol": 1, "reward": "bright", "scores": [true, "2"]}', 200, "malformed response"),
        (b" " * 1_100_000, 200, "more than 1000000 bytes"),
        (b"no", 400, "refused: 400 no"),
        (b"no", 401, "set the token variable to the server's token"),
        (b"no", 413, "give a smaller batch"),
    ],
)
def test_bad_responses_are_errors_at_once(content: bytes, status: int, message: str) -> None:
    """This also holds for on_failure=skip, because a retry would not help."""
    with server(lambda handler, _: reply(handler, content, status)) as (url, seen):
        with pytest.raises(RemoteError, match=message) as error:
            client(url, on_failure="skip", max_unscored=1.0, timeout_s=5).score(images(2), prompts(2))
    assert len(seen) == 1
    str(error.value).encode()


def test_skipped_images_are_nan_up_to_max_unscored() -> None:
    def fails_first(handler: Any, number: int) -> None:
        good(handler) if number else reply(handler, b"busy", 503)

    with server(fails_first) as (url, _):
        reward = client(url, retries=0, on_failure="skip", max_unscored=1.0)
        assert reward.score(images(), prompts()).isnan().tolist() == [True, True, False, False, False]
    assert float(reward_stats([Composite([Part(reward)])])["reward/remote_bright/unscored"]) == pytest.approx(0.4)
    with server(fails_first) as (url, _):
        with pytest.raises(RemoteError, match="2 of 2 images have no score, more than max_unscored = 0.3"):
            client(url, retries=0, on_failure="skip", max_unscored=0.3).score(images(), prompts())


def test_images_with_nan_are_not_sent() -> None:
    broken = images()
    broken[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite at samples \[3\]"):
        client("http://127.0.0.1:9").score(broken, prompts())


# ---------------------------------------------------------------- the token


@pytest.mark.parametrize("status", [200, 403, 503])
def test_an_echoed_token_is_redacted(status: int) -> None:
    content = b"x" * 70 + TOKEN.encode() + b" is not welcome"
    with server(lambda handler, _: reply(handler, content, status)) as (url, _):
        with pytest.raises(RemoteError) as error:
            client(url, TOKEN, retries=0).score(images(1), prompts(1))
    assert "xxxx..." in str(error.value) and TOKEN[:5] not in str(error.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "[::1]"])
def test_token_without_encryption_to_this_machine(host: str) -> None:
    client(f"http://{host}:8766", TOKEN)


@pytest.mark.parametrize("host", ["rewards.example.org", "127.example.org", "127.0.0.1.example.org", "10.0.0.1"])
def test_no_token_without_encryption_to_other_machines(host: str) -> None:
    with pytest.raises(ValueError, match="would send the token unencrypted"):
        client(f"http://{host}:8766", TOKEN)


# ---------------------------------------------------------------- parallel rewards


def test_remote_and_local_rewards_run_in_parallel() -> None:
    met = threading.Barrier(2, timeout=30)  # breaks unless both requests run at the same time
    started = threading.Event()

    def meet(handler: Any, _: int) -> None:
        started.set()
        met.wait()
        good(handler)

    def wait_for_servers(images: Tensor, prompts: Any) -> Tensor:
        assert started.wait(30)
        return images.mean((1, 2, 3))

    local = CallableReward(wait_for_servers, "local")  # first in the list, but the servers start before it
    with server(meet) as (one, _), server(meet) as (two, _):
        rewards = [local, *(client(url, timeout_s=60, batch=5) for url in (one, two))]
        scores = score_all(rewards, images(), prompts())
    torch.testing.assert_close(scores, [images().mean((1, 2, 3)), expected(), expected()])


def test_parts_of_a_composite_run_in_parallel() -> None:
    met = threading.Barrier(2, timeout=30)  # breaks unless both requests run at the same time

    def meet(handler: Any, _: int) -> None:
        met.wait()
        good(handler)

    with server(meet) as (one, _), server(meet) as (two, _):
        rewards = [client(url, timeout_s=60, batch=5) for url in (one, two)]
        rewards[1].name = "another"
        scores = Composite([Part(reward) for reward in rewards]).score(images(), prompts())
    torch.testing.assert_close(scores, expected())


def test_metadata_that_some_prompts_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server passes None for it, also in a request without a prompt that has it, as in the same process."""
    testclient = pytest.importorskip("fastapi.testclient")

    def weight(images: Tensor, prompts: Any, weight: Any = None) -> list[float]:
        return [100.0] * len(prompts) if weight is None else [0.0 if one is None else one for one in weight]

    web = testclient.TestClient(make_app({"bright": CallableReward(weight, "bright")}, None))
    reward = client("http://127.0.0.1:1")
    monkeypatch.setattr(reward, "_request", lambda path, body: web.post(path, json=body).json())
    whole = replace(prompts(), meta=({"weight": 3, "style": object()}, {}, {}, {}, {}))
    part = replace(whole, meta=({},) * 5, columns=frozenset(("weight",)))
    for batch, scores in ((whole, [3, 0, 0, 0, 0]), (part, [0] * 5)):
        assert reward.score(images(), batch).tolist() == scores
        assert CallableReward(weight).score(images(), batch).tolist() == scores


def test_an_error_cancels_pending_requests() -> None:
    def broken(images: Tensor, prompts: Any) -> Tensor:
        raise ValueError("broken")

    with server(slow) as (url, seen):
        with pytest.raises(ValueError, match="broken"):
            score_all([client(url, timeout_s=10, batch=1), CallableReward(broken, "local")], images(), prompts())
        time.sleep(0.6)
        assert len(seen) <= 1  # of five requests


# ---------------------------------------------------------------- client and server


def test_client_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a socket: scores, NaN, identities, a wrong token, an unknown reward."""
    uvicorn = pytest.importorskip("uvicorn")
    identities = {"bright": "one"}
    app = make_app({"bright": CallableReward(scored_brightness, "bright")}, TOKEN, Limits(), identities)
    process = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not process.started and time.monotonic() < end:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{process.servers[0].sockets[0].getsockname()[1]}"
    try:
        reward = client(url, TOKEN, timeout_s=10)
        assert reward.version()["rewards"] == ["bright"]
        torch.testing.assert_close(reward.score(images(), prompts()), expected())
        assert math.isnan(float(reward.score(torch.ones(1, 3, 4, 4), prompts(1))))
        monkeypatch.setenv(reward.config.token_variable, TOKEN)
        first = scorer_identity(reward.config)
        assert scorer_identity(reward.config) == first
        identities["bright"] = "two"  # as if the server had other weights
        assert scorer_identity(reward.config) != first
        del identities["bright"]  # an older server does not send it
        assert scorer_identity(reward.config) != scorer_identity(reward.config)
        with pytest.raises(RemoteError, match="401.*token variable"):
            client(url, "another-token-altogether", timeout_s=10).score(images(), prompts())
        with pytest.raises(RemoteError, match="serves .*bright.*expected 1 and 'dark'"):
            client(url, TOKEN, timeout_s=10, reward="dark").version()
    finally:
        process.should_exit = True
        thread.join(10)
