"""What ``gdmd rewards serve`` does: rewards behind HTTP, in JSON and PNG; the protocol is in ``rewards.remote``.

Loopback by default; any other address needs a bearer token, checked before the body is read. Requests above a size, a
number of images, a number of pixels or a rate are refused before an image is decoded. One request is scored at a time.
Put a TLS proxy in front of any address that others can reach.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gdmd.config.extras import install
from gdmd.data.image_files import to_rgb
from gdmd.rewards.remote import PROTOCOL, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI
    from PIL.Image import Image

    from gdmd.config.rewards import ImageReward
    from gdmd.types import Reward

SHORTEST_TOKEN = 16
LARGEST_SIDE = 4096
"""Pixels; a PNG of a few kilobytes may claim to be far larger."""
MOST_PIXELS = 64 * 1024 * 1024
"""Of all images of a request: 64 of 1024 x 1024, 0.8 GB as numbers."""
LONGEST_PROMPT = 4000


@dataclass(frozen=True)
class Limits:
    """What one client may ask: images and bytes per request, requests per minute."""

    images: int = 64
    size: int = 256_000_000
    rate: int = 600


class Refused(Exception):
    """A request that is not answered: HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Rates:
    """Requests of the last minute, by client."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._times: dict[str, deque[float]] = {}

    def check(self, client: str) -> None:
        """Count a request; Refused (429) above the limit."""
        now = self._clock()
        for name in [name for name, times in self._times.items() if not times or times[-1] < now - 60]:
            del self._times[name]
        times = self._times.setdefault(client, deque())
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= self._limit:
            raise Refused(429, f"more than {self._limit} requests in a minute; slow down")
        times.append(now)


def make_app(
    rewards: Mapping[str, Reward],
    token: str | None,
    limits: Limits = Limits(),  # noqa: B008
    identities: Mapping[str, str] = MappingProxyType({}),
) -> FastAPI:
    """The server of these rewards, by the names that clients use. identities: ``scorers.scorer_identity`` of each."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    app = FastAPI(title="gdmd rewards", docs_url=None, redoc_url=None, openapi_url=None)
    rates, scoring = Rates(limits.rate), threading.Lock()

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        return JSONResponse({"error": str(error)}, error.status)

    def admit(request: Request) -> None:
        rates.check(request.client.host if request.client else "unknown")
        check_token(request.headers.get("authorization", ""), token)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def version(request: Request) -> JSONResponse:
        from gdmd import __version__

        admit(request)
        own = {"rewards": sorted(rewards), "identities": dict(identities)}
        return JSONResponse({"protocol": PROTOCOL, "gdmd": __version__, **own})

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
    """Refused (401) unless the header carries the token; in constant time."""
    if token is not None and not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
        raise Refused(401, "wrong or missing bearer token")


async def read_body(request: Any, limit: int) -> bytes:
    """The body; Refused (413) as soon as it is longer than ``limit`` bytes, whatever its header claims."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refused(413, f"request larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _scored(body: bytes, rewards: Mapping[str, Reward], limits: Limits, scoring: threading.Lock) -> dict[str, Any]:
    name, prompts, meta, images = read_request(body, rewards, limits)
    try:
        with scoring:
            scores = score_images(rewards[name], images, prompts, meta)
    except ValueError as error:
        raise Refused(422, str(error)[:300]) from error
    return {"protocol": PROTOCOL, "reward": name, "scores": scores}


def read_request(
    body: bytes, rewards: Mapping[str, Reward], limits: Limits
) -> tuple[str, list[str], list[dict[str, Any]], list[Image]]:
    """(reward, prompts, metadata, images) of a body. Refused (400, 404, 413) for anything else."""
    try:
        row = json.loads(body)
        name, prompts, meta, pictures = row["reward"], row["prompts"], row.get("meta", []), row["images"]
        spoken = repr(row.get("protocol"))[:40]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(400, "expected a JSON object with reward, prompts and images") from error
    if row.get("protocol") != PROTOCOL:
        raise Refused(400, f"this server speaks protocol {PROTOCOL}, got {spoken}")
    if not isinstance(name, str) or name not in rewards:
        raise Refused(404, f"no reward {str(name)[:40]!r} here; there are {sorted(rewards)}")
    texts = isinstance(prompts, list) and all(isinstance(one, str) and len(one) <= LONGEST_PROMPT for one in prompts)
    objects = isinstance(meta, list) and all(isinstance(one, dict) for one in meta)
    if not texts or not objects or not isinstance(pictures, list) or len(pictures) != len(prompts):
        raise Refused(400, "prompts and images should be lists of one length, meta a list of objects")
    if meta and len(meta) != len(prompts):
        raise Refused(400, f"{len(meta)} metadata for {len(prompts)} prompts")
    if not 0 < len(pictures) <= limits.images:
        raise Refused(413, f"{len(pictures)} images in a request, from 1 to {limits.images} are allowed")
    images: list[Image] = []
    for one in pictures:
        images.append(read_png(one, MOST_PIXELS - sum(image.width * image.height for image in images)))
    return name, prompts, meta, images


def read_png(text: Any, most: int = MOST_PIXELS) -> Image:
    """An image from base64. Refused (400) for what is no PNG, and for one of too many pixels, before it is decoded."""
    from PIL import Image as pillow

    try:
        image = pillow.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if max(image.size) > LARGEST_SIDE:
            raise Refused(413, f"an image of {image.width} x {image.height} pixels; at most {LARGEST_SIDE} a side")
        if image.width * image.height > most:
            raise Refused(413, f"more than {MOST_PIXELS} pixels in a request; give a smaller batch")
        return to_rgb(image, "an image of a request")
    except (binascii.Error, TypeError, ValueError, OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise Refused(400, "an image is not a base64 PNG") from error


def score_images(
    reward: Reward, images: Sequence[Image], prompts: Sequence[str], meta: Sequence[dict[str, Any]]
) -> list[float | None]:
    """Scores as JSON numbers; None = not scored (NaN). Images of one size are scored together."""
    import torch

    from gdmd.rewards.preprocessing import from_pil
    from gdmd.types import PromptBatch

    scores: list[float | None] = [None] * len(images)
    for size in dict.fromkeys(image.size for image in images):
        places = [k for k, image in enumerate(images) if image.size == size]
        index = torch.arange(len(places))
        own = tuple(meta[k] for k in places) if meta else ()
        batch = PromptBatch(index, tuple(prompts[k] for k in places), index, {}, {}, own)
        with torch.no_grad():
            found = reward.score(from_pil([images[k] for k in places]), batch).tolist()
        for k, score in zip(places, found, strict=True):
            scores[k] = score if math.isfinite(score) else None
    return scores


def read_names(names: Sequence[str]) -> dict[str, ImageReward]:
    """Configs of kinds and module:function targets, by the word they were asked for with."""
    from pydantic import TypeAdapter, ValidationError

    from gdmd.config.explain import explain
    from gdmd.config.rewards import TaggedReward

    found: dict[str, ImageReward] = {}
    for name in names:
        spec = {"kind": "callable", "target": name} if ":" in name or name.endswith(".py") else {"kind": name}
        try:
            found[name] = TypeAdapter(TaggedReward).validate_python(spec)
        except ValidationError as error:
            raise ValueError("\n".join(explain(TaggedReward, error, f"reward {name!r}"))) from None
    return found


def serve(
    names: Sequence[str],
    host: str,
    port: int,
    device: str,
    token: str | None,
    limits: Limits,
    say: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C. ValueError for an open address without a token, and for a token that is too short."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, so a token is needed; set GDMD_REWARD_TOKEN to "
            f"{SHORTEST_TOKEN} characters or more, or keep the default --host 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ValueError(f"the token has {len(token)} characters, at least {SHORTEST_TOKEN} are needed")
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(f"serving needs fastapi and uvicorn; do: {install('study')}") from error
    from gdmd.recipes.build_rewards import image_reward
    from gdmd.recipes.reward_identity import scorer_identity

    specs = read_names(names)
    rewards = {name: image_reward(spec, device) for name, spec in specs.items()}
    app = make_app(rewards, token, limits, {name: scorer_identity(spec) for name, spec in specs.items()})
    say(f"http://{host}:{port} serves {', '.join(names)}{'' if token else ' without a token'}")
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=30)
