"""kill -9 during voting: every acknowledged answer is on disk, and no screen is stored partially."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from study_world import Server, write_study

from gdmd.study.records import VOTES, Plan
from gdmd.study.store import Store


def rate(url: str, plan: Plan, rater: int, token: str, acknowledged: list[str]) -> None:
    """Vote on screen after screen until the server is gone; record what it acknowledged."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, trust_env=False) as client:
        try:
            client.post("/api/consent")
            for trial in plan.raters[rater].trials:
                answers = dict.fromkeys(plan.questions, "left")
                request = {"trial": trial.id, "answers": answers, "elapsed_ms": 900}
                if client.post("/api/vote", json=request).status_code == 200:
                    acknowledged.append(trial.id)
        except httpx.TransportError:
            return


def stored(study: Path) -> dict[str, set[str]]:
    """Screen -> the questions with an answer on disk."""
    store = Store(study / VOTES)
    asked: dict[str, set[str]] = {}
    for trial, question, *_ in store.rows():
        asked.setdefault(trial, set()).add(question)
    store.close()
    return asked


def test_kill_loses_no_acknowledged_vote(tmp_path: Path) -> None:
    study, plan, tokens = write_study(tmp_path, prompts=40, raters=3, pairs_per_rater=30)
    server = Server(study)
    acknowledged: list[str] = []
    threads = [
        threading.Thread(target=rate, args=(server.url, plan, rater, tokens[rater], acknowledged)) for rater in range(3)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while len(acknowledged) < 15 and time.monotonic() < end:
        time.sleep(0.002)
    server.kill()
    for thread in threads:
        thread.join()
    assert 15 <= len(acknowledged) < sum(len(rater.trials) for rater in plan.raters), "killed in the middle"
    asked = stored(study)
    assert set(acknowledged) <= set(asked)
    assert all(questions == set(plan.questions) for questions in asked.values())
    again = Server(study)
    try:
        head = {"authorization": f"Bearer {tokens[0]}"}
        state = httpx.get(again.url + "/api/state", headers=head, trust_env=False).json()
    finally:
        again.kill()
    own = [trial.id for trial in plan.raters[0].trials]
    assert state["done"] == len(set(own) & set(asked))
    assert state["screens"][0]["trial"] == next(trial for trial in own if trial not in asked)
