"""A local model hub: repository files over HTTP, as huggingface_hub requests them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _Hub(BaseHTTPRequestHandler):
    folder: Path
    gated: tuple[str, ...]
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._listing("/".join(parts[2:4]), parts[4], parts[5])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._send(200, b"")

    def _listing(self, name: str, what: str, revision: str) -> None:
        folder = self.folder / name
        if not folder.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        rows: Any = [
            {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0"} for file in files
        ]
        if what != "tree":
            rows = {"id": name, "sha": revision, "siblings": [{"rfilename": file} for file in files]}
        self._send(200, json.dumps(rows).encode())

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        place = self.folder / name / file
        if name in self.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if not place.is_file():
            known = place.is_relative_to(self.folder) and (self.folder / name).is_dir()
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        content = place.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"X-Repo-Commit": revision, "ETag": etag}, body=body)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub(folder: Path, gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serve folder/ORG/NAME/...; yields (address, requested paths)."""
    handler = type("Hub", (_Hub,), {"folder": folder, "gated": gated, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


def gdmd(home: Path, address: str | None, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run gdmd in ``home`` with its caches there and the hub at ``address`` (None: offline)."""
    code = "import json, sys; from gdmd.cli.app import main; main(json.loads(sys.argv[1]))"
    hub_at = {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    own = {"HF_HOME": str(home / "hf"), "GDMD_REWARDS": str(home / "rewards"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
        **own,
        **hub_at,
    }
    command = [sys.executable, "-c", code, json.dumps(words)]
    return subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, timeout=seconds, check=False
    )
