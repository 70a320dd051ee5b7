"""Client of a reward server (``gdmd rewards serve``) on another machine. JSON and PNG, never pickle.

    GET  /health           {"status": "ok"}
    GET  /version          {"protocol": 1, "gdmd": "...", "rewards": ["clip", ...], "identities": {"clip": hash, ...}}
    POST /score            {"protocol": 1, "reward": "clip", "prompts": [...], "meta": [...], "columns": [...],
                            "images": [base64 PNG, ...]}; columns: names of the metadata of all prompts
                           -> {"protocol": 1, "reward": "clip", "scores": [number or null, ...]}; null = not scored

A request is retried after a connection error, a timeout, 429 or 5xx, ``retries`` times with exponential backoff, or
after the seconds in the header Retry-After; anything else (a wrong token, an unknown reward, a malformed response) is
an error at once. Images are sent as 8-bit PNG: the score is that of the saved image, without gradient. ``submit``
returns at once, so that several remote rewards and the local ones run in parallel (``types.score_all``); ``score``
waits.

urllib rather than an HTTP library: none is a dependency of the core, and none limits the total time of a response that
arrives byte by byte.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from gdmd.config.load import validated
from gdmd.config.rewards import RemoteConfig
from gdmd.io import is_loopback
from gdmd.rewards.base import RewardModel
from gdmd.rewards.preprocessing import check_finite_images, check_images, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.types import PromptBatch

T = TypeVar("T")
PROTOCOL = 1
MAX_RESPONSE_BYTES = 1_000_000
"""One number per image needs far less."""
FIRST_PAUSE_S, MAX_PAUSE_S, MAX_WAIT_S = 0.5, 30.0, 60.0
_RETRIED = {429, 500, 502, 503, 504}


class RemoteError(ValueError):
    """A remote reward that failed; the message says what to do."""


class TransientError(Exception):
    """A failure after which a retry may succeed; wait: the seconds that the server asks for, at most ``MAX_WAIT_S``."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class RetriesExhausted(Exception):
    """The last retry failed as well."""


class PendingScores:
    """Scores of requests that are sent one after another."""

    def __init__(self, requests: Sequence[Future[list[float]]], device: torch.device) -> None:
        self._requests, self._device = requests, device

    def result(self) -> Tensor:
        """Wait: [B], fp32."""
        try:
            scores = [score for request in self._requests for score in request.result()]
        except BaseException:
            self.cancel()
            raise
        return torch.tensor(scores, dtype=torch.float32, device=self._device)

    def cancel(self) -> None:
        """Cancel the requests that were not sent yet; the current one runs to its end."""
        for request in self._requests:
            request.cancel()


class RemoteReward(RewardModel):
    """A reward of a server. Not differentiable.

    token: default: the one in the environment variable that ``token_variable`` names. options: the fields of
    ``RemoteConfig``; url and reward are required.
    """

    differentiable = False

    def __init__(self, *, token: str | None = None, **options: Any) -> None:
        cfg: RemoteConfig = validated(RemoteConfig, options, "RemoteReward")
        self.config, self.name = cfg, f"remote_{cfg.reward}"
        self._token, self._pause = token or os.environ.get(cfg.token_variable), time.sleep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="remote-reward")
        self._sent = self._failed = self._retried = self._null = 0
        host = urlsplit(cfg.url).hostname or ""
        direct = [urllib.request.ProxyHandler({})] if is_loopback(host) else []  # never through a proxy
        self._opener = urllib.request.build_opener(*direct)
        if self._token and urlsplit(cfg.url).scheme == "http" and not is_loopback(host):
            raise ValueError(
                f"{cfg.url} would send the token unencrypted; use https, or a tunnel to a loopback address"
            )

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32; NaN if the server failed and ``on_failure`` is skip."""
        return self.submit(images, prompts).result()

    def submit(self, images: Tensor, prompts: PromptBatch) -> PendingScores:
        """Start scoring and return at once. Metadata that JSON cannot hold, such as images, is not sent."""
        check_images(self.name, images, len(prompts))
        check_finite_images(self.name, images)
        saved, step = to_pil(images), self.config.batch
        meta = [{key: value for key, value in row.items() if _is_json(value)} for row in prompts.meta]
        dropped = {key for row, sent in zip(prompts.meta, meta, strict=True) for key in row.keys() - sent.keys()}
        own = {key for row in meta for key in row}  # also of this batch, whose requests get parts of it
        columns = sorted((prompts.columns | own) - dropped)
        requests = [
            self._pool.submit(self._batch, saved[k : k + step], prompts.text[k : k + step], meta[k : k + step], columns)
            for k in range(0, len(saved), step)
        ]
        return PendingScores(requests, images.device)

    def stats(self) -> dict[str, Tensor]:
        """Fraction of images so far that the server did not score, and the number of retries."""
        share = self._failed / max(self._sent, 1)
        return {
            f"reward/{self.name}/unscored": torch.tensor(share),
            f"reward/{self.name}/retries": torch.tensor(float(self._retried)),
        }

    def unscored_because(self) -> str:
        failed = f"the server did not answer for {self._failed} of {self._sent} images" if self._failed else ""
        null = f"the server's reward did not score {self._null} of {self._sent} images" if self._null else ""
        return "; ".join(filter(None, (failed, null)))

    def version(self) -> dict[str, Any]:
        """The server's /version. RemoteError if it does not answer or does not serve the reward."""
        try:
            facts: dict[str, Any] = self._with_retries(lambda: self._request("/version", None))
        except RetriesExhausted as error:
            raise RemoteError(
                f"{error}; start the server there with: gdmd rewards serve {self.config.reward}, or correct url"
            ) from error
        if facts.get("protocol") != PROTOCOL or self.config.reward not in facts.get("rewards", ()):
            raise RemoteError(
                f"{self.config.url} speaks protocol {facts.get('protocol')!r} and serves {facts.get('rewards')!r}, expected "
                f"{PROTOCOL} and {self.config.reward!r}; start it with that reward, or name one that it serves"
            )
        return facts

    def _batch(
        self, images: Sequence[Image], texts: Sequence[str], meta: Sequence[Any], columns: Sequence[str]
    ) -> list[float]:
        body = {
            "protocol": PROTOCOL, "reward": self.config.reward, "prompts": list(texts), "meta": list(meta),
            "columns": list(columns), "images": [_png(image) for image in images],
        }  # fmt: skip
        self._sent += len(images)
        try:
            scores = self._with_retries(lambda: self._read_scores(self._request("/score", body), len(images)))
            self._null += sum(map(math.isnan, scores))
            return scores
        except RetriesExhausted as error:
            if self.config.on_failure == "stop":
                raise RemoteError(
                    f"{error}. Nothing of this step was applied; start the server again and resume the run (you may change "
                    "url, timeout_s, retries and on_failure)"
                ) from error
            self._failed += len(images)
            if self._failed > self.config.max_unscored * self._sent:
                raise RemoteError(
                    f"{error}. {self._failed} of {self._sent} images have no score, more than max_unscored = "
                    f"{self.config.max_unscored}; start the server again and resume the run"
                ) from error
            return [math.nan] * len(images)

    def _with_retries(self, request: Callable[[], T]) -> T:
        """Repeat the request after transient errors, with exponential backoff. RetriesExhausted after the last one."""
        pause = FIRST_PAUSE_S
        for attempt in range(self.config.retries + 1):
            try:
                return request()
            except TransientError as error:
                if attempt == self.config.retries:
                    raise RetriesExhausted(
                        f"remote reward {self.config.url}: {error}, after {attempt + 1} tries"
                    ) from error
                self._retried += 1
                self._pause(max(pause, error.wait))
                pause = min(2 * pause, MAX_PAUSE_S)
        raise AssertionError("unreachable")

    def _request(self, path: str, body: Any) -> Any:
        """One request; ``timeout_s`` limits its total time, even if the response arrives byte by byte."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(
            self.config.url.rstrip("/") + path, content, {"Content-Type": "application/json"}
        )
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        end = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                text = _read_until(response, end, self.config.timeout_s)
        except urllib.error.HTTPError as error:
            said = self._without_token(_first_bytes(error))[:300]
            if error.code in _RETRIED:
                raise TransientError(f"answered {error.code} ({said})", _wait(error)) from error
            raise RemoteError(
                f"remote reward {self.config.url}{path} refused: {error.code} {said}{_advice(error.code)}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(
                f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
            ) from error
        try:
            content = json.loads(text)
            json.dumps(content)  # error messages show it, so endless nesting is an error here
            return content
        except (ValueError, RecursionError) as error:
            raise RemoteError(
                f"remote reward {self.config.url}{path} did not answer in JSON: {self._without_token(repr(text))[:80]}; "
                "is it the right port?"
            ) from error

    def _read_scores(self, content: Any, count: int) -> list[float]:
        scores = content.get("scores") if isinstance(content, dict) else None
        valid = isinstance(scores, list) and len(scores) == count and content.get("protocol") == PROTOCOL
        if not valid or content.get("reward") != self.config.reward or not all(map(_is_score, scores or ())):
            raise RemoteError(
                f"remote reward {self.config.url} sent a malformed response: "
                f"{self._without_token(json.dumps(content))[:120]}; expected {count} numbers of {self.config.reward} in "
                f"protocol {PROTOCOL}. Run the same version of gdmd on both machines"
            )
        return [math.nan if score is None else float(score) for score in scores or ()]

    def _without_token(self, said: str) -> str:
        """Redact the token in a response before an error shows it: some servers echo request headers."""
        return said.replace(self._token, "...") if self._token else said


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _read_until(response: Any, end: float, limit: float) -> bytes:
    """The body, of at most ``MAX_RESPONSE_BYTES``, complete before the time ``end``."""
    parts, size = [], 0
    while part := response.read1(65536):
        size += len(part)
        parts.append(part)
        if size > MAX_RESPONSE_BYTES:
            raise RemoteError(
                f"remote reward {response.url} sent more than {MAX_RESPONSE_BYTES} bytes; is it the right server?"
            )
        if time.monotonic() > end:
            raise TimeoutError(f"response not complete after {limit:g} s")
    if response.length:  # read1 does not raise if the server is killed in the middle of its response
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _first_bytes(error: urllib.error.HTTPError) -> str:
    """The start of an error response; "" if the server disconnected before it."""
    try:
        body: bytes = error.read1(4096)  # a single read takes at most timeout_s
        return body.decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _wait(error: urllib.error.HTTPError) -> float:
    """The seconds of Retry-After (RFC 9110, section 10.2.3); 0 without them, also for a date."""
    given = (error.headers.get("Retry-After") or "").strip()
    return min(float(given), MAX_WAIT_S) if given.isascii() and given.isdigit() else 0.0


def _is_score(score: Any) -> bool:
    """Whether it is a finite number or null. Python's JSON parser also accepts NaN and Infinity."""
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score))


def _advice(code: int) -> str:
    return {401: "; set the token variable to the server's token", 413: "; give a smaller batch"}.get(code, "")


def _png(image: Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
