"""From a comparison to its cells: rows x seeds x budgets, each a job that is a pure function of its settings. No torch.

OUT/table.jsonl          one line per cell, appended when the cell is finished
OUT/cells/HASH/          job.json, log.txt, result.json; run/ is the run folder (``gdmd eval OUT/cells/HASH/run``)
OUT/probes/HASH.json     passes and student updates per iteration of a recipe, shared by its seeds
OUT/figures/, shapes.md  the pages
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from gdmd.config.run import RunConfig, ShapesModel, ShapesReward
from gdmd.config.sweep import Budget, RowSpec, TeacherRow
from gdmd.io import RunError, content_hash, file_hash, numbered_jsonl, read_json
from gdmd.runs.assets import asset_path
from gdmd.runs.run_folder import MISSING, Change, config_hash, differing
from gdmd.sweep.spec import Comparison

HASH = 16
"""Characters of a cell's hash in folder names and table lines."""
BY_BUDGET = {"steps", "checkpoint_every", "keep_checkpoints"}
"""Fields of the loop that follow from the budget and the diagnosis."""
GRIDS = ("fig6_grid.png", "fig7_grid.png")
"""The figures that show images."""
MOST_COLUMNS = 8
"""Methods side by side in a grid: more would not fit a page."""
SECOND_STAGE = 1000
"""Added to the seed of a row that begins from another one: it draws other captions and noise than its first stage."""
OFF = {"grid_every": 0, "threads": 1}
"""What the loop of a cell does not do: grids are drawn at the end, for all methods together."""


@dataclass(frozen=True)
class Cell:
    """One line of the table. Cells of equal ``identity`` share their folder and are trained once.

    identity: what determines the result, without the fields that stand at their defaults: so a new option that leaves
    the old behavior as its default leaves all results valid. ``outdated`` finds defaults that were changed.
    """

    method: str
    kind: str
    seed: int
    budget: Budget
    job: Mapping[str, Any]  # with every field of the recipe written out
    identity: Mapping[str, Any]
    first: Cell | None = None  # the cell whose networks this one begins with

    @property
    def hash(self) -> str:
        """Of the identity; names of rows are not part of it."""
        return config_hash(self.identity)[:HASH]

    @property
    def place(self) -> str:
        """What ``--only`` matches and the user reads."""
        return f"{self.method}/{self.seed}/{self.budget}"

    @property
    def key(self) -> tuple[str, int, str, str]:
        """The identity of a table line."""
        return self.method, self.seed, self.budget, self.hash

    def folder(self, where: Path) -> Path:
        """The cell's folder below the comparison's."""
        return where / "cells" / self.hash


def plan(comparison: Comparison) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished comparison has whole seeds."""
    spec = comparison.spec
    cells: list[Cell] = []
    for place, seed in enumerate(spec.every_seed):
        diagnosed = place < spec.diagnosis.seeds
        cells += [_teacher_cell(comparison, row, seed) for row in spec.teachers if seed in spec.seeds_of(row)]
        for budget in spec.budgets:
            rows = (row for row in spec.rows if budget in spec.budgets_of(row) and seed in spec.seeds_of(row))
            cells += [_student_cell(comparison, row, seed, budget, diagnosed) for row in rows]
    return cells


def with_first_stages(wanted: Sequence[Cell]) -> list[Cell]:
    """The cells with the first stages that they begin from, and these before them."""
    found: dict[tuple[str, int, str, str], Cell] = {}
    for cell in wanted:
        for each in (cell.first, cell):
            if each is not None:
                found.setdefault(each.key, each)
    return list(found.values())


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Cells that match one of the patterns METHOD[/SEED[/BUDGET]] (all without patterns); ValueError for a useless one."""
    if not only:
        return list(cells)
    patterns = [pattern + "/*" * (2 - pattern.count("/")) for pattern in only]
    useless = [given for given, full in zip(only, patterns, strict=True) if not any(_fits(c, full) for c in cells)]
    if useless:
        methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
        raise ValueError(
            f"--only {' '.join(useless)}: matches no cell; a pattern is METHOD[/SEED[/BUDGET]] with * for any, "
            f"and the methods are {methods}"
        )
    return [cell for cell in cells if any(_fits(cell, pattern) for pattern in patterns)]


def outdated(cells: Iterable[Cell], folder: Path) -> list[str]:
    """Cells in ``folder`` made when a default was another one, each with the fields: their results no longer hold."""
    found = []
    for cell in cells:
        path = cell.folder(folder) / "job.json"
        advice = f"Delete {path.parent}, and the cell is made again."
        stored = read_json(path, advice) if path.exists() else {}
        changes = [change for change in differing(stored, cell.job) if _matters(change)]
        found += [f"{path.parent} ({cell.place}): {', '.join(map(str, changes))}"] if changes else []
    return found


def _matters(change: Change) -> bool:
    """Names of rows do not; a field that is new, or gone, had no other behavior."""
    named = change.key in ("recipe.name", "passes_of.name")
    return not named and MISSING not in (change.before, change.after)


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """One cell per hash, in order: what has to be computed."""
    return list({cell.hash: cell for cell in reversed(list(cells))}.values())[::-1]


def shown_cells(comparison: Comparison, folder: Path) -> list[Cell]:
    """Finished cells whose images are shown: of the first seed, the rows asked for.

    By default the first teacher, the headline, the rivals, and other GDMD rows while there is room.
    """
    spec = comparison.spec
    students = [row for row in spec.rows if row.kind != "control"]
    students.sort(key=lambda row: (row.name != spec.headline, row.kind != "rival"))
    names = list(spec.pictures.rows) or [row.name for row in (*spec.teachers[:1], *students)]
    cells = {cell.method: cell for cell in plan(comparison) if cell.seed == spec.seeds[0] and cell.budget == "updates"}
    own = [cells[name] for name in names if name in cells]
    return [cell for cell in own if (cell.folder(folder) / "result.json").exists()][:MOST_COLUMNS]


def pictures_key(comparison: Comparison, folder: Path) -> str:
    """What the images of the figures depend on: the cells shown with their results, their titles and the settings."""
    spec = comparison.spec
    shown = [
        (spec.titles[cell.method], cell.hash, file_hash(cell.folder(folder) / "result.json"))
        for cell in shown_cells(comparison, folder)
    ]
    return content_hash(json.dumps([shown, spec.pictures.model_dump(mode="json"), spec.evaluation.seed]))


def pictured(comparison: Comparison, folder: Path) -> bool:
    """Whether pictures.json is of ``pictures_key``."""
    path = folder / "pictures.json"
    try:
        return path.exists() and bool(
            json.loads(path.read_text(encoding="utf-8"))["key"] == pictures_key(comparison, folder)
        )
    except (ValueError, TypeError, KeyError):  # of an older version
        return False


def line_of(cell: Cell, measured: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The table line of a finished cell."""
    names = {"method": cell.method, "kind": cell.kind, "seed": cell.seed, "budget": cell.budget}
    return {**names, **measured, "hash": cell.hash, "command": command}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The lines of a table in order; a torn last line (a crash while writing) is left out, other damage is an error."""
    rows = numbered_jsonl(path, torn_tail=True) if path.exists() else []
    for number, row in rows:
        missing = [key for key in ("method", "seed", "budget", "hash", "shapeseval") if key not in row]
        if missing:
            raise RunError(f"{path}, line {number} is not a line of a comparison (no {', '.join(missing)}); delete it")
    return [row for _, row in rows]


def key_of(line: Mapping[str, Any]) -> tuple[str, int, str, str]:
    """The identity of a table line, as ``Cell.key``."""
    return line["method"], line["seed"], line["budget"], line["hash"]


def _fits(cell: Cell, pattern: str) -> bool:
    return fnmatchcase(cell.place, pattern)


def _teacher_cell(comparison: Comparison, row: TeacherRow, seed: int) -> Cell:
    guidance = comparison.headline.method.guidance if row.guidance is None else row.guidance
    cfg = _measured(comparison, comparison.headline, seed)
    own = {"teacher": {"steps": row.steps, "guidance": guidance}, "split": comparison.spec.evaluation.split}
    parts = ("model", "rewards", "eval")
    job = own | {"recipe": _only(_written_out(cfg), parts), "contents": contents(cfg)}
    identity = own | {"recipe": _only(_shortened(cfg), (*parts, "seed"))} | _given(cfg)
    return Cell(row.name, "teacher", seed, "updates", job, identity)


def _student_cell(comparison: Comparison, row: RowSpec, seed: int, budget: Budget, diagnosed: bool) -> Cell:
    """Under the budget of passes the reference row is what it is under the budget of updates: the same cell."""
    spec = comparison.spec
    reference = spec.row(spec.reference or spec.headline)
    matched = budget == "passes" and row.name != reference.name
    diagnosis = spec.diagnosis.model_dump(mode="json", exclude={"seeds"})
    own: dict[str, Any] = {
        "student_updates": spec.updates_of(reference if matched else row),
        "split": spec.evaluation.split,
        "diagnosis": diagnosis if diagnosed and not matched else None,
    }
    first = None
    if row.start_from:
        first = _student_cell(comparison, spec.row(row.start_from), seed, "updates", diagnosed)
        own["first_stage"] = first.hash
    cfg, other = _measured(comparison, comparison.recipes[row.name], seed), comparison.recipes[reference.name]
    if first:
        cfg = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"seed": seed + SECOND_STAGE})})
    parts = ("name", "model", "method", "rewards", "prompts", "loop")
    job = own | {"recipe": _written_out(cfg), "passes_of": _only(_written_out(other), parts) if matched else None}
    job |= {"contents": contents(cfg)}
    identity = own | {"recipe": _shortened(cfg), "passes_of": _only(_shortened(other), parts) if matched else None}
    identity |= _given(cfg)
    return Cell(row.name, row.kind, seed, budget, job, identity, first)


def contents(cfg: RunConfig) -> dict[str, str]:
    """Hashes of the files behind a cell: networks, scorers, prompts and reward functions."""
    own = {reward.kind: reward.asset for reward in cfg.rewards if isinstance(reward, ShapesReward)}
    files: dict[str, str | None] = {}
    if isinstance(cfg.model, ShapesModel):
        files = {"shapes_teacher": cfg.model.teacher, "shapes_vae": cfg.model.vae}
    files |= {kind: own.get(kind) for kind in ("shapes_clip", "shapes_pref", "shapes_clip_heldout")}
    found = {name: _content(Path(path) if path else asset_path(name)) for name, path in files.items()}
    if cfg.prompts.file:
        from gdmd.data.prompts import prompt_file  # brings torch

        found["prompts"] = _content(prompt_file(cfg.prompts.file))
    others = [reward for reward in cfg.rewards if not isinstance(reward, ShapesReward)]
    if others:
        from gdmd.recipes.reward_identity import scorer_identity

        found |= {reward.label: scorer_identity(reward) for reward in others}
    return found


def _given(cfg: RunConfig) -> dict[str, Any]:
    """The contents that do not ship with the package: other ones make another cell. ``outdated`` finds the shipped."""
    every = contents(cfg)
    shipped = {name: _content(path) for name in every if (path := asset_path(name)).is_file()}
    own = {name: content for name, content in every.items() if shipped.get(name) != content}
    return {"contents": own} if own else {}


def _content(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}. Check that it exists and is readable.") from error
    return _content_at(path, stat.st_size, stat.st_mtime_ns)


@cache  # a comparison asks for the same few files in every cell
def _content_at(path: Path, size: int, changed: int) -> str:
    del size, changed
    return file_hash(path)


def _measured(comparison: Comparison, cfg: RunConfig, seed: int) -> RunConfig:
    """The recipe with the cell's seed and evaluation; captions are the same for all, noise goes with the seed."""
    how = comparison.spec.evaluation
    size = {"per_task": how.per_task, "images": how.images, "seed": how.seed + seed}
    parts = {
        "about": "",
        "eval": cfg.eval.model_copy(update=size),
        "loop": cfg.loop.model_copy(update={"seed": seed, **OFF}),
    }
    return cfg.model_copy(update=parts)


def _written_out(cfg: RunConfig) -> dict[str, Any]:
    """Every field of a recipe but those that the budget sets."""
    return cfg.model_dump(mode="json", exclude={"loop": BY_BUDGET})


def _shortened(cfg: RunConfig) -> dict[str, Any]:
    """What differs from the defaults, and which kinds of model and method these are defaults of."""
    hidden = {"name": True, "about": True, "loop": BY_BUDGET}
    tree = cfg.model_dump(mode="json", exclude_defaults=True, exclude=hidden)
    for part, kind in (("method", cfg.method.kind), ("model", cfg.model.kind)):
        tree[part] = {"kind": kind, **tree.get(part, {})}
    return tree


def _only(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: tree[key] for key in keys if key in tree}
