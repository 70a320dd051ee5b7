"""The study's web server (FastAPI): one page, a few JSON routes, images by random id.

Rules, each with a test: a rater never sees a model, pair name, kind of screen or expected answer; votes count only for
the current screen and only once; images go only to the rater whose screens show them; results need the admin token; a
body above 8 KiB is rejected unread; without a valid token only the page itself is served.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdmd.config.base import Config
from gdmd.config.study import Question
from gdmd.io import RunError, is_loopback, writing
from gdmd.study.export import csv_text, jsonl_text
from gdmd.study.prepare import link, links_text, write_private
from gdmd.study.records import IMAGES, LINKS, VOTES, Answer, Plan, Rater, Trial, read_plan, token_hash, votes_of
from gdmd.study.store import AlreadyVoted, Store

MAX_BODY = 8 * 1024
MIN_TOKEN_LENGTH = 16
MAX_ELAPSED_MS = 24 * 3600 * 1000
PRELOADED = 3
"""Screens whose images the page may load in advance."""


class VoteRequest(Config):
    """What the page sends for one screen."""

    trial: Annotated[str, Field(max_length=64)]
    answers: Annotated[dict[Question, Answer], Field(max_length=8)]
    elapsed_ms: Annotated[int, Field(ge=0, le=MAX_ELAPSED_MS)]


class StudySession:
    """The study behind the routes: whose token this is, which screen is next, what may be shown."""

    def __init__(self, folder: Path, plan: Plan, store: Store, admin_token: str) -> None:
        self.folder, self.plan, self.store = folder, plan, store
        self.admin = token_hash(checked_token(admin_token))
        self.numbers = {rater.token_sha256: number for number, rater in enumerate(plan.raters)}
        self.consent_sha256 = token_hash(plan.consent)
        if self.admin in self.numbers:
            raise ValueError(
                "the admin token is also a rater's token, so that rater could read the results; choose another"
            )

    def rater(self, request: Request) -> int:
        """The number of the rater whose token the request carries; 401 otherwise."""
        number = self.numbers.get(token_hash(_bearer(request)))
        if number is None:
            raise HTTPException(401, "This link is not valid. Ask the study's admin for yours.")
        return number

    def require_admin(self, request: Request) -> None:
        """401 unless the request carries the admin token; compared in constant time."""
        if not hmac.compare_digest(token_hash(_bearer(request)), self.admin):
            raise HTTPException(401, "This needs the admin token.")

    def open_screens(self, number: int) -> list[Trial]:
        """The rater's screens without an answer, in order."""
        answered = self.store.answered(number)
        return [trial for trial in self.plan.raters[number].trials if trial.id not in answered]

    def state(self, number: int) -> dict[str, Any]:
        """Everything a rater's page may know; nothing here depends on which model made an image."""
        rater: Rater = self.plan.raters[number]
        consented = self.store.consented(number)
        screens = self.open_screens(number)
        return {
            "title": self.plan.title,
            "consent": self.plan.consent,
            "consented": consented,
            "questions": list(self.plan.questions),
            "done": len(rater.trials) - len(screens),
            "total": len(rater.trials),
            "screens": [self._shown(trial) for trial in screens[:PRELOADED]] if consented else [],
        }

    def _shown(self, trial: Trial) -> dict[str, str]:
        prompt = self.plan.prompts[trial.prompt].text
        return {"trial": trial.id, "prompt": prompt, "left": trial.left, "right": trial.right}

    def vote(self, number: int, request: VoteRequest) -> None:
        """Store the answers and return once they are on disk. 403 before consent, 409 out of turn or a second time."""
        if not self.store.consented(number):
            raise HTTPException(403, "Please agree to the study first.")
        own = {trial.id for trial in self.plan.raters[number].trials}
        if request.trial not in own:
            raise HTTPException(404, "This screen is not one of yours.")
        if set(request.answers) != set(self.plan.questions):
            raise HTTPException(422, "Every question needs exactly one answer.")
        screens = self.open_screens(number)
        if any(trial.id == request.trial for trial in screens[1:]):
            raise HTTPException(409, "Another screen comes first. Reload the page.")
        answers = {str(question): str(answer) for question, answer in request.answers.items()}
        try:
            self.store.vote(number, request.trial, answers, request.elapsed_ms)
        except AlreadyVoted:
            raise HTTPException(409, "This screen was answered before; the first answers are kept.") from None

    def image(self, number: int, id_: str) -> Path:
        """The file of an image on one of the rater's screens; 404 for any other."""
        trials = self.plan.raters[number].trials
        if not self.store.consented(number) or not any(id_ in (trial.left, trial.right) for trial in trials):
            raise HTTPException(404, "There is no such image.")
        file = self.folder / IMAGES / f"{id_}.png"
        if not file.is_file():
            raise HTTPException(410, "This image is gone. Tell the study's admin.")
        return file

    def progress(self) -> dict[str, Any]:
        """Answered and planned screens of every rater, for the admin."""
        done = [len(rater.trials) - len(self.open_screens(k)) for k, rater in enumerate(self.plan.raters)]
        total = [len(rater.trials) for rater in self.plan.raters]
        listed = [{"rater": k, "done": d, "total": t} for k, (d, t) in enumerate(zip(done, total, strict=True))]
        return {"done": sum(done), "total": sum(total), "raters": listed}


def create_app(folder: Path, admin_token: str) -> FastAPI:
    """The application for one study folder. ValueError for a weak admin token, RunError for a bad folder."""
    plan = read_plan(folder)
    session = StudySession(folder, plan, Store(folder / VOTES), admin_token)
    app = FastAPI(title="study", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_closing(session.store))
    _add_rater_routes(app, session)
    _add_admin_routes(app, session)
    app.add_exception_handler(RequestValidationError, _brief)
    app.add_middleware(BodyLimitMiddleware)
    return app


def _closing(store: Store) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    return lifespan


def _add_rater_routes(app: FastAPI, session: StudySession) -> None:
    page, policy = page_and_policy()

    @app.get("/")
    def _page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/api/health")
    def _health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/state")
    def _state(number: int = Depends(session.rater)) -> dict[str, Any]:
        return session.state(number)

    @app.post("/api/consent")
    def _consent(number: int = Depends(session.rater)) -> dict[str, Any]:
        session.store.consent(number, session.consent_sha256)
        return session.state(number)

    @app.post("/api/vote")
    def _vote(request: Annotated[VoteRequest, Body()], number: int = Depends(session.rater)) -> dict[str, Any]:
        session.vote(number, request)
        return session.state(number)

    @app.get("/api/image/{id_}")
    def _image(id_: str, number: int = Depends(session.rater)) -> Response:
        return FileResponse(session.image(number, id_), media_type="image/png")


def _add_admin_routes(app: FastAPI, session: StudySession) -> None:
    only = [Depends(session.require_admin)]

    @app.get("/api/progress", dependencies=only)
    def _progress() -> dict[str, Any]:
        return session.progress()

    @app.get("/api/votes.jsonl", dependencies=only)
    def _jsonl() -> Response:
        return PlainTextResponse(
            jsonl_text(votes_of(session.plan, session.store.rows())), media_type="application/jsonl"
        )

    @app.get("/api/votes.csv", dependencies=only)
    def _csv() -> Response:
        return PlainTextResponse(csv_text(votes_of(session.plan, session.store.rows())), media_type="text/csv")


async def _brief(_: Request, error: Exception) -> Response:
    """422 that names the malformed fields without echoing what was sent."""
    assert isinstance(error, RequestValidationError)
    known = {"body", *VoteRequest.model_fields}
    places = sorted({".".join(part for part in detail["loc"] if part in known) for detail in error.errors()})
    return JSONResponse({"detail": f"The request is malformed: {', '.join(places)}."}, 422)


class BodyLimitMiddleware:
    """Rejects bodies above MAX_BODY; adds headers against caching, framing and sniffing to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then pass the request on (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def private(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        body, more = b"", True
        while more and len(body) <= MAX_BODY:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_BODY:
            await JSONResponse({"detail": f"The request is larger than {MAX_BODY} bytes."}, 413)(
                scope, receive, private
            )
            return
        await self.app(scope, _replayed(body, receive), private)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


_HEADERS: Sequence[tuple[bytes, bytes]] = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"x-robots-tag", b"noindex"),
)


def page_and_policy() -> tuple[str, str]:
    """The page, and a content security policy that allows only its own script and style (by SHA-256)."""
    page = files("gdmd.study").joinpath("page.html").read_text(encoding="utf-8")
    own = {
        kind: base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        for kind in ("script", "style")
        for inner in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    }
    return page, (
        f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


def checked_token(token: str) -> str:
    """The token itself. ValueError if it could be guessed."""
    if len(token) < MIN_TOKEN_LENGTH or len(set(token)) < MIN_TOKEN_LENGTH // 2:
        raise ValueError(
            f"the admin token has {len(token)} characters ({len(set(token))} different); use at least "
            f"{MIN_TOKEN_LENGTH} random ones, for example from: openssl rand -hex 16"
        )
    return token


def served_links(study: Path, address: str) -> list[str]:
    """The raters' links when the study is served at ``address``; empty without a table of links.

    Links to this machine with another port are rewritten. An address given to ``gdmd study plan`` is kept: it may be a
    proxy's.
    """
    table = study / LINKS
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not all(row.get("token") and row.get("link") is not None for row in rows):
        raise RunError(f"{table} is not the table that gdmd study plan wrote; restore it")
    planned = rows[0]["link"].partition("/#token=")[0]
    if planned and not is_loopback(urlsplit(planned).hostname or ""):
        return [row["link"] for row in rows]
    tokens = [row["token"] for row in rows]
    if planned != address:
        partial = table.with_name(f".{table.name}.partial")
        with writing("the raters' links", table):
            partial.unlink(missing_ok=True)
            write_private(partial, links_text(tokens, address))
            partial.replace(table)
    return [link(address, token) for token in tokens]


def run_server(folder: Path, listening: socket.socket, admin_token: str) -> None:
    """Serve until Ctrl-C. Without an access log, which would link addresses to answers."""
    import uvicorn

    app = create_app(folder, admin_token)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
