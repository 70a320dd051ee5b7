"""The server in process: blinding, votes, consent, restarts, tokens, limits, many raters."""

from __future__ import annotations

import csv
import io
import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient
from PIL import Image
from study_world import ADMIN, MODELS, write_images, write_study

from gdmd.config.study import StudyConfig
from gdmd.io import address_of, is_loopback, listen
from gdmd.study.prepare import prepare
from gdmd.study.records import IMAGES, LINKS, VOTES, token_hash
from gdmd.study.serve import MAX_BODY, create_app, served_links
from gdmd.study.store import AlreadyVoted, Store


class Session:
    """A study, its client, and the headers of a rater or the admin."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.study, self.plan, self.tokens = write_study(folder, **settings)
        self.client = TestClient(create_app(self.study, ADMIN))

    def get(self, path: str) -> Any:
        return self.client.get(path, headers=self.head(0))

    def head(self, rater: int) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[rater]}"}

    def state(self, rater: int = 0) -> dict[str, Any]:
        return self.client.get("/api/state", headers=self.head(rater)).json()  # type: ignore[no-any-return]

    def consent(self, rater: int = 0) -> None:
        assert self.client.post("/api/consent", headers=self.head(rater)).status_code == 200

    def vote(self, trial: str, rater: int = 0, answer: str = "left", **changes: Any) -> Any:
        request = {"trial": trial, "answers": dict.fromkeys(self.plan.questions, answer), "elapsed_ms": 1500, **changes}
        return self.client.post("/api/vote", headers=self.head(rater), json=request)

    def trials(self, rater: int = 0) -> list[str]:
        return [trial.id for trial in self.plan.raters[rater].trials]


ADMIN_HEAD = {"authorization": f"Bearer {ADMIN}"}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    world = Session(tmp_path)
    with world.client:
        yield world


def test_responses_do_not_reveal_the_model(session: Session) -> None:
    session.consent()
    received = [session.client.get("/"), session.get("/api/state")]
    for trial in session.plan.raters[0].trials:
        assert (shown := session.state()["screens"][0])["trial"] == trial.id
        assert set(shown) == {"trial", "prompt", "left", "right"}
        received += [session.get(f"/api/image/{shown[side]}") for side in ("left", "right")]
        received.append(session.vote(trial.id))
    assert all(reply.status_code == 200 for reply in received)
    everything = b"".join(str(reply.headers).encode() + reply.content for reply in received)
    hidden = [*MODELS, "left_model", "expected", session.plan.raters[0].trials[0].pair]
    assert not [word for word in hidden if word.lower().encode() in everything.lower()]


def test_images_are_anonymous(session: Session) -> None:
    for file in (session.study / IMAGES).iterdir():
        with Image.open(file) as image:
            assert not image.info and image.format == "PNG"
        assert file.stat().st_mtime == 0 and len(file.stem) == 24 and not set(file.stem) - set("0123456789abcdef")
    session.consent()
    trial = next(trial for trial in session.plan.raters[0].trials if trial.kind == "pair")
    content = session.get(f"/api/image/{trial.left}").content
    place = session.study.parent / "images" / trial.left_model / f"{trial.prompt:05d}" / "samples"
    with Image.open(io.BytesIO(content)) as got, Image.open(place / f"{trial.left_model}.png") as made:
        assert got.tobytes() == made.tobytes()


def test_no_token(session: Session) -> None:
    assert session.client.get("/").status_code == session.client.get("/api/health").status_code == 200
    image = session.plan.raters[0].trials[0].left
    for head in ({}, {"authorization": "Bearer wrong"}, {"authorization": session.tokens[0]}):
        for path in ("/api/state", f"/api/image/{image}", "/api/progress", "/api/votes.csv", "/api/votes.jsonl"):
            assert session.client.get(path, headers=head).status_code == 401, path
        assert session.client.post("/api/consent", headers=head).status_code == 401
        assert session.client.post("/api/vote", headers=head, json={}).status_code in (401, 422)
    assert session.client.get("/docs").status_code == session.client.get("/openapi.json").status_code == 404


def test_results_need_the_admin_token(session: Session) -> None:
    session.consent()
    session.vote(session.trials()[0])
    for path in ("/api/progress", "/api/votes.csv", "/api/votes.jsonl"):
        assert session.get(path).status_code == 401
        assert session.client.get(path, headers=ADMIN_HEAD).status_code == 200
    assert session.client.get("/api/state", headers=ADMIN_HEAD).status_code == 401
    progress = session.client.get("/api/progress", headers=ADMIN_HEAD).json()
    assert progress["done"] == 1 and progress["raters"][0]["done"] == 1
    rows = [json.loads(line) for line in session.client.get("/api/votes.jsonl", headers=ADMIN_HEAD).text.splitlines()]
    assert {row["question"] for row in rows} == set(session.plan.questions)
    assert {row["first"] for row in rows} <= set(MODELS)


def test_one_vote_per_screen(session: Session) -> None:
    session.consent()
    first = session.trials()[0]
    assert session.vote(first, answer="left").json()["done"] == 1
    assert session.vote(first, answer="left").json()["done"] == 1  # the reply was lost, the page asks again
    assert session.vote(first, answer="right").status_code == 409
    store = Store(session.study / VOTES)
    assert [answer for _, _, answer, *_ in store.rows()] == ["left"] * 3
    store.close()


def test_vote_rules(session: Session) -> None:
    first, second = session.trials()[:2]
    assert session.vote(first).status_code == 403
    assert session.state()["screens"] == []
    assert session.get(f"/api/image/{session.plan.raters[0].trials[0].left}").status_code == 404
    session.consent()
    assert session.vote(second).status_code == 409
    assert session.vote(session.trials(1)[0]).status_code == 404
    assert session.vote(first, answers={"overall": "left"}).status_code == 422
    assert session.vote(first, answer="both").status_code == 422
    assert session.vote(first, elapsed_ms=-1).status_code == 422
    assert session.vote(first, extra=1).status_code == 422
    assert session.state()["done"] == 0
    assert session.vote(first).status_code == 200


def test_images_of_other_raters(tmp_path: Path) -> None:
    session = Session(tmp_path, prompts=12, votes_per_pair=1)
    session.consent()
    own = {image for trial in session.plan.raters[0].trials for image in (trial.left, trial.right)}
    others = {image for trial in session.plan.raters[1].trials for image in (trial.left, trial.right)} - own
    assert others
    for image in (*others, "../plan", "..%2Fplan", "%2e%2e/plan.json", "nothing"):
        assert session.get(f"/api/image/{image}").status_code == 404, image


def test_server_restart(session: Session) -> None:
    session.consent()
    session.vote(session.trials()[0])
    again = TestClient(create_app(session.study, ADMIN)).get("/api/state", headers=session.head(0)).json()
    assert again["consented"] and again["done"] == 1
    assert [screen["trial"] for screen in again["screens"]] == session.trials()[1:4]


def test_large_body(session: Session) -> None:
    session.consent()
    large = b'{"trial": "' + b"x" * MAX_BODY + b'"}'
    assert session.client.post("/api/vote", headers=session.head(0), content=large).status_code == 413
    pieces = (b"x" * 1000 for _ in range(20))
    assert session.client.post("/api/vote", headers=session.head(0), content=pieces).status_code == 413
    reply = session.client.post("/api/vote", headers=session.head(0), content=b"{nonsense <script>")
    assert reply.status_code == 422 and "script" not in reply.text


def test_privacy_of_the_page(session: Session) -> None:
    for path in ("/", "/api/health", "/api/state"):
        headers = session.client.get(path).headers
        assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
    policy = session.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page = session.client.get("/").text
    assert "http://" not in page and "https://" not in page and " src=" not in page


def test_ten_raters_at_once(tmp_path: Path) -> None:
    session = Session(tmp_path, raters=10, prompts=20, pairs_per_rater=6)
    failures: list[str] = []

    def rate(rater: int) -> None:
        session.consent(rater)
        for trial in session.trials(rater):
            codes = sorted(session.vote(trial, rater, answer).status_code for answer in ("left", "right"))
            failures.extend([] if codes == [200, 409] else [f"{rater}: {codes}"])

    threads = [threading.Thread(target=rate, args=(rater,)) for rater in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store = Store(session.study / VOTES)
    assert len(list(store.rows())) == 3 * sum(len(rater.trials) for rater in session.plan.raters)
    store.close()


def test_concurrent_votes_on_one_screen(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "votes.sqlite") for _ in range(2)]
    for k in range(30):
        kept: list[str] = []
        barrier = threading.Barrier(2)

        def write(place: int, k: int = k, kept: list[str] = kept, barrier: threading.Barrier = barrier) -> None:
            answer = ("left", "right")[place]
            barrier.wait()
            try:
                stores[place].vote(0, f"screen {k}", {"overall": answer, "quality": answer}, 10)
                kept.append(answer)
            except AlreadyVoted:
                return

        threads = [threading.Thread(target=write, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(kept) == 1
        assert {answer for trial, _, answer, *_ in stores[0].rows() if trial == f"screen {k}"} == set(kept)


def test_database_constraints(tmp_path: Path) -> None:
    Store(tmp_path / "votes.sqlite").vote(0, "a", {"overall": "left"}, 10)
    file = sqlite3.connect(tmp_path / "votes.sqlite")
    with pytest.raises(sqlite3.IntegrityError):
        file.execute("INSERT INTO votes VALUES ('a', 'overall', 'right', 1, 5, '')")
    with pytest.raises(sqlite3.IntegrityError):
        file.execute("INSERT INTO votes VALUES ('b', 'overall', 'both', 1, 5, '')")
    file.close()


def test_bad_admin_tokens(session: Session) -> None:
    for weak in ("", "short", "a" * 40):
        with pytest.raises(ValueError, match="admin token has"):
            create_app(session.study, weak)
    with pytest.raises(ValueError, match="is also a rater's token"):
        create_app(session.study, session.tokens[0])


def test_plan_holds_no_token(session: Session) -> None:
    text = (session.study / "plan.json").read_text()
    assert session.tokens[0] not in text and token_hash(session.tokens[0]) in text
    for name in ("plan.json", "raters.csv"):
        assert (session.study / name).stat().st_mode & 0o077 == 0


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org")))


def test_plan_is_not_overwritten(session: Session) -> None:
    folders = {model: session.study.parent / "images" / model for model in MODELS}
    before = (session.study / "plan.json").read_bytes()
    with pytest.raises(ValueError, match="never written over another"):
        prepare(StudyConfig(raters=1, votes_per_pair=1, pairs_per_rater=4), folders, session.study)
    assert (session.study / "plan.json").read_bytes() == before


def links_of(study: Path) -> list[str]:
    with (study / LINKS).open() as file:
        return [row["link"] for row in csv.DictReader(file)]


def test_links_follow_the_port(tmp_path: Path) -> None:
    study, _, tokens = write_study(tmp_path)
    assert links_of(study) == [f"http://127.0.0.1:8765/#token={token}" for token in tokens]
    with listen("127.0.0.1", 0) as listening:
        address = address_of(listening)
        port = listening.getsockname()[1]
        assert address == f"http://127.0.0.1:{port}" and port != 0
        expected = [f"{address}/#token={token}" for token in tokens]
        assert served_links(study, address) == expected == links_of(study)
        assert (study / LINKS).stat().st_mode & 0o777 == 0o600
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: .*--port"):
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as listening:
        assert address_of(listening) == f"http://{socket.gethostname()}:{listening.getsockname()[1]}"
    (study / LINKS).unlink()
    assert served_links(study, address) == []


def test_planned_address_is_kept(tmp_path: Path) -> None:
    folders = {model: write_images(tmp_path / model, model, 6) for model in MODELS}
    cfg = StudyConfig(raters=2, pairs_per_rater=4, votes_per_pair=2, repeats=1, checks=1)
    prepared = prepare(cfg, folders, tmp_path / "study", address="https://study.example.org/round1/")
    expected = [f"https://study.example.org/round1/#token={token}" for token in prepared.tokens]
    assert served_links(tmp_path / "study", "http://127.0.0.1:9") == expected == links_of(tmp_path / "study")
