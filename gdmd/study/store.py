"""Votes on disk: SQLite with a write-ahead log, synced before an answer is acknowledged.

PRIMARY KEY (trial, question) makes a second vote on a screen impossible, whatever the server does. A screen belongs to
one rater, and the plan shows an image pair to a rater once (repeats are separate screens).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from gdmd.io import RunError

_TABLES = """
CREATE TABLE IF NOT EXISTS votes (
  trial TEXT NOT NULL,
  question TEXT NOT NULL,
  answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie')),
  rater INTEGER NOT NULL,
  elapsed_ms INTEGER NOT NULL CHECK (elapsed_ms >= 0),
  at TEXT NOT NULL,
  PRIMARY KEY (trial, question)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS votes_of_rater ON votes (rater);
CREATE TABLE IF NOT EXISTS consents (rater INTEGER PRIMARY KEY, text_sha256 TEXT NOT NULL, at TEXT NOT NULL) STRICT;
"""
BUSY_S = 30.0


class AlreadyVoted(ValueError):
    """The screen already has different answers, which are kept."""


class Store:
    """One file of votes, safe for threads (a lock) and for several processes (SQLite's locks)."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            (mode,) = self._file.execute("PRAGMA journal_mode = WAL").fetchone()
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(_TABLES)
        except sqlite3.Error as error:
            raise RunError(f"cannot open the votes {path}: {error}. Check the file and the disk.") from error
        if mode != "wal":
            raise RunError(f"{path} is on a file system without SQLite's write-ahead log; use a local disk")

    def close(self) -> None:
        """Merge the log into the file and close it."""
        with self._lock:
            self._file.close()

    def consent(self, rater: int, text_sha256: str) -> None:
        """Record that the rater agreed to this text."""
        with self._writing():
            self._file.execute("INSERT OR IGNORE INTO consents VALUES (?, ?, ?)", (rater, text_sha256, _now()))

    def consented(self, rater: int) -> bool:
        """Whether the rater agreed."""
        with self._lock:
            return self._file.execute("SELECT 1 FROM consents WHERE rater = ?", (rater,)).fetchone() is not None

    def vote(self, rater: int, trial: str, answers: Mapping[str, str], elapsed_ms: int) -> bool:
        """Store the answers of one screen, all or none, and return once they are on disk.

        False if exactly these answers were stored before (a repeated request); AlreadyVoted if others were.
        """
        with self._writing():
            known = dict(self._file.execute("SELECT question, answer FROM votes WHERE trial = ?", (trial,)).fetchall())
            if known:
                if known != dict(answers):
                    raise AlreadyVoted(f"screen {trial} was answered before; the first answers are kept")
                return False
            rows = [(trial, question, answer, rater, elapsed_ms, _now()) for question, answer in answers.items()]
            self._file.executemany("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", rows)
        return True

    def answered(self, rater: int) -> set[str]:
        """The screens that the rater has answered."""
        with self._lock:
            rows = self._file.execute("SELECT DISTINCT trial FROM votes WHERE rater = ?", (rater,)).fetchall()
        return {trial for (trial,) in rows}

    def rows(self) -> Iterator[tuple[str, str, str, int, str]]:
        """(trial, question, answer, elapsed_ms, at), oldest first."""
        with self._lock:
            yield from self._file.execute(
                "SELECT trial, question, answer, elapsed_ms, at FROM votes ORDER BY at, trial, question"
            ).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One exclusive transaction, rolled back on any error."""
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
