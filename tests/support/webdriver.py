"""A small WebDriver client (W3C WebDriver over HTTP, standard library): drives headless Chromium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "enter": "\ue007", "escape": "\ue00c"}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def missing() -> str:
    """Why browser tests cannot run here; "" if they can."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or shutil.which("chromedriver") is None:
        return "Chromium with chromedriver is missing (Debian: apt-get install chromium chromium-driver)"
    return ""


class Browser:
    """One Chromium window; close() ends it and its driver."""

    def __init__(self, profile: Path, flags: Sequence[str] = (), mobile: bool = False) -> None:
        self.driver = subprocess.Popen(
            [str(shutil.which("chromedriver")), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.driver.stdout is not None
        started = next(found for line in self.driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        self.base, self.session = f"http://127.0.0.1:{started[1]}", ""
        options: dict[str, Any] = {
            "binary": shutil.which("chromium") or shutil.which("google-chrome"),
            "args": [*FLAGS, f"--user-data-dir={profile}", *flags],
        }
        if mobile:
            options["mobileEmulation"] = {
                "deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2, "touch": True}
            }
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        try:
            self.session = "/session/" + self.send("POST", "/session", wanted)["sessionId"]
        except BaseException:
            self.close()
            raise

    def send(self, verb: str, path: str, body: object = None) -> Any:
        """Send one command. RuntimeError with the driver's message."""
        text = None if verb != "POST" else json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(self.base + path, text, {"content-type": "application/json"}, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, url: str) -> None:
        """Go to the page, from a blank one: a change of the fragment alone would not load it."""
        self.send("POST", self.session + "/url", {"url": "about:blank"})
        self.send("POST", self.session + "/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run a script; returns the value of its return statement."""
        return self.send("POST", self.session + "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        """Click the middle of the element; fails if it is covered."""
        found = self.send("POST", self.session + "/element", {"using": "css selector", "value": selector})
        self.send("POST", f"{self.session}/element/{next(iter(found.values()))}/click")

    def tap(self, selector: str) -> None:
        """Tap the middle of the element."""
        found = self.send("POST", self.session + "/element", {"using": "css selector", "value": selector})
        moves = [
            {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": found},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        finger = {"type": "pointer", "id": "finger", "parameters": {"pointerType": "touch"}, "actions": moves}
        self.send("POST", self.session + "/actions", {"actions": [finger]})

    def press(self, *keys: str) -> None:
        """Press keys, given by name (KEYS) or letter, one after the other."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("POST", self.session + "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """Wait until the script returns true; AssertionError with the page's text after that."""
        return wait_for(lambda: self.run(script), seconds, lambda: str(self.run("return document.body.innerText")))

    def screenshot(self, path: Path) -> None:
        """Write a screenshot."""
        path.write_bytes(base64.b64decode(self.send("GET", self.session + "/screenshot")))

    def errors(self) -> list[str]:
        """Console errors since the last call."""
        entries = self.send("POST", self.session + "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self) -> None:
        """End the window and the driver."""
        if self.session:
            self.send("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait(20)
        if self.driver.stdout is not None:
            self.driver.stdout.close()


def wait_for(done: Callable[[], Any], seconds: float, describe: Callable[[], str] = str) -> Any:
    """Poll until ``done`` returns something true."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, f"not within {seconds} s: {describe()}"
        time.sleep(0.05)
    return found
