"""A local model hub that accepts uploads: what huggingface_hub sends to create a repository and to commit files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from local_hub import _Hub

from gdmd.hub import offline, unreachable

TOKEN = "hf_SecretOfTheTest0123456789"  # noqa: S105
LARGE = 10_000
"""Size in bytes from which a file goes to the large file storage."""


class UploadHub(_Hub):
    """Repositories are folders; ``answers`` maps a part of a path to the status with which requests are refused."""

    large: dict[str, bytes]
    answers: dict[str, int]
    account: dict[str, Any]

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami"):
            return self._json(200, self.account) if self._allowed() else None
        if len(parts := self.path.strip("/").split("/")) == 4 and parts[:2] == ["api", "models"]:
            return self._listing("/".join(parts[2:]), "revision", "main")
        super().do_GET()

    def do_PUT(self) -> None:
        content = self._content()
        if self._allowed(open_to_all=True):
            self.large[self.path.rpartition("/")[2]] = content
            self._json(200, {})

    def do_POST(self) -> None:
        content, parts = self._content(), self.path.partition("?")[0].strip("/").split("/")
        if not self._allowed():
            return
        if self.path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(content))
        elif "preupload" in parts:
            files = json.loads(content)["files"]
            modes = {file["path"]: "lfs" if file["size"] >= LARGE else "regular" for file in files}
            rows = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._json(200, {"files": rows})
        elif parts[-1] == "batch":
            self._json(
                200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(content)["objects"]]}
            )
        elif "commit" in parts:
            self._commit(self.folder / "/".join(parts[2:4]), content)
        else:
            self._json(200, {})

    def _content(self) -> bytes:
        self.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _allowed(self, *, open_to_all: bool = False) -> bool:
        """Whether the request has the token and no answer is set for it; else it is refused, naming the token."""
        given = self.headers.get("Authorization", "")
        status = next((status for part, status in self.answers.items() if part in self.path), 0)
        status = status or (0 if open_to_all or given == f"Bearer {TOKEN}" else 401)
        if status:
            self._json(status, {"error": f"refused with {given}", "url": f"http://x/{given}"})
        return not status

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        folder, there = self.folder / name, (self.folder / name).is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".asked.json").write_text(json.dumps(asked))
        self._json(409 if there else 200, {"url": f"http://{self.headers['Host']}/{name}", "error": "it exists"})

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where a large file is uploaded to; nowhere if the hub has it."""
        if one["oid"] in self.large:
            return one
        return {**one, "actions": {"upload": {"href": f"http://{self.headers['Host']}/storage/{one['oid']}"}}}

    def _commit(self, folder: Path, content: bytes) -> None:
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "deletedFile":
                gone = folder / value["path"]
                gone.unlink()
                if not any(gone.parent.iterdir()):  # a repository has no empty folders
                    gone.parent.rmdir()
            if line["key"] not in ("file", "lfsFile"):
                continue
            target = folder / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            data = base64.b64decode(value["content"]) if line["key"] == "file" else self.large[value["oid"]]
            target.write_bytes(data)
            assert line["key"] == "file" or hashlib.sha256(data).hexdigest() == value["oid"]
        url = f"http://{self.headers['Host']}/{folder.parent.name}/{folder.name}/commit/{'1' * 40}"
        self._json(200, {"commitUrl": url, "commitOid": "1" * 40})

    def _json(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def account(role: str = "write", org_role: str = "write") -> dict[str, Any]:
    """What the Hub says about the user "me" of the organization "team"."""
    token = {"accessToken": {"role": role, "displayName": "test"}}
    return {"type": "user", "name": "me", "auth": token, "orgs": [{"name": "team", "roleInOrg": org_role}]}


@contextmanager
def logged_in(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[type[UploadHub]]:
    """This process is logged in to a hub in ``folder``, with an empty cache."""
    patch.setenv("HF_TOKEN", TOKEN)
    with upload_hub(folder) as (address, state):
        own = {"HF_HUB_CACHE": str(folder.with_name("cache")), "HF_HUB_DISABLE_XET": True}
        own |= {"HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in {"ENDPOINT": address, "HF_HUB_OFFLINE": False, **own}.items():
            patch.setattr(constants, name, value)
        _forget()
        yield state
    patch.undo()
    _forget()


def _forget() -> None:
    """The session of a process that was offline refuses every request; whether the hub answers is asked once."""
    close_session()
    for question in (offline, unreachable):
        question.cache_clear()


@contextmanager
def upload_hub(folder: Path) -> Iterator[tuple[str, type[UploadHub]]]:
    """Serve folder/ORG/NAME/...; yields its address and its state."""
    state: Any = {"folder": folder, "gated": (), "asked": [], "large": {}, "answers": {}, "account": account()}
    handler = type("Hub", (UploadHub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
