"""The server's rules, in process: no leak, no second vote, resume, consent, organizer's token, limits, many raters."""

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
from study_world import MODELS, ORGANIZER, write_images, write_study

from gdmd.config.study import StudyConfig
from gdmd.study.prepare import prepare
from gdmd.study.records import IMAGES, LINKS, VOTES, token_hash
from gdmd.study.serve import MAX_BODY, address_of, create_app, is_loopback, listen, served_links
from gdmd.study.store import AlreadyVoted, Store


class Desk:
    """A study, its client, and the headers of a rater or the organizer."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.study, self.plan, self.tokens = write_study(folder, **settings)
        self.client = TestClient(create_app(self.study, ORGANIZER))

    def head(self, rater: int) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[rater]}"}

    def state(self, rater: int = 0) -> dict[str, Any]:
        return self.client.get("/api/state", headers=self.head(rater)).json()  # type: ignore[no-any-return]

    def consent(self, rater: int = 0) -> None:
        assert self.client.post("/api/consent", headers=self.head(rater)).status_code == 200

    def vote(self, trial: str, rater: int = 0, answer: str = "left", **changes: Any) -> Any:
        ballot = {"trial": trial, "answers": dict.fromkeys(self.plan.questions, answer), "elapsed_ms": 1500, **changes}
        return self.client.post("/api/vote", headers=self.head(rater), json=ballot)

    def trials(self, rater: int = 0) -> list[str]:
        return [trial.id for trial in self.plan.raters[rater].trials]


ORGANIZER_HEAD = {"authorization": f"Bearer {ORGANIZER}"}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    world = Desk(tmp_path)
    with world.client:
        yield world


def test_nothing_that_a_rater_receives_depends_on_the_models(desk: Desk) -> None:
    desk.consent()
    received = [desk.client.get("/"), desk.client.get("/api/state", headers=desk.head(0))]
    for trial in desk.plan.raters[0].trials:
        assert (shown := desk.state()["screens"][0])["trial"] == trial.id
        assert set(shown) == {"trial", "prompt", "left", "right"}
        received += [desk.client.get(f"/api/image/{shown[side]}", headers=desk.head(0)) for side in ("left", "right")]
        received.append(desk.vote(trial.id))
    assert all(reply.status_code == 200 for reply in received)
    everything = b"".join(str(reply.headers).encode() + reply.content for reply in received)
    hidden = [*MODELS, "left_model", "expected", desk.plan.raters[0].trials[0].pair]
    assert not [word for word in hidden if word.lower().encode() in everything.lower()]


def test_images_are_pixels_only_with_one_date_and_a_name_that_says_nothing(desk: Desk) -> None:
    for file in (desk.study / IMAGES).iterdir():
        with Image.open(file) as picture:
            assert not picture.info and picture.format == "PNG"
        assert file.stat().st_mtime == 0 and len(file.stem) == 24 and not set(file.stem) - set("0123456789abcdef")
    both = {t.kind for t in desk.plan.raters[0].trials}
    assert both == {"pair", "repeat", "check"}


def test_an_image_is_the_models_own_pixels(desk: Desk) -> None:
    desk.consent()
    trial = next(trial for trial in desk.plan.raters[0].trials if trial.kind == "pair")
    content = desk.client.get(f"/api/image/{trial.left}", headers=desk.head(0)).content
    place = desk.study.parent / "images" / trial.left_model / f"{trial.prompt:05d}" / "samples"
    with Image.open(io.BytesIO(content)) as got, Image.open(place / f"{trial.left_model}.png") as made:
        assert got.tobytes() == made.tobytes()


def test_without_a_token_there_is_only_the_page(desk: Desk) -> None:
    assert desk.client.get("/").status_code == desk.client.get("/api/health").status_code == 200
    image = desk.plan.raters[0].trials[0].left
    for head in ({}, {"authorization": "Bearer wrong"}, {"authorization": desk.tokens[0]}):
        for path in ("/api/state", f"/api/image/{image}", "/api/progress", "/api/votes.csv", "/api/votes.jsonl"):
            assert desk.client.get(path, headers=head).status_code == 401, path
        assert desk.client.post("/api/consent", headers=head).status_code == 401
        assert desk.client.post("/api/vote", headers=head, json={}).status_code in (401, 422)
    assert desk.client.get("/docs").status_code == desk.client.get("/openapi.json").status_code == 404


def test_results_need_the_organizers_token_and_a_raters_is_not_enough(desk: Desk) -> None:
    desk.consent()
    desk.vote(desk.trials()[0])
    for path in ("/api/progress", "/api/votes.csv", "/api/votes.jsonl"):
        assert desk.client.get(path, headers=desk.head(0)).status_code == 401
        assert desk.client.get(path, headers=ORGANIZER_HEAD).status_code == 200
    assert desk.client.get("/api/state", headers=ORGANIZER_HEAD).status_code == 401
    progress = desk.client.get("/api/progress", headers=ORGANIZER_HEAD).json()
    assert progress["done"] == 1 and progress["raters"][0]["done"] == 1
    rows = [json.loads(line) for line in desk.client.get("/api/votes.jsonl", headers=ORGANIZER_HEAD).text.splitlines()]
    assert {row["question"] for row in rows} == set(desk.plan.questions)
    assert {row["first"] for row in rows} <= set(MODELS)


def test_nobody_votes_twice_and_a_repeated_request_changes_nothing(desk: Desk) -> None:
    desk.consent()
    first = desk.trials()[0]
    assert desk.vote(first, answer="left").json()["done"] == 1
    assert desk.vote(first, answer="left").json()["done"] == 1  # the reply was lost, the page asks again
    assert desk.vote(first, answer="right").status_code == 409
    store = Store(desk.study / VOTES)
    assert [answer for _, _, answer, *_ in store.rows()] == ["left"] * 3
    store.close()


def test_screens_come_in_order_belong_to_one_rater_and_need_consent_and_all_answers(desk: Desk) -> None:
    first, second = desk.trials()[:2]
    assert desk.vote(first).status_code == 403
    assert desk.state()["screens"] == []
    assert desk.client.get(f"/api/image/{desk.plan.raters[0].trials[0].left}", headers=desk.head(0)).status_code == 404
    desk.consent()
    assert desk.vote(second).status_code == 409
    assert desk.vote(desk.trials(1)[0]).status_code == 404
    assert desk.vote(first, answers={"overall": "left"}).status_code == 422
    assert desk.vote(first, answer="both").status_code == 422
    assert desk.vote(first, elapsed_ms=-1).status_code == 422
    assert desk.vote(first, extra=1).status_code == 422
    assert desk.state()["done"] == 0
    assert desk.vote(first).status_code == 200


def test_a_rater_sees_no_image_of_another_raters_screens_only(tmp_path: Path) -> None:
    desk = Desk(tmp_path, prompts=12, votes_per_pair=1)
    desk.consent()
    own = {image for trial in desk.plan.raters[0].trials for image in (trial.left, trial.right)}
    others = {image for trial in desk.plan.raters[1].trials for image in (trial.left, trial.right)} - own
    assert others
    for image in (*others, "../plan", "..%2Fplan", "%2e%2e/plan.json", "nothing"):
        assert desk.client.get(f"/api/image/{image}", headers=desk.head(0)).status_code == 404, image


def test_a_rater_comes_back_after_a_restart_where_they_stopped(desk: Desk) -> None:
    desk.consent()
    desk.vote(desk.trials()[0])
    again = TestClient(create_app(desk.study, ORGANIZER)).get("/api/state", headers=desk.head(0)).json()
    assert again["consented"] and again["done"] == 1
    assert [screen["trial"] for screen in again["screens"]] == desk.trials()[1:4]


def test_a_large_body_is_refused_whether_or_not_it_says_its_size(desk: Desk) -> None:
    desk.consent()
    large = b'{"trial": "' + b"x" * MAX_BODY + b'"}'
    assert desk.client.post("/api/vote", headers=desk.head(0), content=large).status_code == 413
    pieces = (b"x" * 1000 for _ in range(20))
    assert desk.client.post("/api/vote", headers=desk.head(0), content=pieces).status_code == 413
    reply = desk.client.post("/api/vote", headers=desk.head(0), content=b"{nonsense <script>")
    assert reply.status_code == 422 and "script" not in reply.text


def test_answers_carry_the_headers_that_keep_them_private(desk: Desk) -> None:
    for path in ("/", "/api/health", "/api/state"):
        headers = desk.client.get(path).headers
        assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
    policy = desk.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_page_asks_nothing_of_another_server(desk: Desk) -> None:
    page = desk.client.get("/").text
    assert "http://" not in page and "https://" not in page and " src=" not in page


def test_ten_raters_at_once_lose_nothing_and_a_screen_is_taken_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path, raters=10, prompts=20, pairs_per_rater=6)
    failures: list[str] = []

    def rate(rater: int) -> None:
        desk.consent(rater)
        for trial in desk.trials(rater):
            codes = sorted(desk.vote(trial, rater, answer).status_code for answer in ("left", "right"))
            failures.extend([] if codes == [200, 409] else [f"{rater}: {codes}"])

    threads = [threading.Thread(target=rate, args=(rater,)) for rater in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store = Store(desk.study / VOTES)
    assert len(list(store.rows())) == 3 * sum(len(rater.trials) for rater in desk.plan.raters)
    store.close()


def test_two_writers_of_one_screen_leave_the_answers_of_one(tmp_path: Path) -> None:
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


def test_the_file_itself_refuses_a_second_vote_and_an_unknown_answer(tmp_path: Path) -> None:
    Store(tmp_path / "votes.sqlite").vote(0, "a", {"overall": "left"}, 10)
    file = sqlite3.connect(tmp_path / "votes.sqlite")
    with pytest.raises(sqlite3.IntegrityError):
        file.execute("INSERT INTO votes VALUES ('a', 'overall', 'right', 1, 5, '')")
    with pytest.raises(sqlite3.IntegrityError):
        file.execute("INSERT INTO votes VALUES ('b', 'overall', 'both', 1, 5, '')")
    file.close()


def test_a_weak_organizers_token_and_a_raters_token_are_refused(desk: Desk) -> None:
    for weak in ("", "short", "a" * 40):
        with pytest.raises(ValueError, match="organizer's token has"):
            create_app(desk.study, weak)
    with pytest.raises(ValueError, match="is a rater's token"):
        create_app(desk.study, desk.tokens[0])


def test_the_plan_holds_no_token_and_is_for_the_owner_only(desk: Desk) -> None:
    text = (desk.study / "plan.json").read_text()
    assert desk.tokens[0] not in text and token_hash(desk.tokens[0]) in text
    for name in ("plan.json", "raters.csv"):
        assert (desk.study / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("host", "safe"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_is_told_from_addresses_that_others_reach(host: str, safe: bool) -> None:
    assert is_loopback(host) is safe


def test_a_plan_is_never_written_over_another(desk: Desk) -> None:
    folders = {model: desk.study.parent / "images" / model for model in MODELS}
    before = (desk.study / "plan.json").read_bytes()
    with pytest.raises(ValueError, match="never written over another"):
        prepare(StudyConfig(raters=1, votes_per_pair=1, pairs_per_rater=4), folders, desk.study)
    assert (desk.study / "plan.json").read_bytes() == before


def links_of(study: Path) -> list[str]:
    with (study / LINKS).open() as file:
        return [row["link"] for row in csv.DictReader(file)]


def test_links_are_whole_addresses_and_follow_the_port_that_is_served(tmp_path: Path) -> None:
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


def test_the_address_that_was_planned_is_kept_where_it_is_served_from_elsewhere(tmp_path: Path) -> None:
    folders = {model: write_images(tmp_path / model, model, 6) for model in MODELS}
    cfg = StudyConfig(raters=2, pairs_per_rater=4, votes_per_pair=2, repeats=1, checks=1)
    prepared = prepare(cfg, folders, tmp_path / "study", address="https://study.example.org/round1/")
    expected = [f"https://study.example.org/round1/#token={token}" for token in prepared.tokens]
    assert served_links(tmp_path / "study", "http://127.0.0.1:9") == expected == links_of(tmp_path / "study")


def test_a_table_of_the_time_before_whole_links_is_written_anew(tmp_path: Path) -> None:
    study, _, tokens = write_study(tmp_path)
    rows = [f"{number},{token},/#token={token}" for number, token in enumerate(tokens)]
    (study / LINKS).write_text("\n".join(["rater,token,link", *rows]) + "\n")
    served_links(study, "http://127.0.0.1:9000")
    assert links_of(study) == [f"http://127.0.0.1:9000/#token={token}" for token in tokens]
    (study / LINKS).unlink()
    assert served_links(study, "http://127.0.0.1:9000") == []


def test_all_addresses_are_linked_by_the_machines_name() -> None:
    with listen("0.0.0.0", 0) as listening:
        assert address_of(listening) == f"http://{socket.gethostname()}:{listening.getsockname()[1]}"
