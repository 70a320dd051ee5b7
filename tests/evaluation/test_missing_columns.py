"""Metadata that some prompts lack is None for a reward function, whatever other prompts are in its batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_world import Gdmd
from PIL import Image
from torch import Tensor

from gdmd.config.image_source import read_source
from gdmd.evaluation.compare import EvalOptions, preference
from gdmd.evaluation.validation import grid_captions
from gdmd.runs.run_folder import read_metrics

SCORERS = ("test_missing_columns:required", "test_missing_columns:optional")


def required(images: Tensor, prompts: Any, weight: list[float | None]) -> list[float | None]:
    """The column itself."""
    return weight


def optional(images: Tensor, prompts: Any, weight: list[float | None] | None = None) -> list[float]:
    """1 where the prompt lacks the column; 100 if the function does not get it."""
    return [100.0] * len(prompts) if weight is None else [1.0 if one is None else 0.0 for one in weight]


def write_prompts(texts: list[str], with_column: int) -> None:
    """The first prompts have a weight of 3."""
    rows = [{"prompt": text, "weight": 3} if k < with_column else {"prompt": text} for k, text in enumerate(texts)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("limit", [None, 34])
def test_evaluation_passes_none_where_a_prompt_lacks_the_column(gdmd: Gdmd, limit: int | None) -> None:
    """The second batch of 32 images has no prompt with the column."""
    texts = [f"prompt {k}" for k in range(40)]
    for number, text in enumerate(texts):
        samples = Path(f"a/{number:05d}/samples")
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
        Image.new("RGB", (4, 4)).save(samples / "0000.png")
    write_prompts(texts, 2)
    options = EvalOptions("p.jsonl", limit, images=1, scorers=SCORERS, device="cpu")
    first, second = preference(read_source("a"), options, Path("eval"), lambda text: None)["scores"].values()
    count = limit or 40
    assert (first["mean"], first["images"], first["unscored"]) == (3, 2, count - 2)
    assert second["mean"] == pytest.approx((count - 2) / count)
    lines = [json.loads(line) for line in Path("eval/scores.jsonl").read_text().splitlines()]
    Path("eval/scores.jsonl").unlink()
    write_prompts(texts, 0)  # no prompt has the column: the function is not called with it
    options = EvalOptions("p.jsonl", limit, images=1, scorers=SCORERS[1:], device="cpu")
    (alone,) = preference(read_source("a"), options, Path("eval"), lambda text: None)["scores"].values()
    assert alone["mean"] == 100
    again = [json.loads(line) for line in Path("eval/scores.jsonl").read_text().splitlines()]
    assert not {line["key"] for line in lines} & {line["key"] for line in again}, "another column is another score"


def test_validation_passes_none_where_a_prompt_lacks_the_column(gdmd: Gdmd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is a batch; the first prompt, on which the scorers are tried, lacks the column."""
    monkeypatch.setattr("gdmd.evaluation.validation.image_batch", lambda cfg: 1)
    write_prompts(list(grid_captions()[:3]), 1)
    Path("p.jsonl").write_text("".join(reversed(Path("p.jsonl").read_text().splitlines(keepends=True))))
    scorers = ", ".join(f"{{kind: callable, target: '{name}'}}" for name in SCORERS)
    gdmd.trained(
        "validation.every=2", "validation.prompts=p.jsonl", "validation.images=1", f"validation.scorers=[{scorers}]"
    )
    (row,) = [row for row in read_metrics(Path("run")) if row["step"] == 2 and f"validation/{SCORERS[0]}" in row]
    assert row[f"validation/{SCORERS[0]}"] == 3
    assert row[f"validation/{SCORERS[1]}"] == pytest.approx(2 / 3)
