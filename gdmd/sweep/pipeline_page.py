"""The page and the table of a sweep over diffusers pipelines: NAME.md and NAME.jsonl, and figures in the folder NAME."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.config.sweep import SweepConfig
from gdmd.io import write_atomic
from gdmd.reporting.statistics import summarize
from gdmd.reporting.tables import Table, difference, estimate, interval, number, plus_minus, texts
from gdmd.sweep.figures import FIGURES, draw_pipelines
from gdmd.sweep.goals import LAB_STUDENT, LAB_TEACHER, Captions, Estimate, Goal, goals
from gdmd.sweep.runs import GRIDS, pipeline_figures
from gdmd.sweep.tables import OVERALL, Line, Results, by_task, costs, quality, table

FIRST = ("family", "method", "mode", "steps", "seed", "shapeseval", "interval", "nfe")
"""The first keys of a line of NAME.jsonl."""


@dataclass(frozen=True)
class Family:
    """The finished runs of one family, and what they say about the goals."""

    name: str
    results: Results
    goals: Sequence[Goal]

    @property
    def verdict(self) -> str:
        """How many goals are met."""
        met = sum(goal.met for goal in self.goals)
        return (
            f"{self.name}: {met} of {len(self.goals)} goals met"
            if self.goals
            else f"{self.name}: nothing to compare yet"
        )


def public_line(line: Line) -> dict[str, Any]:
    """A line of NAME.jsonl from one of table.jsonl: ``method`` and ``steps`` are those of the sampled images.

    trained, unseen: the scorers that trained the student, and the others.
    """
    facts = line["pipeline"]
    trained = line["trained"] if facts["method"] not in ("teacher", "dmd") else []
    unseen = [name for name in line["rewards"] if name not in trained]
    own = {**line, **facts, "trained": trained, "unseen": unseen, "row": line["method"], "iterations": line["steps"]}
    del own["pipeline"]
    return {key: own.pop(key) for key in FIRST} | own


def table_line(line: Line) -> dict[str, Any]:
    """The line of table.jsonl from one of NAME.jsonl; ``trained`` is empty where the rewards did not train."""
    if "row" not in line:
        return dict(line)
    own = dict(line)
    facts = {key: own.pop(key) for key in ("family", "method", "mode", "steps")}
    return own | {"pipeline": facts, "method": own.pop("row"), "steps": own.pop("iterations")}


def write_pipelines(
    config: SweepConfig, results: Results, command: str, folder: Path, missing: int, *, stale: bool
) -> Path:
    """Write the table, the figures and the page; returns the page. stale: the images are those of other runs."""
    lines = [public_line(line) for line in results.lines]
    write_atomic(folder / f"{config.name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines), "the table")
    how = config.evaluation
    captions = Captions(how.per_task, how.images, how.split)
    families = [_family(name, results, captions) for name in dict.fromkeys(line["family"] for line in lines)]
    drawn = pipeline_figures(config, folder)
    draw_pipelines({family.name: family.results for family in families}, drawn)
    shown = [path.name for path in drawn.glob("*.png") if not (stale and path.name in GRIDS)]
    text = _page(config, families, captions, command, missing, shown)
    page = folder / f"{config.name}.md"
    write_atomic(page, text, "the page")
    return page


def _family(name: str, results: Results, captions: Captions) -> Family:
    lines = [line for line in results.lines if line["pipeline"]["family"] == name]
    present = {line["method"]: line["pipeline"] for line in lines}
    rows = [row for row in results.rows if row.name in present]
    students = [row.name for row in rows if present[row.name]["method"] == "gdmd"]
    headline = next((row for row in students if present[row]["mode"] == "lora"), (students or [rows[0].name])[0])
    own = [table_line(public_line(line)) for line in lines]  # without rewards that did not train
    return Family(name, Results(rows, own, headline), goals(lines, captions))


# ---------------------------------------------------------------- the page


def _page(
    config: SweepConfig,
    families: Sequence[Family],
    captions: Captions,
    command: str,
    missing: int,
    drawn: Sequence[str],
) -> str:
    answers = [family.verdict for family in families if family.goals]
    blocks = [f"# {_title(config)}", *([f"**{'; '.join(answers)}.**"] if answers else []), config.about]
    blocks += [f"**Unfinished: {missing} runs are not in the table yet.**"] if missing else []
    blocks += ["## Goals", str(_goal_table(families)), _GOALS] if answers else []
    for family in families:
        blocks += [f"## {family.name}", str(_scores(family.results, captions)), _SCORES]
        blocks += _images(config, drawn, f"{family.name}_overall.png", *FIGURES["overall.png"])
        results, rows = family.results, family.results.rows
        students = [row for row in rows if row.kind not in ("teacher", "exported")]
        blocks += ["### All measures", str(table(results, rows, quality(results))), _QUALITY]
        blocks += ["### ShapesEval by task", str(table(results, rows, by_task()))]
        blocks += ["### Cost of the trainings", str(table(results, students, costs()))]
    blocks += [block for name in GRIDS for block in _images(config, drawn, name, *FIGURES[name])]
    blocks += ["## How to repeat it", f"```\n{command}\n```", _provenance(config, families)]
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


_GOALS = (
    "Brackets: 95 % bootstrap over captions, the same captions on both sides; every side is the mean over its seeds. GDMD "
    "and DMD also have the same prompts, draws and evaluation noise; the exported LoRA has the noise of diffusers' own "
    "seeds. A goal is met if the number reaches it, whatever its interval. Per seed: the same number for each training. "
    f"Full students are compared with what the Shapes networks reach after 200 updates: {LAB_STUDENT:.3f} where their "
    f"teacher has {LAB_TEACHER:.3f} (after thousands of updates they pass their teacher, see the results on Shapes)."
)
_SCORES = (
    "Over captions: 95 % bootstrap of the mean over seeds. Over seeds: 95 % t interval. Share: of the first row's "
    "ShapesEval."
)
_QUALITY = (
    "+- is the standard deviation over seeds. † marks scorers that the students are trained on, except for DMD, which is "
    "trained on none; everything else is unseen by all."
)


def _title(config: SweepConfig) -> str:
    return f"Results on trained miniatures of diffusers pipelines: {config.name}"


def _goal_table(families: Sequence[Family]) -> Table:
    body = [[texts(family.name, *_goal_cells(goal)) for goal in family.goals] for family in families]
    return Table(["family", "what", "measured", "goal", "met", "per seed", "over seeds"], body)


def _goal_cells(goal: Goal) -> list[str]:
    found, signed = goal.found, not goal.share
    target = "0 in the interval" if goal.target is None else f">= {number(goal.target, signed=signed)}"
    shown = (difference if signed else estimate)(found.value, *found.interval)
    each = ", ".join(number(value, signed=signed) for value in found.seeds)
    return [goal.text, shown, target, "yes" if goal.met else "**no**", each, _over_seeds(found, signed=signed)]


def _over_seeds(found: Estimate, *, signed: bool) -> str:
    own = summarize(found.seeds)
    return interval(own.low, own.high, signed=signed)


def _scores(results: Results, captions: Captions) -> Table:
    body, first = [], results.summary(results.rows[0].name, OVERALL)
    for row in results.rows:
        runs, found = results.runs(row.name), results.summary(row.name, OVERALL)
        assert found is not None and first is not None
        line = next(iter(runs.values()))
        cells = [
            *(str(found.count), str(line["nfe"]), plus_minus(found.mean, found.std)),
            *(interval(*captions.interval(runs)), interval(found.low, found.high)),
            number(found.mean / first.mean if first.mean else None),
        ]
        body.append(texts(row.title, *cells))
    return Table(["", "seeds", "NFE", "ShapesEval", "over captions", "over seeds", "share"], [body])


def _images(config: SweepConfig, drawn: Sequence[str], name: str, title: str, text: str) -> list[str]:
    return [f"![{title}]({config.name}/{name})", text] if name in drawn else []


def _provenance(config: SweepConfig, families: Sequence[Family]) -> str:
    lines = [line for family in families for line in family.results.lines]
    how = config.evaluation
    facts: Mapping[str, str] = {key: ", ".join(dict.fromkeys(str(line[key]) for line in lines)) for key in _FACTS}
    hours = sum(line["cell_seconds"] for line in {line["hash"]: line for line in lines}.values()) / 3600
    return "\n".join(
        f"- {text}"
        for text in (
            f"{len(lines)} lines in `{config.name}.jsonl`, {hours:.1f} hours of one worker. The `command` of a line repeats "
            "its run; `correct` tells for every image whether it is right, caption by caption.",
            f"{how.per_task} captions per task of the {how.split} captions, {how.images} images each, EMA weights.",
            f"Commit {facts['commit']}; torch {facts['torch']}; on {facts['device']}.",
        )
    )


_FACTS = ("commit", "torch", "device")
