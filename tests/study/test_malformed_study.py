"""Malformed requests, plans and image folders: a clear error, status below 500, and no partial files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import CASES, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gdmd.config.study import StudyConfig
from gdmd.io import RunError
from gdmd.sources.folders import read_images
from gdmd.study.analyze import analyze
from gdmd.study.prepare import prepare
from gdmd.study.records import Plan, Prompt, Rater, Trial, read_plan, token_hash, vote_of
from gdmd.study.report import html_text

ADMIN, TOKEN, OTHER = "admin-0123456789-token", "rater-0123456789-abcdef", "rater-9876543210-fedcba"
NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def small_plan(title: str = "t", models: tuple[str, str] = ("a", "b"), text: str = "a ring") -> Plan:
    first, second = models
    sides = {"left_model": first, "right_model": second}
    raters = [
        Rater(
            token_sha256=token_hash(token),
            trials=tuple(
                Trial(id=f"{k}{n}", kind="pair", pair=str(n), prompt=0, left=f"l{n}", right=f"r{n}", **sides)
                for n in range(3)
            ),
        )
        for k, token in enumerate((TOKEN, OTHER))
    ]
    prompts = (Prompt(text=text, task=text),)
    return Plan(
        title=title, consent=title, questions=("overall",), models=models, prompts=prompts, raters=tuple(raters), seed=0
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gdmd.study.serve import create_app

    folder = tmp_path_factory.mktemp("study")
    (folder / "images").mkdir()
    (folder / "plan.json").write_text(small_plan().model_dump_json())
    with TestClient(create_app(folder, ADMIN)) as client:
        client.post("/api/consent", headers={"authorization": f"Bearer {TOKEN}"})
        yield client


def votes(client: Any) -> str:
    return client.get("/api/votes.csv", headers={"authorization": f"Bearer {ADMIN}"}).text


VOTE = b'{"trial": "00", "answers": {"overall": "left"}, "elapsed_ms": 5}'
BITS = st.sampled_from(
    [b'"\\ud800": 1, ', b"\xff", b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b"null", b"\0", b'"x": ', b"{", b"}", b"-1"]
) | st.binary(max_size=4)  # fmt: skip
PATHS = ["/", "/api/state", "/api/vote", "/api/consent", "/api/image/l0", "/api/image/..%2fplan.json", "/api/votes.csv"]
TOKENS = st.sampled_from([b"Bearer " + TOKEN.encode(), b"Bearer " + OTHER.encode(), b"Bearer", b"\xff\xfe", b"Basic x"])


@CASES
@given(
    body=mutated([VOTE], BITS) | st.binary() | st.just(b"x" * 9000),
    path=st.sampled_from(PATHS) | st.text("az./%0?#\\~", max_size=12).map(lambda text: f"/api/{text}"),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
    token=TOKENS | st.binary(max_size=8).filter(lambda value: b"\n" not in value and b"\r" not in value),
)
def test_any_request(body: bytes, path: str, method: str, token: bytes, client: Any) -> None:
    before = votes(client)
    answer = client.request(method, path, content=body, headers={"authorization": token}, follow_redirects=False)
    assert answer.status_code < 500
    if (method, path, answer.status_code) != ("POST", "/api/vote", 200):
        assert votes(client) == before
    if answer.status_code >= 400 and method != "HEAD":
        assert answer.json()["detail"]
        assert TOKEN not in answer.text and ADMIN not in answer.text


@CASES
@given(body=mutated([VOTE], BITS) | st.binary())
def test_malformed_vote(body: bytes, client: Any) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    answer = client.post("/api/vote", content=body, headers=headers)
    assert answer.status_code < 500 and ("detail" in answer.json()) == (answer.status_code != 200)


def test_unknown_fields_are_not_echoed(client: Any) -> None:
    for name in (r"\ud800", NASTY.replace('"', "'")):
        body = VOTE.replace(b"{", b'{"' + name.encode() + b'": 1, ', 1)
        answer = client.post("/api/vote", content=body, headers={"authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 422 and "<" not in answer.text and "ud800" not in answer.text


def test_missing_image(client: Any) -> None:
    answer = client.get("/api/image/l0", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 410


@CASES
@given(mutated([small_plan().model_dump_json(indent=1).encode()], BITS))
def test_damaged_plan(content: bytes) -> None:
    path = Path(_FOLDER[-1])
    (path / "plan.json").write_bytes(content)
    refusal(lambda: read_plan(path))


@pytest.mark.parametrize(
    "change", [{"prompt": 7}, {"prompt": -1}, {"left": "../../etc/passwd"}, {"right": ""}, {"left_model": "nobody"}]
)
def test_plan_with_unknown_names(change: dict[str, Any], tmp_path: Path) -> None:
    plan = small_plan().model_dump(mode="json")
    plan["raters"][0]["trials"][0] |= change
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match="names a prompt, model or image"):
        read_plan(tmp_path)


LINE = b'{"prompt": "a ring", "task": "one", "files": ["00000.png"]}\n'


@CASES
@given(
    mutated(
        [LINE], BITS | st.sampled_from([b'"files": 5', b'"../../x.png"', b'"a\\u0000b"', b'"' + b"x" * 5000 + b'"'])
    )
)
def test_damaged_prompt_list(content: bytes) -> None:
    folder = Path(_FOLDER[-1])
    (folder / "prompts.jsonl").write_bytes(content)
    Image.new("RGB", (8, 8)).save(folder / "00000.png")
    refusal(lambda: read_images(folder))


@pytest.mark.parametrize(
    "files", ["5", '"a.png"', '["../secret.png"]', '["/etc/passwd"]', '["' + "x" * 5000 + '"]', r'["a\u0000b"]']
)
def test_prompt_list_stays_in_its_folder(files: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (inside / "prompts.jsonl").write_text(f'{{"prompt": "a", "files": {files}}}')
    with pytest.raises(RunError, match="there is no file|not a list of names"):
        read_images(inside)


@CASES
@given(st.integers(0, 400), st.integers(0, 255))
def test_unreadable_image_writes_no_study(place: int, value: int) -> None:
    folder = Path(_FOLDER[-1]) / "images"
    for model in ("a", "b"):
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
        for k in range(2):
            Image.effect_noise((12, 12), 50).convert("RGB").save(folder / model / f"{k:05d}.png")
    file = folder / "b" / "00001.png"
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(bytes(content[: place + 20]) if value % 2 else bytes(content))
    cfg = StudyConfig(raters=2, pairs_per_rater=2, votes_per_pair=2, repeats=0, checks=0)
    target = folder / f"study{len(list(folder.iterdir()))}"
    if refusal(lambda: prepare(cfg, {"a": folder / "a", "b": folder / "b"}, target)):
        assert not target.exists()
    assert not list(folder.glob(".*"))


def test_report_escapes_html() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    plan = small_plan(NASTY, (NASTY, "<b>b</b>"), NASTY)
    given_votes = [
        vote_of(plan, rater, trial, "overall", "left" if k else "right", 900)
        for rater, who in enumerate(plan.raters)
        for k, trial in enumerate(who.trials)
    ]
    page = html_text(analyze(plan, given_votes, replicates=20))
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "&lt;script" in page


def test_page_inserts_text_only() -> None:
    page = (Path(__file__).parents[2] / "gdmd" / "study" / "page.html").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in page


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _FOLDER.append(str(tmp_path_factory.mktemp("malformed")))


_FOLDER: list[str] = []
