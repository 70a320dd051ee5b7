"""A sweep: which methods are trained with which seeds to which budget, and how they are evaluated and compared.

Every row is a recipe with overrides, so that everything that ``gdmd train`` trains can be compared.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount

RowName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Letters, digits, "_", "." and "-", since names are used in file names and in ``--only``."""
Budget = Literal["updates", "passes"]
Table = Literal["strategy", "collection"]
Seeds = Annotated[tuple[NonNegativeCount, ...], Field(min_length=1)]
Overrides = dict[str, Any]
"""Dotted path of a recipe -> value, as in ``gdmd train RECIPE a.b=c``."""

SET_BY_THE_SWEEP = (
    *("loop.steps", "loop.seed", "loop.threads", "loop.checkpoint_every", "loop.keep_checkpoints"),
    "loop.start_from",
)
"""Recipe fields that the sweep sets from seeds, budget, first stage and diagnosis; so is everything under ``eval``."""


class RowSpec(Config):
    """One student of the sweep."""

    name: RowName = Field(description="Name of the row, such as gdmd or dmd: `method` in the table.")
    kind: Literal["rival", "gdmd", "control"]
    label: str = Field(default="", description="Label in tables and figures; default: the name.")
    recipe: str = Field(default="", description="A recipe's name or .yaml file; default: `base` of the sweep.")
    overrides: Overrides = Field(default={}, description="Overrides of this row, after those of the sweep.")
    budgets: tuple[Budget, ...] | None = Field(
        default=None,
        description="Budgets of this row; default: `budgets` of the sweep.",
    )
    tables: tuple[Table, ...] = Field(
        default=(),
        description="Ablation tables that also show this row: Table 3 (strategy), Table 4 (collection).",
    )
    start_from: str = Field(
        default="",
        description="Row whose student and fake score, of the same seed and the budget `updates`, this row starts "
        "from; default: the teacher.",
    )
    student_updates: Count | None = Field(
        default=None, description="Student updates of this row; default: those of the sweep."
    )
    seeds: Seeds | None = Field(default=None, description="Seeds of this row; default: those of the sweep.")

    @property
    def title(self) -> str:
        """The label, else the name."""
        return self.label or self.name


class TeacherRow(Config):
    """The teacher's deterministic sampler as a row of the tables."""

    name: RowName = Field(description="Name of the row.")
    label: str = Field(default="", description="Label in tables and figures; default: the name.")
    steps: Count = Field(description="ODE steps; each takes 2 NFE with guidance, 1 without.")
    guidance: NonNegative | None = Field(
        default=None,
        description="Guidance scale; default: that of the headline row's recipe.",
    )
    seeds: Seeds | None = Field(default=None, description="Seeds of this row; default: those of the sweep.")

    @property
    def title(self) -> str:
        """The label, else the name."""
        return self.label or self.name


class EvaluationSpec(Config):
    """How every run is evaluated."""

    split: Literal["dev", "eval"] = Field(
        default="eval",
        description="Captions to evaluate on: dev to choose settings, eval for results.",
    )
    per_task: Count = Field(default=50, description="Captions per task; 50 x 4 images x 6 tasks = 1,200 images.")
    images: Count = Field(default=4, description="Images per caption.")
    seed: NonNegativeCount = Field(
        default=777, description="Seed of the evaluation noise; the run's seed is added, so that rows stay paired."
    )


class DiagnosisSpec(Config):
    """What is measured during training: curves, and the divergence of RL and DMD gradients."""

    seeds: NonNegativeCount = Field(default=1, description="Number of seeds that are diagnosed; 0 = none.")
    points: Count = Field(
        default=4,
        description="Number of equally spaced checkpoints that are measured, in addition to the start.",
    )
    per_task: Count = Field(default=20, description="Captions per task for each point of a curve.")
    images: Count = Field(default=2, description="Images per caption for each point of a curve.")


class PictureSpec(Config):
    """The figures that show images of the first seed's students."""

    rows: tuple[str, ...] = Field(
        default=(),
        description="Rows shown side by side; default: teachers, baselines, gdmd.",
    )
    per_cluster: Count = Field(default=6, description="Images per color and object in the figure of the feature space.")
    captions: Count = Field(default=8, description="Captions of each grid of images from the same noise.")


class CompareSpec(Config):
    """``gdmd sweep SPEC``: rows x seeds x budgets."""

    name: RowName = Field(description="Name of the sweep; its folder is named after it.")
    about: str = Field(default="", description="One sentence about the sweep.")
    base: str = Field(description="Recipe of the rows that name no recipe.")
    overrides: Overrides = Field(
        default={},
        description="Overrides of every row, such as batch, learning rates and rewards.",
    )
    headline: str = Field(default="gdmd", description="Row that all others are tested against (paired tests).")
    reference: str = Field(
        default="",
        description="Row whose number of passes the budget `passes` gives to every row; default: headline.",
    )
    seeds: Seeds = Field(default=(0, 1, 2, 3, 4), description="Training seeds of every row.")
    student_updates: Count = Field(description="Student updates of every row under the budget `updates`.")
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = Field(
        default=("updates",),
        description="What rows have in common: the number of student updates, or of network passes in training.",
    )
    rows: Annotated[tuple[RowSpec, ...], Field(min_length=1)] = Field(description="The students to train.")
    teachers: tuple[TeacherRow, ...] = Field(
        default=(
            TeacherRow(name="teacher_100", label="teacher, 100 NFE", steps=50),
            TeacherRow(name="teacher_50", label="teacher, 50 NFE, no guidance", steps=50, guidance=1.0),
            TeacherRow(name="teacher_4", label="teacher, 4 NFE, no guidance", steps=4, guidance=1.0),
        ),
        description="Rows of the teacher's sampler.",
    )
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="How every run is evaluated.")
    diagnosis: DiagnosisSpec = Field(default=DiagnosisSpec(), description="What is measured during training.")
    pictures: PictureSpec = Field(default=PictureSpec(), description="The figures that show images.")

    @model_validator(mode="after")
    def _consistent(self) -> CompareSpec:
        problems = [*self._name_problems(), *self._start_problems(), *self._override_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _name_problems(self) -> list[str]:
        names = [*(row.name for row in self.teachers), *(row.name for row in self.rows)]
        found = [f"the row name '{name}' is used {names.count(name)} times" for name in _twice(names)]
        found += [f"seed {seed} is listed twice" for seed in _twice(self.seeds)]
        own = [(row.name, seed) for row in self.every_row for seed in _twice(row.seeds or ())]
        found += [f"seed {seed} of row '{name}' is listed twice" for name, seed in own]
        found += [f"budget {budget} is listed twice" for budget in _twice(self.budgets)]
        students = [row.name for row in self.rows]
        for field, name in (("headline", self.headline), ("reference", self.reference or self.headline)):
            if name not in students:
                found.append(f"{field} '{name}' is not among the rows {', '.join(students)}")
        unknown = [name for name in self.pictures.rows if name not in names]
        return found + [f"pictures.rows names '{name}', which is not a row" for name in unknown]

    def _start_problems(self) -> list[str]:
        rows = {row.name: row for row in self.rows}
        found = []
        for row in self.rows:
            first = rows.get(row.start_from)
            where = f"row '{row.name}' has start_from '{row.start_from}'"
            if row.start_from and first is None:
                found.append(f"{where}, which is not among the rows {', '.join(rows)}")
            elif first is not None and first.start_from:
                found.append(f"{where}, which itself starts from '{first.start_from}': there are two stages, not more")
            elif first is not None and "updates" not in self.budgets_of(first):
                found.append(f"{where}, which is not trained under the budget updates")
            elif first is not None and (lost := set(self.seeds_of(row)) - set(self.seeds_of(first))):
                found.append(f"{where}, which has no seed {', '.join(map(str, sorted(lost)))}")
        return found

    def _override_problems(self) -> list[str]:
        places = [("overrides", self.overrides), *((f"row '{row.name}'", row.overrides) for row in self.rows)]
        return [
            f"{place} sets '{key}', which the sweep sets itself (seeds, student_updates, start_from, evaluation, "
            "diagnosis)"
            for place, overrides in places
            for key in overrides
            if key in (*SET_BY_THE_SWEEP, "loop", "name", "about") or key.split(".")[0] == "eval"
        ]

    def budgets_of(self, row: RowSpec) -> tuple[Budget, ...]:
        """The budgets of one row."""
        return self.budgets if row.budgets is None else row.budgets

    def seeds_of(self, row: RowSpec | TeacherRow) -> tuple[int, ...]:
        """The seeds of one row."""
        return self.seeds if row.seeds is None else row.seeds

    @property
    def every_row(self) -> tuple[TeacherRow | RowSpec, ...]:
        """Teachers, then students."""
        return (*self.teachers, *self.rows)

    @property
    def every_seed(self) -> tuple[int, ...]:
        """The seeds of the sweep, then those that only some rows have."""
        own = (seed for row in self.every_row for seed in self.seeds_of(row))
        return tuple(dict.fromkeys((*self.seeds, *own)))

    def updates_of(self, row: RowSpec) -> int:
        """Student updates of one row under the budget ``updates``."""
        return self.student_updates if row.student_updates is None else row.student_updates

    def row(self, name: str) -> RowSpec:
        """The student row with this name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def titles(self) -> dict[str, str]:
        """name -> title, teachers first."""
        return {row.name: row.title for row in self.every_row}


def _twice(values: tuple[Any, ...] | list[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]
