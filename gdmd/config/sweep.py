"""A sweep: which methods are trained, with which seeds, for how long, how they are evaluated, and against which row.

Every row is a recipe with overrides, so a sweep can compare whatever ``gdmd train`` can train.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount

RowName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Letters, digits, "_", "." and "-": names appear in file names and in ``--only``."""
Kind = Literal["baseline", "gdmd", "control"]
Budget = Literal["updates", "passes"]
Table = Literal["strategy", "collection"]
Tables = Annotated[tuple[Table, ...], Field(description="Also a row of Table 3 (strategy) or 4 (collection).")]
Seeds = Annotated[tuple[NonNegativeCount, ...], Field(min_length=1)]
Overrides = dict[str, Any]
"""Dotted path of a recipe -> value, as in ``gdmd train RECIPE a.b=c``."""

SET_BY_THE_SWEEP = (
    *("loop.steps", "loop.seed", "loop.threads", "loop.checkpoint_every", "loop.keep_checkpoints"),
    "loop.start_from",
)
"""Fields of a recipe that follow from seeds, budget, first stage and diagnosis; so does everything under ``eval``."""


class NamedRow(Config):
    """A row of tables and figures; under ``past_rows`` one that can no longer be trained."""

    name: RowName = Field(description="`method` in the table: `gdmd` for the shipped default, `gdmd_paper`, `dmd`, ...")
    kind: Kind
    label: str = Field(default="", description="Name on the page and in figures; default: the name.")
    tables: Tables = ()

    @property
    def title(self) -> str:
        """The name shown to readers."""
        return self.label or self.name


class StudentRow(NamedRow):
    """One student of the sweep."""

    recipe: str = Field(default="", description="A recipe's name or .yaml file; default: `base` of the sweep.")
    overrides: Overrides = Field(default={}, description="Overrides of this row, after those of the sweep.")
    budgets: tuple[Budget, ...] | None = Field(
        default=None,
        description="Budgets of this row; default: those of the sweep.",
    )
    start_from: str = Field(
        default="",
        description="Start from the student and the fake score of this row (same seed, budget `updates`); default: "
        "start from the teacher.",
    )
    student_updates: Count | None = Field(
        default=None,
        description="Student updates of this row; default: that of the sweep. A first stage usually has more.",
    )
    seeds: Seeds | None = Field(
        default=None, description="Seeds of this row; default: those of the sweep. More for a row with a large spread."
    )


class TeacherRow(Config):
    """The teacher's deterministic sampler as a row of the tables."""

    name: RowName = Field(description="Name of the row.")
    label: str = Field(default="", description="Name on the page and in figures; default: the name.")
    recipe: str = Field(default="", description="The recipe whose teacher this is; default: that of the headline row.")
    steps: Count = Field(description="ODE steps; 2 NFE each with guidance, 1 without.")
    guidance: NonNegative | None = Field(
        default=None,
        description="Guidance scale; default: that of the recipe.",
    )
    seeds: Seeds | None = Field(default=None, description="Seeds of this row; default: those of the sweep.")

    @property
    def title(self) -> str:
        """The name shown to readers."""
        return self.label or self.name


class ExportRow(Config):
    """The exported LoRA of a student row, called with plain diffusers in another process."""

    name: RowName = Field(description="Name of the row.")
    label: str = Field(default="", description="Name on the page and in figures; default: the name.")
    student: str = Field(description="The student row whose runs are exported, one for each of its seeds.")

    @property
    def title(self) -> str:
        """The name shown to readers."""
        return self.label or self.name


class SweepEvaluation(Config):
    """How every run is evaluated."""

    split: Literal["dev", "eval"] = Field(default="eval", description="dev: to choose settings; eval: for results.")
    per_task: Count = Field(default=50, description="Captions per task; 50 x 4 images x 6 tasks = 1,200 images.")
    images: Count = Field(default=4, description="Images per caption.")
    seed: NonNegativeCount = Field(
        default=777, description="Seed of the evaluation noise; the run's seed is added, so that rows stay paired."
    )


class SweepDiagnosis(Config):
    """What is measured during training: reward curves, and the divergence of reward and DMD gradients."""

    seeds: NonNegativeCount = Field(default=1, description="How many of the first seeds are diagnosed; 0 = none.")
    points: Count = Field(
        default=4,
        description="Equally spaced checkpoints that are measured, in addition to the start.",
    )
    per_task: Count = Field(default=20, description="Captions per task of a point.")
    images: Count = Field(default=2, description="Images per caption of a point.")


class SweepImages(Config):
    """The figures that show images, generated by the students of the first seed."""

    rows: tuple[str, ...] = Field(default=(), description="Rows shown side by side; default: teacher, baselines, gdmd.")
    per_cluster: Count = Field(default=6, description="Images per color and object in the feature-space figure.")
    captions: Count = Field(default=8, description="Captions of each same-noise grid.")


class SweepConfig(Config):
    """``gdmd sweep CONFIG``: rows x seeds x budgets."""

    name: RowName = Field(description="Name of the sweep.")
    about: str = Field(default="", description="One sentence about the sweep.")
    base: str = Field(description="Recipe of the rows that name none.")
    overrides: Overrides = Field(default={}, description="Overrides of every row (batch, rates, EMA, rewards, ...).")
    headline: str = Field(default="gdmd", description="The row that is tested against every other row.")
    reference: str = Field(
        default="", description="The row whose network passes set the budget `passes` of every other row."
    )
    seeds: Seeds = Field(default=(0, 1, 2, 3, 4), description="Training seeds of every row.")
    student_updates: Count = Field(description="Student updates of every row under the budget `updates`.")
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = Field(
        default=("updates",), description="What is equal for all rows: student updates, or network passes in training."
    )
    rows: Annotated[tuple[StudentRow, ...], Field(min_length=1)] = Field(description="The students to train.")
    past_rows: tuple[NamedRow, ...] = Field(
        default=(),
        description="Rows that can no longer be trained, because options or the behavior of their method were removed; "
        "shown if the table has them.",
    )
    teachers: tuple[TeacherRow, ...] = Field(
        default=(
            TeacherRow(name="teacher_100", label="teacher, 100 NFE", steps=50),
            TeacherRow(name="teacher_50", label="teacher, 50 NFE, no guidance", steps=50, guidance=1.0),
            TeacherRow(name="teacher_4", label="teacher, 4 NFE, no guidance", steps=4, guidance=1.0),
        ),
        description="Rows of the teacher's sampler.",
    )
    exports: tuple[ExportRow, ...] = Field(
        default=(), description="Student rows that are also exported and measured with plain diffusers; LoRA only."
    )
    evaluation: SweepEvaluation = Field(default=SweepEvaluation(), description="How every run is evaluated.")
    diagnosis: SweepDiagnosis = Field(default=SweepDiagnosis(), description="What is measured during training.")
    images: SweepImages = Field(default=SweepImages(), description="The figures that show images.")

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        problems = [
            *(*self._name_problems(), *self._start_problems()),
            *(*self._export_problems(), *self._override_problems()),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _name_problems(self) -> list[str]:
        names = [*(row.name for row in self.every_row), *(row.name for row in self.past_rows)]
        found = [f"the row name '{name}' is used {names.count(name)} times" for name in _repeated(names)]
        found += [f"seed {seed} is listed twice" for seed in _repeated(self.seeds)]
        own = [(row.name, seed) for row in self.sampled for seed in _repeated(row.seeds or ())]
        found += [f"seed {seed} of row '{name}' is listed twice" for name, seed in own]
        found += [f"budget {budget} is listed twice" for budget in _repeated(self.budgets)]
        students = [row.name for row in self.rows]
        for field, name in (("headline", self.headline), ("reference", self.reference or self.headline)):
            if name not in students:
                found.append(f"{field} '{name}' is not one of the rows {', '.join(students)}")
        drawn = [row.name for row in self.sampled]
        unknown = [name for name in self.images.rows if name not in drawn]
        return found + [
            f"images.rows contains '{name}', which is not a row of a teacher or student" for name in unknown
        ]

    def _start_problems(self) -> list[str]:
        rows = {row.name: row for row in self.rows}
        found = []
        for row in self.rows:
            first = rows.get(row.start_from)
            where = f"row '{row.name}' has start_from '{row.start_from}'"
            if row.start_from and first is None:
                found.append(f"{where}, which is not one of the rows {', '.join(rows)}")
            elif first is not None and first.start_from:
                found.append(f"{where}, which starts from '{first.start_from}' itself; only two stages are supported")
            elif first is not None and "updates" not in self.budgets_of(first):
                found.append(f"{where}, which is not trained under the budget updates")
            elif first is not None and (lost := set(self.seeds_of(row)) - set(self.seeds_of(first))):
                found.append(f"{where}, which does not have seed {', '.join(map(str, sorted(lost)))}")
        return found

    def _export_problems(self) -> list[str]:
        students = {row.name: row for row in self.rows}
        found = []
        for row in self.exports:
            student = students.get(row.student)
            where = f"exported row '{row.name}' has student '{row.student}'"
            if student is None:
                found.append(f"{where}, which is not one of the rows {', '.join(students)}")
            elif "updates" not in self.budgets_of(student):
                found.append(f"{where}, which is not trained under the budget updates")
        return found

    def _override_problems(self) -> list[str]:
        places = [("overrides", self.overrides), *((f"row '{row.name}'", row.overrides) for row in self.rows)]
        return [
            f"{place} sets '{key}', which the sweep sets (from seeds, student_updates, start_from, evaluation and "
            "diagnosis)"
            for place, overrides in places
            for key in overrides
            if key in (*SET_BY_THE_SWEEP, "loop", "name", "about") or key.split(".")[0] == "eval"
        ]

    def budgets_of(self, row: StudentRow) -> tuple[Budget, ...]:
        """The budgets of one row."""
        return self.budgets if row.budgets is None else row.budgets

    def seeds_of(self, row: StudentRow | TeacherRow) -> tuple[int, ...]:
        """The seeds of one row."""
        return self.seeds if row.seeds is None else row.seeds

    @property
    def every_row(self) -> tuple[TeacherRow | StudentRow | ExportRow, ...]:
        """Teachers, then students, then exports."""
        return (*self.teachers, *self.rows, *self.exports)

    @property
    def sampled(self) -> tuple[TeacherRow | StudentRow, ...]:
        """Teachers, then students: the rows that gdmd itself samples."""
        return (*self.teachers, *self.rows)

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seeds of the sweep, then those that only some rows have."""
        own = (seed for row in self.sampled for seed in self.seeds_of(row))
        return tuple(dict.fromkeys((*self.seeds, *own)))

    def updates_of(self, row: StudentRow) -> int:
        """Student updates of one row under the budget ``updates``."""
        return self.student_updates if row.student_updates is None else row.student_updates

    def row(self, name: str) -> StudentRow:
        """The student row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def titles(self) -> dict[str, str]:
        """name -> the name shown to readers, in the order of ``every_row``."""
        return {row.name: row.title for row in self.every_row}


def _repeated(values: tuple[Any, ...] | list[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]
