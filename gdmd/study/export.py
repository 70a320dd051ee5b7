"""Votes as CSV and JSONL for pandas or R: one line per answer, with its models."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from gdmd.study.records import Vote

COLUMNS = tuple(field.name for field in fields(Vote))


def csv_text(votes: Sequence[Vote]) -> str:
    """A header and one row per vote. Cells that a spreadsheet would read as a formula get a leading apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in asdict(vote).items()} for vote in votes)
    return text.getvalue()


def jsonl_text(votes: Sequence[Vote]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(asdict(vote), ensure_ascii=False) + "\n" for vote in votes)


def _plain(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
