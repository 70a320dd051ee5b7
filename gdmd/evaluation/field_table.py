"""What ``gdmd eval table`` does: the eight numbers that papers on few-step text-to-image models print, for any sources.

    ImageReward  CLIP  Aesthetic  PickScore  HPSv2.1  HPSv3   on one prompt file, such as DrawBench's 200 prompts
    GenEval2                                                  on prompts with questions, such as geneval2_data.jsonl
    OCR                                                       on prompts that quote a text

``gdmd eval compare`` evaluates each prompt file separately:

    DIR/prompts, DIR/geneval2, DIR/ocr    compare.json, compare.html, and images and scores of each source
    DIR/table.json, DIR/table.md          the table

A score that a model was trained on is marked; all others are held out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.config.describe import counted
from gdmd.config.image_source import SourceConfig
from gdmd.config.names import near
from gdmd.diffusion.device import pick_device
from gdmd.evaluation.compare import EvalOptions, compare
from gdmd.evaluation.model_page import cell_text, shared_digits
from gdmd.evaluation.preference import Log, read_prompt_set
from gdmd.evaluation.scorers import load_scorers, read_scorer, read_scorers
from gdmd.io import write_atomic
from gdmd.recipes.build_rewards import check_prompts
from gdmd.reporting.tables import MISSING

RESULT, MARKDOWN = "table.json", "table.md"


@dataclass(frozen=True)
class Column:
    """A score of the table: its title, the kind of its reward, and the prompt set that it is measured on."""

    title: str
    kind: str
    prompts: str = "prompts"


COLUMNS = (
    Column("ImageReward", "imagereward"),
    Column("CLIP", "clip"),
    Column("Aesthetic", "aesthetic"),
    Column("PickScore", "pickscore"),
    Column("HPSv2.1", "hps"),
    Column("HPSv3", "hpsv3"),
    Column("GenEval2", "geneval2", "geneval2"),
    Column("OCR", "ocr", "ocr"),
)


@dataclass(frozen=True)
class TableOptions:
    """The options of the command.

    prompts: prompt set -> file; columns of a set without a file are left out. columns: kinds; none = all that have prompts.
    scorers: settings of a column's reward, such as "hpsv3,path=FOLDER".
    """

    prompts: Mapping[str, str]
    columns: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    images: int = 1
    seed: int = 777
    limit: int | None = None
    device: str | None = None


def table(sources: Sequence[SourceConfig], options: TableOptions, folder: Path, log: Log) -> dict[str, Any]:
    """Measure every column of every source; write DIR/table.json and DIR/table.md. All inputs are checked first."""
    columns = chosen_columns(options)
    scorers = _scorers(columns, options.scorers)
    load_scorers(read_scorers(list(scorers.values())), pick_device(options.device))  # weights are read on first use
    sets: dict[str, list[str]] = {}
    for column in columns:
        sets.setdefault(column.prompts, []).append(scorers[column.kind])
    for name, texts in sets.items():
        prompt_set = read_prompt_set(options.prompts[name], options.images, options.seed, options.limit)
        check_prompts(read_scorers(texts), prompt_set.texts, prompt_set.meta)
    found = {name: _measured(sources, options, name, texts, folder / name, log) for name, texts in sets.items()}
    content = _content(columns, found, options)
    write_atomic(folder / RESULT, json.dumps(content, indent=2) + "\n", "the table")
    write_atomic(folder / MARKDOWN, markdown(content), "the table")
    log(f"table: {folder / MARKDOWN}")
    return content


def chosen_columns(options: TableOptions) -> tuple[Column, ...]:
    """The columns to measure, in the order of the table. ValueError for unknown ones and for one without prompts."""
    known = {column.kind: column for column in COLUMNS}
    for kind in options.columns:
        if kind not in known:
            similar = near(kind, list(known))
            advice = f"did you mean {similar[0]!r}?" if similar else f"columns are {', '.join(known)}"
            raise ValueError(f"--columns: {kind!r} is not a column of the table; {advice}")
        if known[kind].prompts not in options.prompts:
            raise ValueError(f"column {kind} has no prompts; give its file with --{known[kind].prompts}")
    columns = tuple(one for one in COLUMNS if one.kind in (options.columns or known) and one.prompts in options.prompts)
    if not columns:
        raise ValueError("no prompts were given; give --prompts, --geneval2 or --ocr")
    return columns


def _scorers(columns: Sequence[Column], given: Sequence[str]) -> dict[str, str]:
    """The scorer of each column as text. ValueError for one that has no column."""
    scorers = {column.kind: column.kind for column in columns}
    for text in given:
        kind = read_scorer(text).kind
        if kind not in scorers:
            raise ValueError(f"--scorer {text}: the table has no column {kind!r}; it has {', '.join(scorers)}")
        if scorers[kind] != kind:
            raise ValueError(f"--scorer {text}: column {kind} already has {scorers[kind]}; give its settings once")
        scorers[kind] = text
    return scorers


def _measured(
    sources: Sequence[SourceConfig], options: TableOptions, name: str, scorers: Sequence[str], folder: Path, log: Log
) -> dict[str, Any]:
    log(f"{options.prompts[name]}: {', '.join(scorers)}")
    given = EvalOptions(
        options.prompts[name],
        limit=options.limit,
        images=options.images,
        seed=options.seed,
        scorers=tuple(scorers),
        device=options.device,
    )
    rows: dict[str, Any] = compare(sources, given, folder, log)["rows"]
    return rows


def _content(
    columns: Sequence[Column], found: Mapping[str, Mapping[str, Any]], options: TableOptions
) -> dict[str, Any]:
    """Plain data: the columns with their prompts, and every source with its cells."""
    first = {name: next(iter(rows.values())) for name, rows in found.items()}
    heads = [
        {
            "kind": column.kind,
            "title": column.title,
            "prompt_file": first[column.prompts]["prompt_file"],
            "prompts": first[column.prompts]["prompts"],
        }
        for column in columns
    ]
    names = list(next(iter(found.values())))
    rows = {
        name: {
            "source": next(iter(found.values()))[name]["source"],
            "scores": {column.kind: found[column.prompts][name]["scores"][column.kind] for column in columns},
        }
        for name in names
    }
    return {"columns": heads, "rows": rows, "images_per_prompt": options.images, "seed": options.seed}


def markdown(content: Mapping[str, Any]) -> str:
    """The table as Markdown, with what its marks mean and what the columns were measured on."""
    heads, rows = content["columns"], content["rows"]
    lines = [["model", "NFE", *(head["title"] for head in heads)], ["---", *["---:"] * (1 + len(heads))]]
    digits = {head["kind"]: shared_digits([row["scores"][head["kind"]] for row in rows.values()]) for head in heads}
    for name, row in rows.items():
        nfe = row["source"]["nfe"]
        cells = [cell_text(row["scores"][kind], "mean", places) for kind, places in digits.items()]
        lines.append([name.replace("|", "\\|"), MISSING if nfe is None else str(nfe), *cells])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    measured: dict[str, list[str]] = {}
    for head in heads:
        measured.setdefault(f"{head['prompt_file']} ({counted(head['prompts'], 'prompt')})", []).append(head["title"])
    where = "; ".join(f"{', '.join(titles)}: {file}" for file, titles in measured.items())
    return (
        f"{grid}\n\nMeans with 95 % intervals over prompts; higher is better. † trained on this score, ? not known; all "
        f"other scores are held out.\n{where}; {counted(content['images_per_prompt'], 'image')} per prompt, the same noise "
        f"for every model (seed {content['seed']}).\n"
    )
