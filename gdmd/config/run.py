"""A recipe: the complete configuration of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gdmd.config.base import Config, Count, NonNegativeCount
from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import ShuffledTiltedGDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.real_data import RealDataConfig
from gdmd.config.rewards import RewardConfig as RewardConfig
from gdmd.config.rewards import ShapesReward as ShapesReward
from gdmd.config.shapes_pipeline import MARKER, draws_real_images, is_shapes_pipeline
from gdmd.config.training import LoopConfig
from gdmd.config.validation import FEATURES, ValidationConfig


class ShapesModel(Config):
    """The embedded Shapes world; teacher and VAE ship with the package."""

    kind: Literal["shapes"] = "shapes"
    teacher: str | None = Field(
        default=None, description="safetensors file of another teacher; default: the shipped one."
    )
    vae: str | None = Field(default=None, description="safetensors file of another VAE; default: the shipped one.")


def _model_kind(given: Any) -> Any:
    """A model section without ``kind`` is a ShapesModel."""
    return given.get("kind", "shapes") if isinstance(given, dict) else getattr(given, "kind", None)


ModelConfig = Annotated[
    Annotated[ShapesModel, Tag("shapes")] | Annotated[DiffusersModel, Tag("diffusers")], Discriminator(_model_kind)
]
"""What is distilled."""


LOWEST_SCORE = {"pickscore": 10.0, "aesthetic": 1.0}
"""Lower bounds of the rewards whose scores are far above 1."""


class PromptConfig(Config):
    """Where prompts come from."""

    file: str | None = Field(
        default=None,
        description="File of prompts: txt (one per line), csv or tsv (a prompt column), jsonl or ndjson ({'prompt': "
        "...} per line), json (an array), parquet, tar (WebDataset); or the shipped set text_rendering. Default: the "
        "Shapes captions.",
    )
    column: str | None = Field(
        default=None, description="Column or key of the prompts; default: prompt; in a table, else caption or text."
    )

    def _mistakes(self) -> Iterator[str]:
        if self.column is not None and self.file is None:
            yield "column names a column of prompts.file, which is not set; set prompts.file too"


class EvalConfig(Config):
    """The Shapes evaluation at the end of a run and by ``gdmd eval``."""

    per_task: Count = Field(default=50, description="Prompts per task of the fixed evaluation set.")
    images: Count = Field(default=4, description="Images per prompt.")
    seed: NonNegativeCount = Field(default=777, description="Seed of the evaluation noise.")
    teacher_steps: Count = Field(default=50, description="ODE steps of the teacher.")


class RunConfig(Config):
    """A recipe. ``gdmd train RECIPE a.b=c`` overrides any field by its path."""

    name: str = Field(description="Name of the recipe; the run folder is named after it.")
    about: str = Field(default="", description="One sentence about the recipe.")
    model: ModelConfig = Field(default=ShapesModel(), description="The model to distill.")
    method: MethodConfig = Field(default_factory=GDMDConfig, description="The distillation method and its options.")
    rewards: tuple[RewardConfig, ...] = Field(
        default=(ShapesReward(kind="shapes_clip"), ShapesReward(kind="shapes_pref")),
        description="Rewards that train the student. Each is divided by its running scale Z, then they are averaged.",
    )
    prompts: PromptConfig = Field(default=PromptConfig(), description="The training prompts.")
    real_data: RealDataConfig | None = Field(
        default=None,
        description="Diffusers pipelines: real images for a GAN and for method.student_input = data; default: none.",
    )
    loop: LoopConfig = Field(description="Steps, batch, optimizer, checkpoints.")
    validation: ValidationConfig = Field(
        default=ValidationConfig(), description="Images and scores of fixed prompts during training."
    )
    eval: EvalConfig = Field(default=EvalConfig(), description="The evaluation at the end of a run (Shapes world).")

    @property
    def shapes_world(self) -> bool:
        """Whether the model draws Shapes captions: it is the Shapes teacher, or a pipeline trained on the Shapes world."""
        return isinstance(self.model, ShapesModel) or is_shapes_pipeline(self.model.path)

    @property
    def starts_as_teacher(self) -> bool:
        """Whether the student equals the teacher before the first step."""
        same = isinstance(self.model, ShapesModel) or self.model.start is self.model
        return same and not self.loop.start_from

    @property
    def at_largest_size(self) -> RunConfig:
        """The same recipe with the largest of its image sizes only: what is planned and profiled."""
        if not isinstance(self.model, DiffusersModel):
            return self
        return self.model_copy(update={"model": self.model.largest})

    @property
    def needs_real(self) -> str:
        """The setting for which the method needs real images; "" if it needs none."""
        if isinstance(self.method, DMD2Config) and self.method.adversarial:
            return "method.gan_weight > 0"
        return "method.student_input = data" if self.method.student_input == "data" else ""

    @property
    def held_out(self) -> tuple[RewardConfig, ...]:
        """The rewards that only score the validation images; () without validation."""
        if not self.validation.every:
            return ()
        if self.validation.scorers is not None:
            return self.validation.scorers
        default = ShapesReward(kind="shapes_clip_heldout")
        return (default,) if self.shapes_world and default.label not in self._trained else ()

    @property
    def feature_scorer(self) -> RewardConfig | None:
        """The held-out scorer or reward whose image features measure the diversity of the validation images, if any."""
        if not self.validation.every or self.validation.images < 2:
            return None
        every = (*self.held_out, *(self.rewards if self.method.rewarded else ()))
        found = [spec for kind in FEATURES for spec in every if spec.kind == kind]
        return found[0] if found else None

    @property
    def _trained(self) -> set[str]:
        return {reward.label for reward in self.rewards} if self.method.rewarded else set()

    def _mistakes(self) -> Iterator[str]:
        yield from self._real_data_mistakes()
        yield from self._margin_mistakes()
        yield from self._overlap_mistakes()
        yield from self._reward_mistakes()
        yield from self._scorer_mistakes()

    def _real_data_mistakes(self) -> Iterator[str]:
        if self.real_data is not None and self.model.kind == "shapes":
            yield "real_data is given, but the Shapes world renders its own real images; leave it out"
        elif self.real_data is not None and not self.needs_real:
            yield (
                f"real_data is given, but method {self.method.kind} as set here reads no real images; leave it out, or "
                "set method.student_input = data (or method.kind = dmd2 with gan_weight > 0)"
            )

    def _margin_mistakes(self) -> Iterator[str]:
        """ReFL ignores a reward above the margin; one that is always above it would have no effect."""
        refl = isinstance(self.method, DMDRConfig) and self.method.strategy == "refl"
        if not (isinstance(self.method, DMDRConfig | DMDReFLConfig) and (refl or self.method.kind == "dmd_refl")):
            return
        margin = self.method.margin
        above = [r.kind for r in self.rewards if r.kind in LOWEST_SCORE and margin <= LOWEST_SCORE[r.kind]]
        if above and self.method.rl_weight > 0:
            yield (
                f"method.margin {margin} is below every score of {', '.join(above)}, which would have no effect; raise the "
                "margin, or scale the reward like the others, for example {kind: composite, parts: [{reward: {kind: "
                "pickscore}, std: 100}]}"
            )

    def _overlap_mistakes(self) -> Iterator[str]:
        """DynaDG activates the fake score's adapter on the teacher's network."""
        model = self.model
        if not isinstance(model, DiffusersModel) or not (isinstance(self.method, DMDRConfig) and self.method.mixes):
            return
        if model.fake_from == "student" and model.start is not model and model.full not in ("fake", "both"):
            yield (
                f"method.overlap = {self.method.overlap:g} activates the fake score's adapter on the teacher, but with "
                "model.fake_from = student it is one of the student's model; set model.fake_from = teacher, or "
                "method.overlap = 0"
            )

    def _reward_mistakes(self) -> Iterator[str]:
        if self.method.rewarded and not self.rewards:
            yield f"method {self.method.kind} reads rewards and needs at least one under `rewards`"
        wrong = [r.kind for r in self.rewards if r.kind.startswith("shapes_")]
        if (
            wrong
            and self.method.rewarded
            and isinstance(self.model, DiffusersModel)
            and draws_real_images(self.model.path)
        ):
            yield (
                f"rewards {wrong} judge captions of the Shapes world, and model.path {self.model.path!r} is not a folder "
                f"with {MARKER}; list rewards of real images"
            )
        if self.loop.batch_size % self.method.prompt_group:
            yield (
                f"group size does not divide: method {self.method.kind} compares {self.method.prompt_group} images per "
                f"prompt, and loop.batch_size is {self.loop.batch_size}; give a multiple of the group size"
            )
        if (
            isinstance(self.method, ShuffledTiltedGDMDConfig)
            and self.method.reward_gradient > 0
            and self.loop.batch_size == 1
        ):
            yield (
                "method gdmd_tilted_shuffled gives each sample the reward gradient of another, and loop.batch_size is 1; "
                "give 2 or more"
            )
        names = [r.label for r in self.rewards]
        if len(set(names)) < len(names):
            yield f"each reward may be listed once, got {names}"

    def _scorer_mistakes(self) -> Iterator[str]:
        scorers = self.validation.scorers or ()
        if both := [one.label for one in scorers if one.label in self._trained]:
            yield (
                f"validation.scorers lists {both}, which train the student and score the validation images anyway; leave "
                "them out"
            )
        wrong = [one.kind for one in scorers if one.kind.startswith("shapes_")]
        if wrong and isinstance(self.model, DiffusersModel) and draws_real_images(self.model.path):
            yield (
                f"validation.scorers {wrong} judge captions of the Shapes world, and model.path {self.model.path!r} is not "
                f"a folder with {MARKER}; list scorers of real images"
            )
