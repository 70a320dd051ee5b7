"""shapes.md: the page of a comparison, from its table and the figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdmd.io import write_atomic
from gdmd.shapes.evaluate import HELDOUT
from gdmd.sweep.figures import FIGURES
from gdmd.sweep.tables import (
    OVERALL,
    Results,
    brief_significance,
    by_task,
    costs,
    quality,
    significance,
    table,
    weight_statistics,
)


@dataclass(frozen=True)
class About:
    """What the page says about how it was made."""

    title: str
    about: str
    command: str
    beginning: str  # where the students begin, and how many updates they take
    seeds: Sequence[int]
    reference: str  # title of the row whose passes are the second budget; "" without that budget
    split: str
    images: int  # per cell
    missing: int = 0  # cells that are not in the table
    others: str = ""  # the part of the sentence on seeds that names rows with others


def write_page(path: Path, results: Results, about: About, figures: Sequence[str]) -> Path:
    """Write the Markdown; ``figures`` are the names of the files that lie in figures/ beside it."""
    parts = [_head(results, about), _overall(results, about), _tables(results), _matched(results, about)]
    parts += [_cost(results), _figures(figures), _made(results, about)]
    write_atomic(path, "\n".join(part for part in parts if part) + "\n", "the page")
    return path


def _head(results: Results, about: About) -> str:
    missing = f"\n**Unfinished: {about.missing} runs are not in the table yet.**\n" if about.missing else ""
    return f"""# {about.title}

{about.about}
{missing}
{about.beginning} A number
is the mean over {len(about.seeds)} seeds ({", ".join(map(str, about.seeds))}) of {about.images:,} images each
({about.split} captions, EMA weights){about.others}; +- is the standard deviation over seeds. † marks rewards that
students were trained on; **everything else is unseen in training**: the checker behind ShapesEval, the held-out
scorer, fidelity, coverage.
Bold is the best student.{_foreign(results)}
"""


def _foreign(results: Results) -> str:
    """Sentences about the rows for which that is not true; "" without any."""
    rows = [(row.title, results.foreign(row.name)) for row in results.present()]
    said = [f"**{title}** was trained on {', '.join(names)} instead" for title, names in rows if names]
    if not said:
        return ""
    checker = " (a part of the checker, so that its ShapesEval is not unseen either)" if _CHECKED in str(said) else ""
    return f"\n\n{'; '.join(said)}{checker}: the row shows what that reward is worth, and is never bold."


_CHECKED = "shapes_partial_credit"


def _overall(results: Results, about: About) -> str:
    name = results.title(results.headline)
    return f"""## ShapesEval overall: is {name} better?

Two-sided paired t tests over the seeds that both rows have (a seed fixes weights' noise, prompts and evaluation noise
of all rows), 95 % t intervals, p corrected by Holm's method over all rows of the table.

{significance(results, OVERALL)}
The same differences on measures that no method is trained on (corrected p in brackets):

{brief_significance(results)}"""


def _tables(results: Results) -> str:
    students = results.present(keep=lambda row: row.kind != "control")
    strategy = results.present(keep=lambda row: "strategy" in row.tables)
    collection = results.present(keep=lambda row: "collection" in row.tables)
    controls = results.present(keep=lambda row: row.kind == "control" or row.name == results.headline)
    parts = [f"## Table 1: quality\n\n{table(results, students, quality(results))}"]
    parts += [f"## Table 2: ShapesEval by task\n\n{table(results, students, by_task())}"]
    if strategy:
        parts += [f"## Table 3: how the reward is used\n\n{table(results, strategy, quality(results))}"]
    if collection:
        parts += [f"## Table 4: how gradients are collected\n\n{table(results, collection, quality(results))}"]
    if len(controls) > 1:
        parts += [f"## Controls\n\n{_CONTROLS}\n\n{table(results, controls, quality(results))}"]
    return "\n".join(parts)


_CONTROLS = """A constant weight is nearly only a change of the learning rate, so a gain counts only if it is gone when the
scores are: gamma = 0 in the same loop, scores (and, where a row uses it, the rewards' own gradient) shuffled inside
the batch, r constant, and a step of weight 1[r > 1/2]."""


def _matched(results: Results, about: About) -> str:
    rows = results.present("passes")
    if not rows or not about.reference:
        return ""
    return f"""## The same compute

Every row is trained until it has made as many network passes as {about.reference} under the budget above (counted by
hooks; a backward counts two forwards).

{significance(results, OVERALL, "passes")}
{brief_significance(results, "passes")}
{table(results, rows, [*by_task()[:1], *quality(results)[1:-1], *costs()[:3]], "passes")}"""


def _cost(results: Results) -> str:
    students = results.present(keep=lambda row: row.kind != "teacher")
    weights = table(results, [row for row in students if results.summary(row.name, _R_MEAN)], weight_statistics())
    extra = f"\nWhat the weights did over the second half of the training:\n\n{weights}" if weights else ""
    return f"""## Cost per method

Passes: forwards of a denoiser (student, fake, teacher, old policy) on one sample, a backward counts two; decoder and
rewards are not counted. Seconds: inside iterations, one CPU thread or one GPU per run.

{table(results, students, costs())}{extra}"""


_R_MEAN = ("statistics", "weight/r_mean")


def _figures(figures: Sequence[str]) -> str:
    shown = [(name, *FIGURES[name]) for name in FIGURES if name in figures]
    parts = [f"### {title}\n\n![{title}](figures/{name})\n\n{text}\n" for name, title, text in shown]
    return "## Figures\n\n" + "\n".join(parts) if parts else ""


def _made(results: Results, about: About) -> str:
    cells = {line["hash"]: line for line in results.lines}
    hours = sum(line.get("cell_seconds", 0) for line in cells.values()) / 3600
    unseen = ", ".join(name for name in results.rewards if name not in results.trained)
    return f"""## How it was made

```
{about.command}
```

- {len(results.lines)} lines of the table, {len(cells)} trainings and evaluations, {hours:.1f} hours of one worker in all.
- Commit {_listed(results, "commit")}; torch {_listed(results, "torch")}; on {_listed(results, "device")}.
- Trained on {", ".join(results.trained) or "no reward"}; measured besides on {unseen} ({HELDOUT} has another architecture).
- Any run can be repeated with the `command` of its line in the table; its `hash` is that of recipe, evaluation and budget.
"""


def _listed(results: Results, key: str) -> str:
    found: Mapping[str, None] = dict.fromkeys(str(line[key])[:48] for line in results.lines if line.get(key))
    return ", ".join(found) or "unknown"
