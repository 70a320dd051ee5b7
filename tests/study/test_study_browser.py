"""A rater's study in a real browser: consent, keyboard, zoom, resume, phone, lost server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from study_world import MODELS, Server, write_study
from webdriver import Browser, missing

from gdmd.study.records import VOTES, Plan, votes_of
from gdmd.study.store import Store

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
READY = "return !document.querySelector('#screen').hidden && document.querySelectorAll('.side img.ready').length === 2"
ENOUGH = "return !document.querySelector('#next').disabled"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Plan, list[str], Server]]:
    study, plan, tokens = write_study(tmp_path_factory.mktemp("study"), raters=3, pairs_per_rater=3)
    server = Server(study)
    yield study, plan, tokens, server
    server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    window = Browser(tmp_path_factory.mktemp("profile") / "desktop", ["--window-size=1280,860"])
    yield window
    window.close()


def at(number: int, total: int) -> str:
    """The screen of that number is shown and its images are there."""
    counted = f"document.querySelector('#done').textContent === '{number} / {total}'"
    return f"return {counted} && ({READY.removeprefix('return ')})"


def begin(browser: Browser, server: Server, token: str) -> None:
    """Open a rater's link and agree if the page asks for it."""
    browser.open(f"{server.url}/#token={token}")
    browser.until("return !document.querySelector('#consent').hidden || !document.querySelector('#screen').hidden")
    if not browser.run("return document.querySelector('#consent').hidden"):
        browser.click("#agree")


def test_keyboard_and_resume(world: tuple[Path, Plan, list[str], Server], browser: Browser) -> None:
    study, plan, tokens, server = world
    total = len(plan.raters[0].trials)
    browser.open(f"{server.url}/#token={tokens[0]}")
    browser.until("return !document.querySelector('#consent').hidden")
    assert "no right or wrong" in browser.run("return document.querySelector('#consent p').textContent")
    browser.click("#agree")
    for number in range(1, 3):
        browser.until(at(number, total))
        browser.press("enter")  # without answers nothing happens
        browser.press("left", "down", "right")
        browser.until(ENOUGH)
        browser.press("enter")
    browser.until(at(3, total))
    browser.open(f"{server.url}/#token={tokens[0]}")  # the same link, later
    for number in range(3, total + 1):
        browser.until(at(number, total))
        browser.press("right", "right", "up", "left", "right")  # up goes back: the second answer becomes left
        browser.until(ENOUGH)
        browser.press("enter")
    browser.until("return document.querySelector('#message h1').textContent === 'Thank you!'")
    store = Store(study / VOTES)
    votes = [vote for vote in votes_of(plan, store.rows()) if vote.rater == 0]
    store.close()
    by_screen = {trial.id: (k, trial) for k, trial in enumerate(plan.raters[0].trials)}
    assert len(votes) == 3 * len(by_screen)
    given = {(vote.question, vote.answer) for vote in votes}
    assert given == {
        ("overall", "left"), ("quality", "tie"), ("alignment", "right"), ("overall", "right"), ("quality", "left"),
    }  # fmt: skip
    assert all(vote.elapsed_ms > 0 for vote in votes)


def test_zoom(world: tuple[Path, Plan, list[str], Server], browser: Browser) -> None:
    _, plan, tokens, server = world
    begin(browser, server, tokens[1])
    browser.until(at(1, len(plan.raters[1].trials)))
    browser.click(".side[data-side=right]")
    source = "return document.querySelector('#zoom img').src === document.querySelector('.side[data-side={}] img').src"
    browser.until(source.format("right"))
    browser.press("z")
    browser.until(source.format("left"))
    browser.press("escape")
    browser.until("return document.querySelector('#zoom').hidden")


def test_preloading_and_blinding(world: tuple[Path, Plan, list[str], Server], browser: Browser) -> None:
    _, plan, tokens, server = world
    browser.errors()
    begin(browser, server, tokens[1])
    browser.until(at(1, len(plan.raters[1].trials)))
    ahead = "return performance.getEntriesByType('resource').filter(e => e.name.includes('/api/image/')).length"
    shown = {id_ for trial in plan.raters[1].trials[:3] for id_ in (trial.left, trial.right)}
    browser.until(f"return ({ahead.removeprefix('return ')}) >= {len(shown)}")
    everything = browser.run("return document.documentElement.outerHTML + JSON.stringify(state)")
    assert not [word for word in (*MODELS, plan.raters[1].trials[0].pair) if word in everything]
    assert browser.run("return Object.keys(state.screens[0]).sort()") == ["left", "prompt", "right", "trial"]
    assert browser.errors() == []


def test_bad_links(world: tuple[Path, Plan, list[str], Server], browser: Browser) -> None:
    server = world[3]
    browser.open(f"{server.url}/#token=nobody")
    browser.until("return document.querySelector('#message p').textContent.includes('not valid')")
    browser.open(f"{server.url}/")
    browser.until("return document.querySelector('#message h1').textContent.includes('incomplete')")


def test_phone(world: tuple[Path, Plan, list[str], Server], tmp_path: Path) -> None:
    study, plan, tokens, server = world
    total = len(plan.raters[2].trials)
    phone = Browser(tmp_path / "phone", mobile=True)
    try:
        phone.open(f"{server.url}/#token={tokens[2]}")
        phone.until("return !document.querySelector('#consent').hidden")
        phone.tap("#agree")
        phone.until(at(1, total))
        assert phone.run("return document.documentElement.scrollWidth <= window.innerWidth")
        for question in plan.questions:
            phone.tap(f"input[name={question}][value=tie]")
        phone.until(ENOUGH)
        phone.tap("#next")
        phone.until(at(2, total))
    finally:
        phone.close()
    store = Store(study / VOTES)
    assert {vote.answer for vote in votes_of(plan, store.rows()) if vote.rater == 2} == {"tie"}
    store.close()


def test_answer_is_resent(tmp_path: Path, browser: Browser) -> None:
    study, plan, tokens = write_study(tmp_path, questions=("overall",))
    server = Server(study)
    port = server.url.rpartition(":")[2]
    try:
        browser.open(f"{server.url}/#token={tokens[0]}")
        browser.until("return !document.querySelector('#consent').hidden")
        browser.click("#agree")
        browser.until(at(1, len(plan.raters[0].trials)))
        server.kill()
        browser.press("left", "enter")
        browser.until("return document.querySelector('#status').textContent.includes('not saved yet')")
        server = Server(study, int(port))
        browser.until(at(2, len(plan.raters[0].trials)))
    finally:
        server.kill()
