"""Any request to the reward server, any answer of one, and any metadata of prompts: served, or refused with a reason."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gdmd.config.rewards import RemoteReward
from gdmd.data.prompt_files import PromptFile
from gdmd.data.prompts import read_prompts
from gdmd.rewards.callable import CallableReward
from gdmd.rewards.remote import RemoteError, RemoteScorer
from gdmd.types import PromptBatch

TOKEN = "a-token-of-some-length"


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3)) + torch.tensor([float(len(text)) for text in prompts])


def png(size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = png((4, 3))
GOOD = {"protocol": 1, "reward": "bright", "prompts": ["a", "bb"], "meta": [{}, {"k": 1}], "images": [PICTURE] * 2}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PIECES = st.sampled_from(
    [
        b"",
        b"null",
        b"NaN",
        b"-1e999",
        b'"\\ud800"',
        b"[" * 3000,
        b"9" * 5000,
        b"\xff",
        b"\0",
        b'"',
        b"{",
        b"iVBOR",
        b"==",
    ]
) | st.binary(max_size=6)
ONE = st.sampled_from([PICTURE, PICTURE[:-9], PICTURE[:40] + PICTURE[48:], png((5000, 1)), "", "x y"]) | st.text(
    max_size=9
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "protocol": st.just(1) | JSON,
        "reward": st.sampled_from(["bright", "other", "../bright", ""]) | JSON,
        "prompts": st.lists(st.text(max_size=9) | st.just("p" * 10_000), max_size=5) | JSON,
        "images": st.lists(ONE, max_size=5) | JSON,
        "meta": st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=2), max_size=5) | JSON,
    },
)


@pytest.fixture(scope="module")
def web() -> Any:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gdmd.programs.reward_server import Limits, make_app

    app = make_app({"bright": CallableReward(brightness, "bright")}, TOKEN, Limits(images=3, size=20_000, rate=10**9))
    return TestClient(app, raise_server_exceptions=False)


def check_answer(answer: Any, asked: int | None = None) -> None:
    """A score per image, or a refusal below 500 that names its reason in JSON; the token is in neither."""
    assert answer.status_code < 500, answer.text
    assert TOKEN not in answer.text
    row = json.loads(answer.text)
    if answer.status_code != 200:
        assert 400 <= answer.status_code and len(row["error"]) > 8
        return
    assert asked is None or len(row["scores"]) == asked
    assert all(score is None or math.isfinite(score) for score in row["scores"])


KNOWN = {"Authorization": f"Bearer {TOKEN}"}


@CASES
@given(changes=FIELDS, lost=st.sets(st.sampled_from(sorted(GOOD)), max_size=1))
def test_a_request_with_any_fields_is_scored_or_refused_with_a_reason(
    changes: dict[str, Any], lost: set[str], web: Any
) -> None:
    body = {key: value for key, value in (GOOD | changes).items() if key not in lost}
    answer = web.post("/score", content=json.dumps(body).encode(), headers=KNOWN)
    check_answer(answer, len(body["images"]) if isinstance(body.get("images"), list) else None)


@CASES
@given(body=mutated([json.dumps(GOOD).encode()], PIECES) | st.binary() | st.binary(min_size=20_001, max_size=20_100))
def test_a_request_of_any_bytes_is_scored_or_refused_with_a_reason(body: bytes, web: Any) -> None:
    answer = web.post("/score", content=body, headers=KNOWN)
    check_answer(answer)
    assert answer.status_code == 413 or len(body) <= 20_000


@CASES
@given(header=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40) | st.sampled_from([TOKEN, ""]))
def test_no_other_header_than_the_token_opens_the_server(header: str, web: Any) -> None:
    for to_device_async in (header, f"Bearer {header}x", f"bearer {TOKEN}", f"Bearer {TOKEN[:-1]}"):
        answer = web.post("/score", content=json.dumps(GOOD).encode(), headers={"Authorization": to_device_async})
        assert answer.status_code == 401
        check_answer(answer)


ANSWER = json.dumps({"protocol": 1, "reward": "bright", "scores": [1.5, None]}).encode()


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[RemoteScorer, dict[str, Any]]]:
    """A client of a server that answers what it is told to."""
    words: dict[str, Any] = {"status": 200, "content": ANSWER}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(words["status"])
            self.send_header("Content-Length", str(len(words["content"])))
            self.end_headers()
            self.wfile.write(words["content"])

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    cfg = RemoteReward(url=f"http://127.0.0.1:{server.server_port}", reward="bright", timeout_s=5, retries=1)
    yield RemoteScorer(cfg, TOKEN, lambda seconds: None), words
    server.shutdown()
    server.server_close()


@CASES
@given(content=mutated([ANSWER], PIECES) | st.binary() | JSON.map(lambda value: json.dumps(value).encode()),
       status=st.sampled_from([200, 200, 200, 400, 401, 404, 413, 429, 500, 503]))  # fmt: skip
def test_any_answer_of_a_server_is_a_score_for_every_image_or_one_error(
    content: bytes, status: int, told: tuple[RemoteScorer, dict[str, Any]]
) -> None:
    scorer, words = told
    words |= {"status": status, "content": content}
    index = torch.arange(2)
    try:
        scores = scorer.score(torch.rand(2, 3, 4, 4), PromptBatch(index, ("a", "b"), index, {}, {}))
    except RemoteError as error:
        assert len(str(error)) > 20 and TOKEN not in str(error)
        str(error).encode()
        return
    assert status == 200 and scores.shape == (2,) and not scores.isinf().any()


LINES = [b'{"prompt": "a"}\n{"prompt": "b", "k": [1]}\n', '{"prompt": "a\u2028b", "k": "\u0085"}\n'.encode()]


@CASES
@given(
    content=mutated(LINES, PIECES | st.sampled_from(["\u2028".encode(), b"\x0c", b"\r", b"\n", b'{"prompt": "a"}\n']))
)
def test_metadata_of_a_damaged_prompt_file_are_those_of_its_prompts_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    found: list[PromptFile] = []
    if refusal(lambda: found.append(read_prompts(path))):
        return
    assert found[0].meta is not None and tuple(row["prompt"] for row in found[0].meta) == found[0].texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meta")


def test_a_line_separator_inside_a_prompt_does_not_cut_its_metadata(folder: Path) -> None:
    path = folder / "p.jsonl"
    path.write_text('{"prompt": " a\u2028b ", "k": 1}\n{"prompt": "c"}\n', encoding="utf-8")
    assert read_prompts(path).meta == ({"prompt": "a\u2028b", "k": 1}, {"prompt": "c"})
