"""What ``gdmd rewards serve`` does: serve rewards over HTTP; ``rewards.remote`` documents the protocol.

Loopback by default; any other address needs a bearer token, checked before the body is read. Requests above the limits
on bytes, images, pixels or rate are refused before an image is decoded. One request is scored at a time. Put a TLS proxy
in front of any address that other machines can reach.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdmd.config.extras import install
from gdmd.data.image_files import to_rgb
from gdmd.io import address_of, is_loopback, listen
from gdmd.rewards.remote import PROTOCOL

if TYPE_CHECKING:
    from fastapi import FastAPI
    from PIL.Image import Image

    from gdmd.config.rewards import RealRewardConfig
    from gdmd.types import Reward

MIN_TOKEN_LENGTH = 16
MAX_SIDE = 4096
"""Largest side of an image in pixels; a PNG of a few kilobytes can claim to be far larger."""
MAX_PIXELS = 64 * 1024 * 1024
"""Most pixels of all images in a request: 64 of 1024 x 1024, 0.8 GB in fp32."""
MAX_PROMPT_LENGTH = 4000


@dataclass(frozen=True)
class Limits:
    """Limits of one client: images and bytes per request, requests per minute."""

    images: int = 64
    size: int = 256_000_000
    rate: int = 600


class HTTPError(Exception):
    """An error response: HTTP status, reason and headers."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class RateLimiter:
    """Limits the requests per minute of each client."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: dict[str, deque[float]] = {}

    def check(self, client: str) -> None:
        """Count a request. HTTPError (429) above the limit."""
        now = time.monotonic()
        for name in [name for name, times in self._times.items() if not times or times[-1] < now - 60]:
            del self._times[name]
        times = self._times.setdefault(client, deque())
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self._limit:
            wait = {"Retry-After": str(math.ceil(times[0] + 60 - now))}  # until the oldest one no longer counts
            raise HTTPError(429, f"more than {self._limit} requests in a minute; slow down", wait)
        times.append(now)


def make_app(
    rewards: Mapping[str, Reward],
    token: str | None,
    limits: Limits = Limits(),  # noqa: B008
    identities: Mapping[str, str] = MappingProxyType({}),
) -> FastAPI:
    """The server of these rewards, by the names that clients use; identities: ``scorer_identity`` of each."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    app = FastAPI(title="gdmd rewards", docs_url=None, redoc_url=None, openapi_url=None)
    rates, scoring = RateLimiter(limits.rate), threading.Lock()

    @app.exception_handler(HTTPError)
    async def http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPError)
        return JSONResponse({"error": str(error)}, error.status, dict(error.headers))

    def admit(request: Request) -> None:
        rates.check(request.client.host if request.client else "unknown")
        check_token(request.headers.get("authorization", ""), token)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def version(request: Request) -> JSONResponse:
        from gdmd._version import __version__

        admit(request)
        served = {"rewards": sorted(rewards), "identities": dict(identities)}
        return JSONResponse({"protocol": PROTOCOL, "gdmd": __version__, **served})

    async def score(request: Request) -> JSONResponse:
        admit(request)
        body = await read_body(request, limits.size)
        answer = await run_in_threadpool(_scored, body, rewards, limits, scoring)
        return JSONResponse(answer)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/version", version, methods=["GET"])
    app.add_route("/score", score, methods=["POST"])
    return app


def check_token(header: str, token: str | None) -> None:
    """HTTPError (401) unless the header has the token; compared in constant time."""
    if token is not None and not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise HTTPError(401, "wrong or missing bearer token")


async def read_body(request: Any, limit: int) -> bytes:
    """The body. HTTPError (413) as soon as more than ``limit`` bytes have arrived, whatever the header says."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPError(413, f"request larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _scored(body: bytes, rewards: Mapping[str, Reward], limits: Limits, scoring: threading.Lock) -> dict[str, Any]:
    request, images = read_request(body, rewards, limits)
    try:
        with scoring:
            scores = score_images(rewards[request.reward], images, request.prompts, request.meta, request.columns)
    except ValueError as error:
        raise HTTPError(422, str(error)[:300]) from error
    return {"protocol": PROTOCOL, "reward": request.reward, "scores": scores}


class ScoreRequest(BaseModel):
    """The body of POST /score; see ``rewards.remote``."""

    model_config = ConfigDict(strict=True)

    protocol: int
    reward: str
    prompts: list[Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)]]
    images: list[str]
    meta: list[dict[str, Any]] = []
    columns: list[str] = []


def read_request(body: bytes, rewards: Mapping[str, Reward], limits: Limits) -> tuple[ScoreRequest, list[Image]]:
    """A request and its decoded images. HTTPError (400, 404, 413) for anything else."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPError(400, f"{field}: {first['msg'][:200]}; expected protocol, reward, prompts and images") from error
    count = len(request.images)
    if request.protocol != PROTOCOL:
        raise HTTPError(400, f"this server speaks protocol {PROTOCOL}, got {request.protocol}")
    if request.reward not in rewards:
        raise HTTPError(404, f"no reward {request.reward[:40]!r} on this server; it has {sorted(rewards)}")
    if len(request.prompts) != count or len(request.meta) not in (0, count):
        raise HTTPError(400, f"{count} images, {len(request.prompts)} prompts, {len(request.meta)} metadata objects")
    if not 0 < count <= limits.images:
        raise HTTPError(413, f"{count} images in a request; from 1 to {limits.images} are allowed")
    images: list[Image] = []
    for text in request.images:
        images.append(read_png(text, MAX_PIXELS - sum(image.width * image.height for image in images)))
    return request, images


def read_png(text: str, max_pixels: int = MAX_PIXELS) -> Image:
    """An image from base64. HTTPError, before decoding, if it is not a PNG (400) or has too many pixels (413)."""
    from PIL import Image as pillow

    try:
        image = pillow.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if max(image.size) > MAX_SIDE:
            raise HTTPError(413, f"an image of {image.width} x {image.height} pixels; at most {MAX_SIDE} per side")
        if image.width * image.height > max_pixels:
            raise HTTPError(413, f"more than {MAX_PIXELS} pixels in a request; use a smaller batch")
        return to_rgb(image, "an image of a request")
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise HTTPError(400, "an image is not a base64 PNG") from error


def score_images(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    meta: Sequence[dict[str, Any]],
    columns: Sequence[str] = (),
) -> list[float | None]:
    """One score per image, None for NaN (not scored). Images of the same size are scored as one batch.

    columns: names of the metadata of all prompts, which some prompts may lack.
    """
    from gdmd.rewards.base import score_by_size

    scores = score_by_size(reward, images, prompts, meta, columns=frozenset(columns))
    return [score if math.isfinite(score) else None for score in scores]


def read_names(names: Sequence[str]) -> dict[str, RealRewardConfig]:
    """Configs of reward kinds and module:function targets, by the name that was given."""
    from gdmd.config.load import validated
    from gdmd.config.rewards import TaggedReward

    specs: dict[str, RealRewardConfig] = {}
    for name in names:
        spec = {"kind": "callable", "target": name} if ":" in name or name.endswith(".py") else {"kind": name}
        specs[name] = validated(TaggedReward, spec, f"reward {name!r}")
    return specs


def serve(
    names: Sequence[str],
    host: str,
    port: int,
    device: str | None,
    token: str | None,
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C.

    ValueError for a public address without a token, a short token, and an address or port that is not available.
    """
    if token is None and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, so a token is needed: set GDMD_REWARD_TOKEN to "
            f"{MIN_TOKEN_LENGTH} characters or more, or keep the default --host 127.0.0.1"
        )
    if token is not None and len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(f"the token has {len(token)} characters; use at least {MIN_TOKEN_LENGTH}")
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(f"serving needs fastapi and uvicorn; do: {install('serve')}") from error
    from gdmd.diffusion.device import pick_device
    from gdmd.recipes.build_rewards import image_reward
    from gdmd.recipes.reward_identity import scorer_identity

    specs, device = read_names(names), pick_device(device)
    rewards = {name: image_reward(spec, device) for name, spec in specs.items()}
    app = make_app(rewards, token, limits, {name: scorer_identity(spec) for name, spec in specs.items()})
    listening = listen(host, port)
    say(f"{address_of(listening)} serves {', '.join(names)}{'' if token else ' without a token'}")
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=30)
    uvicorn.Server(config).run(sockets=[listening])
