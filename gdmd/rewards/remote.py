"""A reward that another machine computes: ``gdmd rewards serve`` there, this client here. JSON and PNG, never pickle.

    GET  /health           {"status": "ok"}
    GET  /version          {"protocol": 1, "gdmd": "...", "rewards": ["clip", ...], "identities": {"clip": hash, ...}}
    POST /score            {"protocol": 1, "reward": "clip", "prompts": [...], "meta": [...], "images": [base64 PNG, ...]}
                           -> {"protocol": 1, "reward": "clip", "scores": [number or null, ...]}; null = not scored

A request is tried again after a connection error, a time-out, 429 or 5xx, ``retries`` times with pauses that double;
anything else (a wrong token, an unknown reward, a garbled answer) is an error at once. Images travel as 8-bit PNG, so a
score is that of the image as it would be saved, and there is no gradient. ``submit`` starts the work and returns, so
that several remote rewards, and those of this machine, work side by side (``types.score_all``); ``score`` waits.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from gdmd.config.rewards import RemoteReward
from gdmd.rewards.preprocessing import check_images, to_pil

if TYPE_CHECKING:
    from PIL.Image import Image

    from gdmd.types import PromptBatch

T = TypeVar("T")
PROTOCOL = 1
LARGEST_ANSWER = 1_000_000
"""Bytes of an answer; one number per image needs far less."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_AGAIN = {429, 500, 502, 503, 504}


class RemoteError(ValueError):
    """A remote reward that did not answer; the message says what to do."""


class _Passing(Exception):
    """A failure that may be over at the next try."""


class Answers:
    """Scores that a server was asked for, a request after the other."""

    def __init__(self, waiting: Sequence[Future[list[float]]], device: torch.device) -> None:
        self._waiting, self._device = waiting, device

    def result(self) -> Tensor:
        """Wait: [B], fp32."""
        try:
            scores = [score for one in self._waiting for score in one.result()]
        except BaseException:
            self.cancel()
            raise
        return torch.tensor(scores, dtype=torch.float32, device=self._device)

    def cancel(self) -> None:
        """Send no further request; the one under way ends by itself."""
        for one in self._waiting:
            one.cancel()


class RemoteScorer:
    """A remote reward as a ``Reward``. Not differentiable."""

    differentiable = False

    def __init__(
        self, cfg: RemoteReward, token: str | None = None, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self.cfg, self.name = cfg, f"remote_{cfg.reward}"
        self._token, self._pause = token, pause
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="remote-reward")
        self._asked = self._unscored = self._retried = self._null = 0
        host = urlsplit(cfg.url).hostname or ""
        direct = [urllib.request.ProxyHandler({})] if is_loopback(host) else []  # no proxy reaches this machine
        self._opener = urllib.request.build_opener(*direct)
        if token and urlsplit(cfg.url).scheme == "http" and not is_loopback(host):
            raise ValueError(
                f"{cfg.url} would send the token unencrypted; use https, or a tunnel to a loopback address"
            )

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B], fp32; NaN where ``on_failure`` is skip and the server failed."""
        return self.submit(images, prompts).result()

    def submit(self, images: Tensor, prompts: PromptBatch) -> Answers:
        """Start scoring and return at once."""
        check_images(self.name, images, len(prompts))
        if not torch.isfinite(images).all():
            bad = torch.nonzero(~torch.isfinite(images).flatten(1).all(1))[:, 0].tolist()
            raise ValueError(f"{self.name} got images that are not finite at samples {bad}; look at the decoder")
        pictures, step = to_pil(images), self.cfg.batch
        meta = [dict(one) for one in prompts.meta] if prompts.meta else []
        waiting = [
            self._pool.submit(self._batch, pictures[k : k + step], prompts.text[k : k + step], meta[k : k + step])
            for k in range(0, len(pictures), step)
        ]
        return Answers(waiting, images.device)

    def stats(self) -> dict[str, Tensor]:
        """Share of images without a score, and repeated requests, since the start."""
        share = self._unscored / max(self._asked, 1)
        return {
            f"reward/{self.name}/unscored": torch.tensor(share),
            f"reward/{self.name}/retries": torch.tensor(float(self._retried)),
        }

    def unscored_because(self) -> str:
        lost = f"the server gave no answer for {self._unscored} of {self._asked} images" if self._unscored else ""
        null = (
            f"the server's own reward left {self._null} of {self._asked} images without a score" if self._null else ""
        )
        return "; ".join(filter(None, (lost, null)))

    def version(self) -> dict[str, Any]:
        """What the server is. RemoteError when it does not answer or does not have the reward."""
        found: dict[str, Any] = self._tried(lambda: self._request("/version", None))
        if found.get("protocol") != PROTOCOL or self.cfg.reward not in found.get("rewards", ()):
            raise RemoteError(
                f"{self.cfg.url} speaks protocol {found.get('protocol')!r} and offers {found.get('rewards')!r}, wanted "
                f"{PROTOCOL} and {self.cfg.reward!r}; start it with that reward, or name one of its own"
            )
        return found

    def _batch(self, pictures: Sequence[Image], texts: Sequence[str], meta: Sequence[Any]) -> list[float]:
        body = {
            "protocol": PROTOCOL, "reward": self.cfg.reward, "prompts": list(texts), "meta": list(meta),
            "images": [_png(picture) for picture in pictures],
        }  # fmt: skip
        self._asked += len(pictures)
        try:
            scores = self._tried(lambda: self._read_scores(self._request("/score", body), len(pictures)))
            self._null += sum(map(math.isnan, scores))
            return scores
        except _GaveUp as error:
            if self.cfg.on_failure == "stop":
                raise RemoteError(
                    f"{error}. Nothing of this step was applied; start the server again and resume the run, also with "
                    "another url, timeout_s, retries or on_failure"
                ) from error
            self._unscored += len(pictures)
            if self._unscored > self.cfg.max_unscored * self._asked:
                raise RemoteError(
                    f"{error}. {self._unscored} of {self._asked} images are without a score, more than max_unscored = "
                    f"{self.cfg.max_unscored}; start the server again and resume the run"
                ) from error
            return [math.nan] * len(pictures)

    def _tried(self, request: Callable[[], T]) -> T:
        """The request, again after passing failures, with pauses that double. _GaveUp after the last."""
        pause = FIRST_PAUSE_S
        for attempt in range(self.cfg.retries + 1):
            try:
                return request()
            except _Passing as error:
                if attempt == self.cfg.retries:
                    raise _GaveUp(f"remote reward {self.cfg.url}: {error}, after {attempt + 1} tries") from error
                self._retried += 1
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError("unreachable")

    def _request(self, path: str, body: Any) -> Any:
        """One exchange, within ``timeout_s`` of wall clock even when the answer trickles in."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        request = urllib.request.Request(self.cfg.url.rstrip("/") + path, content, {"Content-Type": "application/json"})
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        end = time.monotonic() + self.cfg.timeout_s
        try:
            with self._opener.open(request, timeout=self.cfg.timeout_s) as answer:
                text = _read_until(answer, end, self.cfg.timeout_s)
        except urllib.error.HTTPError as error:
            said = self._without_token(_beginning(error))[:300]
            if error.code in _AGAIN:
                raise _Passing(f"answered {error.code} ({said})") from error
            raise RemoteError(
                f"remote reward {self.cfg.url}{path} refused: {error.code} {said}{_cure(error.code)}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})") from error
        try:
            found = json.loads(text)
            json.dumps(found)  # an error message will show it: nesting without end is garbage too
            return found
        except (ValueError, RecursionError) as error:
            raise RemoteError(
                f"remote reward {self.cfg.url}{path} answered no JSON: {self._without_token(repr(text))[:80]}; "
                "is it the right port?"
            ) from error

    def _read_scores(self, found: Any, count: int) -> list[float]:
        scores = found.get("scores") if isinstance(found, dict) else None
        right = isinstance(scores, list) and len(scores) == count and found.get("protocol") == PROTOCOL
        if not right or found.get("reward") != self.cfg.reward or not all(map(_is_score, scores or ())):
            raise RemoteError(
                f"remote reward {self.cfg.url} gave a garbled answer: {self._without_token(json.dumps(found))[:120]}; "
                f"expected {count} numbers of {self.cfg.reward} in protocol {PROTOCOL}: run the same version of gdmd on "
                "both sides"
            )
        return [math.nan if score is None else float(score) for score in scores or ()]

    def _without_token(self, said: str) -> str:
        """What a server said, for an error: some repeat the headers of a request."""
        return said.replace(self._token, "...") if self._token else said


class _GaveUp(Exception):
    """The last try failed as well."""


def _read_until(answer: Any, end: float, limit: float) -> bytes:
    """The body, at most ``LARGEST_ANSWER`` bytes, by the time ``end``."""
    parts, size = [], 0
    while part := answer.read1(65536):
        size += len(part)
        parts.append(part)
        if size > LARGEST_ANSWER:
            raise RemoteError(
                f"remote reward {answer.url} sent more than {LARGEST_ANSWER} bytes; is it the right server?"
            )
        if time.monotonic() > end:
            raise TimeoutError(f"answer not complete after {limit:g} s")
    if answer.length:  # read1 ends in silence where a server is killed in the middle of its answer
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first words of a refusal; "" where the server went away before it said them."""
    try:
        said: bytes = error.read1(4096)  # one read: a trickling body costs timeout_s at most
        return said.decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _is_score(score: Any) -> bool:
    """A finite number or null. Python's reader accepts NaN and Infinity, which are no scores."""
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score))


def _cure(code: int) -> str:
    return {401: "; set the token variable to the server's token", 413: "; give a smaller batch"}.get(code, "")


def _png(image: Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine. A name other than localhost is taken as one that others reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
