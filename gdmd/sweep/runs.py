"""The runs of a sweep: rows x seeds x budgets, each with a job that is a pure function of its settings.

Importing this module imports no torch.

OUT/table.jsonl         one line per run, appended when the run is finished
OUT/runs/HASH/          job.json, log.txt, result.json; run/ is the run folder (``gdmd eval OUT/runs/HASH/run``)
OUT/figures/, shapes.md the pages; for a sweep over pipelines OUT/NAME/, NAME.md and NAME.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from gdmd.config.methods.baseline import BaselineConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig, ShapesModel, ShapesReward
from gdmd.config.sweep import Budget, ExportRow, StudentRow, SweepConfig, TeacherRow
from gdmd.config.validation import ValidationConfig
from gdmd.io import RunError, content_hash, file_hash, numbered_jsonl, read_json, reading
from gdmd.recipes.contents import base_content
from gdmd.runs.assets import asset_path
from gdmd.runs.run_folder import MISSING, Change, config_hash, differing
from gdmd.sweep.spec import Sweep

HASH = 16
"""Characters of a run's hash in folder names and table lines."""
SET_BY_BUDGET = {"steps", "checkpoint_every", "keep_checkpoints"}
"""Fields of the loop that follow from the budget and the diagnosis."""
GRIDS = ("fig6_grid.png", "fig7_grid.png")
"""The figures that show images."""
IMAGES = "images.json"
"""What the images of the figures were drawn from, and the points of the feature-space figure."""
MAX_COLUMNS = 8
"""Methods side by side in a grid: more would not fit a page."""
SECOND_STAGE = 1000
"""Added to the seed of a second stage, so that it draws other captions and noise than its first stage."""
LOOP = {"threads": 1}
"""Loop settings of every run."""
NO_VALIDATION = ValidationConfig(every=0)
"""Images are drawn at the end, for all methods together."""


@dataclass(frozen=True)
class SweepRun:
    """One line of the table. Runs of equal ``identity`` share their folder and are trained once.

    identity: what determines the result, without the fields that have their default value, so that a new option whose
    default is the old behavior keeps all results valid; one whose default changes the behavior is always a part of it.
    ``outdated`` finds defaults that were changed.
    """

    method: str
    kind: str
    seed: int
    budget: Budget
    job: Mapping[str, Any]  # with every field of the recipe
    identity: Mapping[str, Any]
    first_stage: SweepRun | None = None  # the run whose networks this one starts from, or exports

    @property
    def hash(self) -> str:
        """Hash of the identity, which does not contain the names of rows."""
        return config_hash(self.identity)[:HASH]

    @property
    def name(self) -> str:
        """METHOD/SEED/BUDGET: what ``--only`` matches and messages show."""
        return f"{self.method}/{self.seed}/{self.budget}"

    @property
    def key(self) -> tuple[str, int, str, str]:
        """The identity of a table line."""
        return self.method, self.seed, self.budget, self.hash

    def folder(self, out: Path) -> Path:
        """The folder of the run in the folder of the sweep."""
        return out / "runs" / self.hash

    def result(self, out: Path) -> Path:
        """Written last: if it exists, the run is finished."""
        return self.folder(out) / "result.json"


def plan(sweep: Sweep) -> list[SweepRun]:
    """All runs, seed by seed, so that an unfinished sweep has whole seeds."""
    config = sweep.config
    runs: list[SweepRun] = []
    for number, seed in enumerate(config.every_seed):
        diagnosed = number < config.diagnosis.seeds
        runs += [_teacher_run(sweep, row, seed) for row in config.teachers if seed in config.seeds_of(row)]
        for budget in config.budgets:
            rows = (row for row in config.rows if budget in config.budgets_of(row) and seed in config.seeds_of(row))
            runs += [_student_run(sweep, row, seed, budget, diagnosed) for row in rows]
        exports = (row for row in config.exports if seed in config.seeds_of(config.row(row.student)))
        runs += [_exported_run(sweep, row, seed, diagnosed) for row in exports]
    return runs


def with_first_stages(wanted: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs, each after the first stage that it starts from."""
    found: dict[tuple[str, int, str, str], SweepRun] = {}
    for run in wanted:
        for each in (run.first_stage, run):
            if each is not None:
                found.setdefault(each.key, each)
    return list(found.values())


def selected(runs: Sequence[SweepRun], only: Sequence[str]) -> list[SweepRun]:
    """Runs that match a pattern METHOD[/SEED[/BUDGET]] (all without patterns); ValueError if a pattern matches none."""
    if not only:
        return list(runs)
    patterns = [pattern + "/*" * (2 - pattern.count("/")) for pattern in only]
    useless = [given for given, full in zip(only, patterns, strict=True) if not any(_fits(run, full) for run in runs)]
    if useless:
        methods = ", ".join(dict.fromkeys(run.method for run in runs))
        raise ValueError(
            f"--only {' '.join(useless)}: matches no run; a pattern is METHOD[/SEED[/BUDGET]] with * for any, "
            f"and the methods are {methods}"
        )
    return [run for run in runs if any(_fits(run, pattern) for pattern in patterns)]


def outdated(runs: Iterable[SweepRun], out: Path) -> list[str]:
    """Runs in ``out`` that were made when a default had another value, with these fields: their results are invalid."""
    found = []
    for run in runs:
        path = run.folder(out) / "job.json"
        stored = read_json(path, f"Delete {path.parent} to repeat the run.") if path.exists() else {}
        changes = [change for change in differing(stored, run.job) if _matters(change)]
        found += [f"{path.parent} ({run.name}): {', '.join(map(str, changes))}"] if changes else []
    return found


def _matters(change: Change) -> bool:
    """Whether a change makes results invalid. Names of rows do not, nor do fields that were added or removed."""
    named = change.key in ("recipe.name", "passes_of.name")
    return not named and MISSING not in (change.before, change.after)


def unique(runs: Iterable[SweepRun]) -> list[SweepRun]:
    """The first run of each hash, in order: what has to be computed."""
    found: dict[str, SweepRun] = {}
    for run in runs:
        found.setdefault(run.hash, run)
    return list(found.values())


def shown_runs(sweep: Sweep, out: Path) -> list[SweepRun]:
    """Finished runs of the first seed whose images are shown.

    Default: the first teacher, the headline, the baselines, and other GDMD rows, at most MAX_COLUMNS.
    """
    config = sweep.config
    students = [row for row in config.rows if row.kind != "control"]
    students.sort(key=lambda row: (row.name != config.headline, row.kind != "baseline"))
    chosen = list(config.images.rows)
    names = chosen or [row.name for row in (*config.teachers[:1], *students)]
    runs = {run.method: run for run in plan(sweep) if run.seed == config.seeds[0] and run.budget == "updates"}
    found = [runs[name] for name in names if name in runs and runs[name].result(out).exists()]
    return found if chosen else found[:MAX_COLUMNS]


def figure_folder(sweep: Sweep, out: Path) -> Path:
    """Where the figures of a sweep are."""
    return pipeline_figures(sweep.config, out) if sweep.of_pipelines else out / "figures"


def pipeline_figures(config: SweepConfig, out: Path) -> Path:
    """Where the figures of a sweep over pipelines are: the folder named like its page."""
    return out / config.name


def images_key(sweep: Sweep, out: Path) -> str:
    """What the images of the figures depend on: the results and titles of the shown runs, and the settings."""
    config = sweep.config
    shown = [(config.titles[run.method], run.hash, file_hash(run.result(out))) for run in shown_runs(sweep, out)]
    return content_hash(json.dumps([shown, config.images.model_dump(mode="json"), config.evaluation.seed]))


def images_are_current(sweep: Sweep, out: Path) -> bool:
    """Whether images.json has the present ``images_key``."""
    try:
        return bool(json.loads((out / IMAGES).read_text(encoding="utf-8"))["key"] == images_key(sweep, out))
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
        return False


def line_of(run: SweepRun, measured: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The table line of a finished run."""
    names = {"method": run.method, "kind": run.kind, "seed": run.seed, "budget": run.budget}
    return {**names, **measured, "hash": run.hash, "command": command}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The lines of a table; a last line that a crash cut off is left out, other damage is an error."""
    rows = numbered_jsonl(path, torn_tail=True) if path.exists() else []
    for number, row in rows:
        missing = [key for key in ("method", "seed", "budget", "hash", "shapeseval") if key not in row]
        if missing:
            raise RunError(f"{path}, line {number} is not a line of a sweep (no {', '.join(missing)}); delete it")
    return [row for _, row in rows]


def key_of(line: Mapping[str, Any]) -> tuple[str, int, str, str]:
    """The identity of a table line, as ``SweepRun.key``."""
    return line["method"], line["seed"], line["budget"], line["hash"]


def _fits(run: SweepRun, pattern: str) -> bool:
    return fnmatchcase(run.name, pattern)


def _teacher_run(sweep: Sweep, row: TeacherRow, seed: int) -> SweepRun:
    cfg = _with_seed(sweep, sweep.teacher(row.name), seed)
    guidance = cfg.method.guidance if row.guidance is None else row.guidance
    own = {"teacher": {"steps": row.steps, "guidance": guidance}, "split": sweep.config.evaluation.split}
    parts = ("model", "rewards", "eval")
    job = own | {"recipe": _subset(_all_fields(cfg), parts), "contents": contents(cfg)}
    identity = own | {"recipe": _subset(_changed_fields(cfg), (*parts, "seed"))} | _own_contents(cfg)
    return SweepRun(row.name, "teacher", seed, "updates", job, identity)


def _student_run(sweep: Sweep, row: StudentRow, seed: int, budget: Budget, diagnosed: bool) -> SweepRun:
    """Under the budget ``passes`` the reference row is the same run as under the budget ``updates``."""
    config = sweep.config
    reference = config.row(config.reference or config.headline)
    matched = budget == "passes" and row.name != reference.name
    diagnosis = config.diagnosis.model_dump(mode="json", exclude={"seeds"})
    own: dict[str, Any] = {
        "student_updates": config.updates_of(reference if matched else row),
        "split": config.evaluation.split,
        "diagnosis": diagnosis if diagnosed and not matched else None,
    }
    first = None
    if row.start_from:
        first = _student_run(sweep, config.row(row.start_from), seed, "updates", diagnosed)
        own["first_stage"] = first.hash
    cfg, other = _with_seed(sweep, sweep.recipes[row.name], seed), sweep.recipes[reference.name]
    if first:
        cfg = cfg.model_copy(update={"loop": cfg.loop.model_copy(update={"seed": seed + SECOND_STAGE})})
    parts = ("name", "model", "method", "rewards", "prompts", "loop")
    job = own | {"recipe": _all_fields(cfg), "passes_of": _subset(_all_fields(other), parts) if matched else None}
    job |= {"contents": contents(cfg)}
    passes_of = _subset(_changed_fields(other), parts) if matched else None
    identity = own | {"recipe": _changed_fields(cfg), "passes_of": passes_of} | _own_contents(cfg)
    return SweepRun(row.name, row.kind, seed, budget, job, identity, first)


def _exported_run(sweep: Sweep, row: ExportRow, seed: int, diagnosed: bool) -> SweepRun:
    """The student's run is its first stage; ``recipe`` and ``contents`` are that run's."""
    student = _student_run(sweep, sweep.config.row(row.student), seed, "updates", diagnosed)
    own = {"exported": student.hash, "split": sweep.config.evaluation.split}
    job = own | {"recipe": student.job["recipe"], "contents": student.job["contents"]}
    return SweepRun(row.name, "exported", seed, "updates", job, own, student)


def contents(cfg: RunConfig) -> dict[str, str]:
    """Hashes of the files that a run reads: networks or pipeline, scorers, prompts, real images and reward functions."""
    own = {reward.kind: reward.asset for reward in cfg.rewards if isinstance(reward, ShapesReward)}
    files: dict[str, str | None] = {}
    if isinstance(cfg.model, ShapesModel):
        files = {"shapes_teacher": cfg.model.teacher, "shapes_vae": cfg.model.vae}
    files |= {kind: own.get(kind) for kind in ("shapes_clip", "shapes_pref", "shapes_clip_heldout")}
    found = {name: _content(Path(path) if path else asset_path(name)) for name, path in files.items()}
    if isinstance(cfg.model, DiffusersModel):
        files = sorted(Path(cfg.model.location).rglob("*"))
        found["pipeline"] = _pipeline_content(cfg.model, tuple((str(file), file.stat().st_mtime_ns) for file in files))
        found |= _more_contents(cfg, cfg.model)
    if cfg.prompts.file:
        from gdmd.data.prompts import prompt_file  # imports torch

        found["prompts"] = _content(prompt_file(cfg.prompts.file))
    others = [reward for reward in cfg.rewards if not isinstance(reward, ShapesReward)]
    if others:
        from gdmd.recipes.reward_identity import scorer_identity

        found |= {reward.label: scorer_identity(reward) for reward in others}
    return found


def _more_contents(cfg: RunConfig, model: DiffusersModel) -> dict[str, str]:
    """Hashes of the decoder for the rewards and of the real images, where a run has them."""
    found: dict[str, str] = {}
    if model.scoring_decoder:
        from gdmd.rewards.weights import weights_content

        found["scoring_decoder"] = weights_content(model.scoring_decoder, model.scoring_decoder_revision)
    if cfg.needs_real and cfg.real_data is not None:
        from gdmd.recipes.build_data import store_of  # imports torch

        found["real_data"] = store_of(cfg.real_data, model).fingerprint() or "not computed yet"
    return found


def _own_contents(cfg: RunConfig) -> dict[str, Any]:
    """The contents that do not ship with the package: they are part of the identity. ``outdated`` checks the others."""
    every = contents(cfg)
    shipped = {name: _content(path) for name in every if (path := asset_path(name)).is_file()}
    own = {name: content for name, content in every.items() if shipped.get(name) != content}
    return {"contents": own} if own else {}


def _content(path: Path) -> str:
    with reading(path):
        stat = path.stat()
    return _content_at(path, stat.st_size, stat.st_mtime_ns)


@cache  # every run of a sweep reads the same few files
def _content_at(path: Path, size: int, changed: int) -> str:
    del size, changed
    return file_hash(path)


@cache  # as above
def _pipeline_content(model: DiffusersModel, files: tuple[tuple[str, int], ...]) -> str:
    del files
    return base_content(model)


def _with_seed(sweep: Sweep, cfg: RunConfig, seed: int) -> RunConfig:
    """The recipe with the run's seed and evaluation; captions are the same for all runs, noise depends on the seed."""
    how = sweep.config.evaluation
    size = {"per_task": how.per_task, "images": how.images, "seed": how.seed + seed}
    parts: dict[str, Any] = {
        "about": "",
        "eval": cfg.eval.model_copy(update=size),
        "loop": cfg.loop.model_copy(update={"seed": seed, **LOOP}),
        "validation": NO_VALIDATION,
    }
    if isinstance(cfg.model, DiffusersModel):  # concurrent runs would write the same cache of text embeddings
        parts["model"] = cfg.model.model_copy(update={"embeddings": None})
    return cfg.model_copy(update=parts)


def _all_fields(cfg: RunConfig) -> dict[str, Any]:
    """Every field of a recipe except those set by the budget."""
    return cfg.model_dump(mode="json", exclude={"loop": SET_BY_BUDGET})


def _changed_fields(cfg: RunConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, and the kinds of model and method whose defaults these are."""
    hidden = {"name": True, "about": True, "loop": SET_BY_BUDGET, "validation": True}
    tree = cfg.model_dump(mode="json", exclude_defaults=True, exclude=hidden)
    if cfg.validation.every != ValidationConfig().every:  # under this key in the hashes of past results
        tree["loop"] = {**tree.get("loop", {}), "grid_every": cfg.validation.every}
    for part, kind in (("method", cfg.method.kind), ("model", cfg.model.kind)):
        tree[part] = {"kind": kind, **tree.get(part, {})}
    if isinstance(cfg.method, BaselineConfig):  # always: results from before this field differ from its default
        tree["method"]["fake_samples"] = cfg.method.fake_samples
    return tree


def _subset(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: tree[key] for key in keys if key in tree}
