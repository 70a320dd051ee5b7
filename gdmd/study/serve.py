"""The study's web server: one page, a handful of JSON routes, images by random id. FastAPI, imported with this file.

Rules, each with a test: a rater sees no model, pair name, kind of screen or right answer; votes count only for the screen
at hand and only once; images go only to the rater whose screens show them; results need the organizer's token; a body
above 8 KiB is refused unread; without a valid token there is nothing but the page itself.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import ipaddress
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
from gdmd.io import RunError, writing
from gdmd.study.export import csv_text, jsonl_text
from gdmd.study.prepare import link, links_text, write_private
from gdmd.study.records import IMAGES, LINKS, VOTES, Answer, Plan, Rater, Trial, read_plan, token_hash, votes_of
from gdmd.study.store import AlreadyVoted, Store

MAX_BODY = 8 * 1024
SHORTEST_TOKEN = 16
LONGEST_MS = 24 * 3600 * 1000
AHEAD = 3  # screens whose images the page may load in advance


class Ballot(Config):
    """What the page sends for one screen."""

    trial: Annotated[str, Field(max_length=64)]
    answers: Annotated[dict[Question, Answer], Field(max_length=8)]
    elapsed_ms: Annotated[int, Field(ge=0, le=LONGEST_MS)]


class Desk:
    """The study as the routes see it: who a token is, what comes next, what may be shown."""

    def __init__(self, folder: Path, plan: Plan, store: Store, organizer_token: str) -> None:
        self.folder, self.plan, self.store = folder, plan, store
        self.organizer = token_hash(checked_token(organizer_token))
        self.numbers = {rater.token_sha256: number for number, rater in enumerate(plan.raters)}
        self.consent_sha256 = token_hash(plan.consent)
        if self.organizer in self.numbers:
            raise ValueError("the organizer's token is a rater's token, who could read the results; choose another")

    def rater(self, request: Request) -> int:
        """The number of the rater whose token the request carries; 401 otherwise."""
        number = self.numbers.get(token_hash(_bearer(request)))
        if number is None:
            raise HTTPException(401, "This link is not valid. Ask the organizer for yours.")
        return number

    def require_organizer(self, request: Request) -> None:
        """401 unless the request carries the organizer's token; compared in constant time."""
        if not hmac.compare_digest(token_hash(_bearer(request)), self.organizer):
            raise HTTPException(401, "This needs the organizer's token.")

    def open_screens(self, number: int) -> list[Trial]:
        """The rater's screens without an answer, in order."""
        answered = self.store.answered(number)
        return [trial for trial in self.plan.raters[number].trials if trial.id not in answered]

    def state(self, number: int) -> dict[str, Any]:
        """All that a rater's page may know. Nothing here depends on which model made an image."""
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
            "screens": [self._shown(trial) for trial in screens[:AHEAD]] if consented else [],
        }

    def _shown(self, trial: Trial) -> dict[str, str]:
        prompt = self.plan.prompts[trial.prompt].text
        return {"trial": trial.id, "prompt": prompt, "left": trial.left, "right": trial.right}

    def vote(self, number: int, ballot: Ballot) -> None:
        """Store the answers; returns once they are on disk. 403 before consent, 409 out of turn or a second time."""
        if not self.store.consented(number):
            raise HTTPException(403, "Please agree to the study first.")
        own = {trial.id for trial in self.plan.raters[number].trials}
        if ballot.trial not in own:
            raise HTTPException(404, "This screen is not one of yours.")
        if set(ballot.answers) != set(self.plan.questions):
            raise HTTPException(422, "Every question needs exactly one answer.")
        screens = self.open_screens(number)
        if any(trial.id == ballot.trial for trial in screens[1:]):
            raise HTTPException(409, "Another screen comes first. Reload the page.")
        try:
            self.store.vote(number, ballot.trial, {**ballot.answers}, ballot.elapsed_ms)
        except AlreadyVoted:
            raise HTTPException(409, "This screen was answered before; the first answers stay.") from None

    def image(self, number: int, id_: str) -> Path:
        """The file of an image that one of the rater's screens shows; 404 for any other."""
        trials = self.plan.raters[number].trials
        if not self.store.consented(number) or not any(id_ in (trial.left, trial.right) for trial in trials):
            raise HTTPException(404, "There is no such image.")
        file = self.folder / IMAGES / f"{id_}.png"
        if not file.is_file():
            raise HTTPException(410, "This image is gone. Tell the organizer.")
        return file

    def progress(self) -> dict[str, Any]:
        """How far every rater is: for the organizer."""
        done = [len(rater.trials) - len(self.open_screens(k)) for k, rater in enumerate(self.plan.raters)]
        total = [len(rater.trials) for rater in self.plan.raters]
        listed = [{"rater": k, "done": d, "total": t} for k, (d, t) in enumerate(zip(done, total, strict=True))]
        return {"done": sum(done), "total": sum(total), "raters": listed}


def create_app(folder: Path, organizer_token: str) -> FastAPI:
    """The application of one study folder. ValueError for a weak organizer's token, RunError for a bad folder."""
    plan = read_plan(folder)
    desk = Desk(folder, plan, Store(folder / VOTES), organizer_token)
    app = FastAPI(title="study", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_closing(desk.store))
    _add_rater_routes(app, desk)
    _add_organizer_routes(app, desk)
    app.add_exception_handler(RequestValidationError, _brief)
    app.add_middleware(Guard)
    return app


def _closing(store: Store) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    return lifespan


def _add_rater_routes(app: FastAPI, desk: Desk) -> None:
    page, policy = page_and_policy()

    @app.get("/")
    def _page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/api/health")
    def _health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/state")
    def _state(number: int = Depends(desk.rater)) -> dict[str, Any]:
        return desk.state(number)

    @app.post("/api/consent")
    def _consent(number: int = Depends(desk.rater)) -> dict[str, Any]:
        desk.store.consent(number, desk.consent_sha256)
        return desk.state(number)

    @app.post("/api/vote")
    def _vote(ballot: Annotated[Ballot, Body()], number: int = Depends(desk.rater)) -> dict[str, Any]:
        desk.vote(number, ballot)
        return desk.state(number)

    @app.get("/api/image/{id_}")
    def _image(id_: str, number: int = Depends(desk.rater)) -> Response:
        return FileResponse(desk.image(number, id_), media_type="image/png")


def _add_organizer_routes(app: FastAPI, desk: Desk) -> None:
    only = [Depends(desk.require_organizer)]

    @app.get("/api/progress", dependencies=only)
    def _progress() -> dict[str, Any]:
        return desk.progress()

    @app.get("/api/votes.jsonl", dependencies=only)
    def _jsonl() -> Response:
        return PlainTextResponse(jsonl_text(votes_of(desk.plan, desk.store.rows())), media_type="application/jsonl")

    @app.get("/api/votes.csv", dependencies=only)
    def _csv() -> Response:
        return PlainTextResponse(csv_text(votes_of(desk.plan, desk.store.rows())), media_type="text/csv")


async def _brief(_: Request, error: Exception) -> Response:
    """A malformed request is told so without an echo of what it sent."""
    assert isinstance(error, RequestValidationError)
    known = {"body", *Ballot.model_fields}
    places = sorted({".".join(part for part in detail["loc"] if part in known) for detail in error.errors()})
    return JSONResponse({"detail": f"The request is malformed: {', '.join(places)}."}, 422)


class Guard:
    """Around every request: a body above MAX_BODY is refused, and answers carry headers that keep them private."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then hand it on; ASGI."""
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
    """The page, and a content security policy that admits its own script and style (by SHA-256) and nothing else."""
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
    """The token, or ValueError where it could be guessed."""
    if len(token) < SHORTEST_TOKEN or len(set(token)) < SHORTEST_TOKEN // 2:
        raise ValueError(
            f"the organizer's token has {len(token)} characters ({len(set(token))} different); take at least "
            f"{SHORTEST_TOKEN} random ones, for example from: openssl rand -hex 16"
        )
    return token


def served_links(study: Path, address: str) -> list[str]:
    """The raters' links, now that the study is served at ``address``.

    Where the table has links to this machine, those of another port are written anew; an address that was given to
    ``gdmd study plan`` stays, for it may be a proxy's. Empty without a table.
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name other than localhost is taken as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. RunError if it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RunError(
            f"cannot listen on {host}, port {port}: {error}; choose others with --host and --port"
        ) from error


def address_of(listening: socket.socket) -> str:
    """http://HOST:PORT as a browser takes it; this machine's name if the server listens on every address."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(folder: Path, listening: socket.socket, organizer_token: str) -> None:
    """Serve until Ctrl-C. The access log is off: it would tie addresses to answers."""
    import uvicorn

    app = create_app(folder, organizer_token)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
