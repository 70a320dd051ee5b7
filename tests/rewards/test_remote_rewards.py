"""A reward on another machine: the same scores, and no hang, no loss, no default score when the server misbehaves."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gdmd.config.rewards import RemoteReward
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.preprocessing import from_pil, to_pil
from gdmd.rewards.remote import RemoteError, RemoteScorer
from gdmd.types import PromptBatch, score_all

TEXTS = ("a", "bb", "ccc", "dddd", "eeeee")
TOKEN = "a-token-of-some-length"


def brightness(images: Tensor, prompts: Any) -> Tensor:
    """Mean level plus the length of the prompt; white images are not scored."""
    mean = images.mean((1, 2, 3))
    return torch.where(mean == 1, torch.nan, mean + torch.tensor([len(text) for text in prompts]))


def batch_of(count: int = 5) -> PromptBatch:
    index = torch.arange(count)
    return PromptBatch(index, TEXTS[:count], index, {}, {})


def pictures(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def client(url: str, token: str | None = None, pauses: list[float] | None = None, **settings: Any) -> RemoteScorer:
    cfg = RemoteReward(**{"url": url, "reward": "bright", "timeout_s": 0.5, "retries": 2, "batch": 2} | settings)
    waited = [] if pauses is None else pauses
    return RemoteScorer(cfg, token, waited.append)


# ---------------------------------------------------------------- a server that misbehaves as told


@contextmanager
def answering(behave: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list[int]]]:
    """A server that calls behave(handler, number of the request); its address and the numbers of all requests."""
    seen: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(len(seen))
            behave(self, seen[-1])

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: Any, content: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def good(handler: Any, _: int = 0) -> None:
    row = json.loads(handler.body)
    images = [from_pil([Image.open(io.BytesIO(base64.b64decode(one)))]) for one in row["images"]]
    scores = [float(brightness(image, [text])) for image, text in zip(images, row["prompts"], strict=True)]
    reply(handler, json.dumps({"protocol": 1, "reward": row["reward"], "scores": scores}).encode())


def expected(images: Tensor) -> Tensor:
    return brightness(from_pil(to_pil(images)), TEXTS)


def test_scores_are_those_of_the_saved_image_in_order_over_several_requests() -> None:
    with answering(good) as (url, seen):
        scores = client(url).score(pictures(), batch_of())
    torch.testing.assert_close(scores, expected(pictures()))
    assert len(seen) == 3  # five images, two per request


def test_a_server_that_dies_in_the_middle_is_asked_again_and_nothing_is_lost() -> None:
    def dies_twice(handler: Any, number: int) -> None:
        if number in (1, 2):
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        good(handler)

    pauses: list[float] = []
    with answering(dies_twice) as (url, _):
        reward = client(url, pauses=pauses)
        torch.testing.assert_close(reward.score(pictures(), batch_of()), expected(pictures()))
    assert pauses == [0.5, 1.0]  # doubled
    assert reward.stats()["reward/remote_bright/retries"] == 2


def test_a_dead_server_is_a_clear_error_after_bounded_tries() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RemoteError, match="no answer.*after 3 tries.*start the server again and resume"):
        client(url).score(pictures(), batch_of())


def test_a_slow_server_and_a_trickling_one_do_not_hang_the_training() -> None:
    def sleeps(handler: Any, _: int) -> None:
        time.sleep(1.5)

    def trickles(handler: Any, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    for behave in (sleeps, trickles):
        with answering(behave) as (url, _):
            start = time.monotonic()
            with pytest.raises(RemoteError, match="after 1 tries"):
                client(url, retries=0, timeout_s=0.3).score(pictures(1), batch_of(1))
            assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>hello</html>", "answered no JSON"),
        (b"\xff\xfe", "answered no JSON"),
        (b"[" * 100_000, "answered no JSON"),
        (b"[]", "garbled answer"),
        (b'{"protocol": 1, "reward": "bright", "scores": [1.0]}', "expected 2 numbers"),
        (b'{"protocol": 2, "reward": "bright", "scores": [1.0, 2.0]}', "in protocol 1"),
        (b'{"protocol": 1, "reward": "other", "scores": [1.0, 2.0]}', "of bright"),
        (b'{"protocol": 1, "reward": "bright", "scores": [1.0, NaN]}', "garbled answer"),
        (b'{"protocol": 1, "reward": "bright", "scores": [true, "2"]}', "garbled answer"),
        (b" " * 1_100_000, "more than 1000000 bytes"),
    ],
)
def test_garbage_and_oversized_answers_are_errors_at_once_even_where_failures_may_be_skipped(
    answer: bytes, message: str
) -> None:
    with answering(lambda handler, _: reply(handler, answer)) as (url, seen):
        with pytest.raises(RemoteError, match=message):
            client(url, on_failure="skip", max_unscored=1.0, timeout_s=5).score(pictures(2), batch_of(2))
    assert len(seen) == 1


def test_skipped_failures_are_not_scored_and_stop_the_run_above_the_stated_share() -> None:
    def fails_first(handler: Any, number: int) -> None:
        good(handler) if number > 0 else reply(handler, b"busy", 503)

    with answering(fails_first) as (url, _):
        reward = client(url, retries=0, on_failure="skip", max_unscored=1.0)
        scores = reward.score(pictures(), batch_of())
    assert scores.isnan().tolist() == [True, True, False, False, False]
    assert float(reward.stats()["reward/remote_bright/unscored"]) == pytest.approx(0.4)
    with answering(fails_first) as (url, _):
        with pytest.raises(RemoteError, match="2 of 2 images are without a score, more than max_unscored = 0.3"):
            client(url, retries=0, on_failure="skip", max_unscored=0.3).score(pictures(), batch_of())


def slow(handler: Any, _: int) -> None:
    time.sleep(0.4)
    good(handler)


def test_remote_rewards_and_those_of_this_machine_work_side_by_side() -> None:
    met = threading.Barrier(2, timeout=5)  # breaks unless both requests are under way at the same time
    started = threading.Event()

    def meets(handler: Any, _: int) -> None:
        started.set()
        met.wait()
        good(handler)

    def waits_for_the_servers(images: Tensor, prompts: Any) -> Tensor:
        assert started.wait(5)
        return images.mean((1, 2, 3))

    own = CallableReward(waits_for_the_servers, "own")  # first in the list, and yet the servers work before it
    with answering(meets) as (one, _), answering(meets) as (two, _):
        rewards = [own, *(client(url, timeout_s=10, batch=5) for url in (one, two))]
        found = score_all(rewards, pictures(), batch_of())
    torch.testing.assert_close(found, [pictures().mean((1, 2, 3)), expected(pictures()), expected(pictures())])


def test_two_slow_servers_cost_the_time_of_one_in_a_list_and_in_a_composite() -> None:
    with answering(slow) as (one, _), answering(slow) as (two, _):
        rewards = [client(url, timeout_s=10, batch=5) for url in (one, two)]
        rewards[1].name = "another"
        for score in (
            lambda: torch.stack(score_all(rewards, pictures(), batch_of())).mean(0),
            lambda: Composite([Part(reward) for reward in rewards]).score(pictures(), batch_of()),
        ):
            began = time.monotonic()
            torch.testing.assert_close(score(), expected(pictures()))
            assert 0.4 <= time.monotonic() - began < 0.75  # one after the other they take 0.8 s


def test_after_an_error_of_one_reward_nothing_more_is_asked_of_the_others() -> None:
    def breaks(images: Tensor, prompts: Any) -> Tensor:
        raise ValueError("broken")

    with answering(slow) as (url, seen):
        with pytest.raises(ValueError, match="broken"):
            score_all([client(url, timeout_s=10, batch=1), CallableReward(breaks, "own")], pictures(), batch_of())
        time.sleep(0.6)
        assert len(seen) <= 1  # of five requests


def test_broken_images_never_leave_and_a_token_never_travels_unencrypted() -> None:
    images = pictures()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite at samples \[3\]"):
        client("http://127.0.0.1:9").score(images, batch_of())
    with pytest.raises(ValueError, match="would send the token unencrypted"):
        client("http://rewards.example.org", TOKEN)


# ---------------------------------------------------------------- the server


@pytest.fixture
def web() -> Any:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gdmd.programs.reward_server import Limits, make_app

    rewards = {"bright": CallableReward(brightness, "bright")}
    return TestClient(make_app(rewards, TOKEN, Limits(images=3, size=20_000, rate=8)))


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def question(**other: Any) -> dict[str, Any]:
    images = [png(image) for image in to_pil(pictures(2))]
    return {"protocol": 1, "reward": "bright", "prompts": ["a", "bb"], "images": images} | other


KNOWN = {"Authorization": f"Bearer {TOKEN}"}


def test_the_server_scores_and_a_score_that_is_missing_is_null(web: Any) -> None:
    white = png(Image.new("RGB", (4, 5), "white"))
    body = question(prompts=["a", "bb", "ccc"]) | {"images": [*question()["images"], white]}
    answer = web.post("/score", json=body, headers=KNOWN)
    assert answer.status_code == 200
    scores = answer.json()["scores"]
    assert scores[:2] == pytest.approx(expected(pictures())[:2].tolist()) and scores[2] is None
    assert web.get("/health").json() == {"status": "ok"}
    version = web.get("/version", headers=KNOWN).json()
    assert version["protocol"] == 1 and version["rewards"] == ["bright"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (question(protocol=7), 400, "protocol 1, got 7"),
        (question(reward="other"), 404, "no reward 'other'"),
        (question(prompts=["a"]), 400, "lists of one length"),
        (question(prompts=["a", 3]), 400, "lists of one length"),
        (question(images=["", "x y"]), 400, "not a base64 PNG"),
        (question(meta=[{}]), 400, "1 metadata for 2 prompts"),
        (question(prompts=["a"] * 4, images=["x"] * 4), 413, "4 images in a request"),
        (question(images=[], prompts=[]), 413, "0 images"),
        ([1, 2], 400, "JSON object"),
        (question(prompts=["a" * 15_000] * 2), 413, "larger than 20000 bytes"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(web: Any, body: Any, status: int, reason: str) -> None:
    answer = web.post("/score", json=body, headers=KNOWN)
    assert answer.status_code == status and reason in answer.json()["error"]


def test_an_image_that_is_no_png_or_claims_too_many_pixels_is_refused(web: Any) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "JPEG")
    jpeg = base64.b64encode(file.getvalue()).decode()
    assert web.post("/score", json=question(images=[jpeg, jpeg]), headers=KNOWN).status_code == 400
    wide = png(Image.new("RGB", (5000, 1)))
    answer = web.post("/score", json=question(images=[wide, wide]), headers=KNOWN)
    assert answer.status_code == 413 and "5000 x 1 pixels" in answer.json()["error"]


def test_without_the_token_nothing_is_answered_but_health_and_the_rate_is_limited(web: Any) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert web.post("/score", json=question(), headers=headers).status_code == 401
        assert web.get("/version", headers=headers).status_code == 401
    codes = [web.get("/version", headers=KNOWN).status_code for _ in range(6)]
    assert codes == [200] * 4 + [429] * 2  # eight requests a minute, four were used up


def test_an_open_address_needs_a_token_and_a_long_one() -> None:
    from gdmd.programs.reward_server import Limits, serve

    with pytest.raises(ValueError, match="can be reached from other machines, so a token is needed"):
        serve(["math:sqrt"], "0.0.0.0", 0, "cpu", None, Limits(), print)
    with pytest.raises(ValueError, match="at least 16"):
        serve(["math:sqrt"], "0.0.0.0", 0, "cpu", "short", Limits(), print)


def test_client_and_server_understand_each_other_over_a_real_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from gdmd.programs.reward_server import Limits, make_app
    from gdmd.recipes.reward_identity import scorer_identity

    served = {"bright": "one"}
    app = make_app({"bright": CallableReward(brightness, "bright")}, TOKEN, Limits(), served)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        reward = client(url, TOKEN, timeout_s=10)
        assert reward.version()["rewards"] == ["bright"]
        monkeypatch.setenv(reward.cfg.token_variable, TOKEN)
        first = scorer_identity(reward.cfg)
        assert scorer_identity(reward.cfg) == first
        served["bright"] = "two"  # the server was started again with other weights
        assert scorer_identity(reward.cfg) != first
        del served["bright"]  # an older server: it cannot be known what it scores with
        assert scorer_identity(reward.cfg) != scorer_identity(reward.cfg)
        torch.testing.assert_close(reward.score(pictures(), batch_of()), expected(pictures()))
        white = reward.score(torch.ones(1, 3, 4, 4), batch_of(1))
        assert math.isnan(float(white))
        with pytest.raises(RemoteError, match="401.*token variable"):
            client(url, "another-token-altogether", timeout_s=10).score(pictures(), batch_of())
        with pytest.raises(RemoteError, match="offers .*bright.*wanted 1 and 'dark'"):
            client(url, TOKEN, timeout_s=10, reward="dark").version()
    finally:
        server.should_exit = True
        thread.join(10)
