"""``DistillationTrainer``: distill a text-to-image model to a few steps, from Python. ``gdmd train`` uses it, too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from gdmd.config.load import ConfigError
from gdmd.config.methods.all import MethodConfig
from gdmd.config.run import RunConfig
from gdmd.config.training_config import TrainingConfig
from gdmd.io import RunError
from gdmd.programs.export import export_run, real_model, student_weights
from gdmd.programs.train import TrainOutput, TrainSettings, create_run, resume_training
from gdmd.recipes.from_objects import recipe_from
from gdmd.recipes.objects import PYTHON
from gdmd.recipes.run_folders import new_folder
from gdmd.training.callbacks import TrainerCallback, check_callbacks
from gdmd.training.distributed import session
from gdmd.training.rank import rank_info

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from gdmd.models.families.base import Family


class DistillationTrainer:
    """Distills a text-to-image model into a few-step student, by distribution matching guided by rewards.

    Example:

        trainer = DistillationTrainer(
            model="stabilityai/stable-diffusion-3.5-medium",
            reward_funcs=[PickScore(), my_reward],
            train_dataset="prompts.txt",
            args=TrainingConfig(output_dir="runs/mine", max_steps=750, lora_rank=64),
        )
        trainer.train(resume_from_checkpoint=True)
        image = trainer.pipeline("a red cube on a blue ball").images[0]

    Args:
        model: A hub id, a folder, or an open ``DiffusionPipeline``, to which training adds adapters; they are inactive when
            it ends. "shapes" is the model of the Shapes world; shapes:sdxl, shapes:sd3 and shapes:flux2_klein are small
            pipelines of it.
        method: A config such as ``GDMDConfig(group_size=4)``: fields that are not set keep the values of the recipe for the
            model's family. Default: tilted GDMD.
        reward_funcs: Rewards of ``gdmd.rewards``, and functions (images, prompts, **columns) -> one number, or None, per
            image. Default: the rewards of the recipe.
        train_dataset: The prompts: a file, a list of strings or dicts, or a ``datasets.Dataset`` with a "prompt"
            column. Its other columns are given to reward functions, except "teacher_prompt", which only the teacher
            reads. Default: the Shapes captions; any other model needs prompts.
        args: Length, learning rate, batch, output folder, and any other field of the recipe.
        callbacks: ``TrainerCallback`` objects.

    Raises:
        ValueError: With the messages of the command line: ConfigError for the arguments, RunError for a folder.
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        method: MethodConfig | None = None,
        reward_funcs: Sequence[Any] | Any | None = None,
        train_dataset: Any = None,
        args: TrainingConfig | None = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        args = args or TrainingConfig()
        cfg, given = recipe_from(model, method, reward_funcs, train_dataset, args, rank_info().size)
        console = Console(stderr=True, quiet=not rank_info().is_main)
        settings = TrainSettings(console, given=given, callbacks=callbacks, device=args.device)
        self._set(cfg, Path(args.output_dir) if args.output_dir else None, settings)

    @classmethod
    def from_recipe(
        cls, recipe: RunConfig, output_dir: Path | None = None, settings: TrainSettings | None = None
    ) -> Self:
        """A trainer of a complete recipe, such as ``read_recipe("sdxl_gdmd", ["prompts.file=prompts.txt"])``."""
        trainer = cls.__new__(cls)
        console = Console(stderr=True, quiet=not rank_info().is_main)
        trainer._set(recipe, output_dir, settings or TrainSettings(console))
        return trainer

    def _set(self, cfg: RunConfig, folder: Path | None, settings: TrainSettings) -> None:
        check_callbacks(settings.callbacks)
        self.config, self.output_dir = cfg, folder or new_folder(cfg)
        self._new_folder = folder is None
        self._settings = settings
        self._trained: TrainOutput | None = None

    def train(self, resume_from_checkpoint: bool = False, *, accept_changes: bool = False) -> TrainOutput:
        """Train to the last step, or until Ctrl-C, which saves a checkpoint first.

        With ``resume_from_checkpoint`` the run in ``output_dir``, if there is one, continues from its newest checkpoint,
        bit for bit. RunError if ``output_dir`` holds another run, or one that is not to be continued, and if the content
        of an input (prompts, a reward function, the base model) has changed; with ``accept_changes`` the run continues
        with the new content, and run.json, the report and the model card show it. ValueError for a path, since there is one
        newest checkpoint, and without an ``output_dir``.
        """
        if not isinstance(resume_from_checkpoint, bool):
            raise ValueError(
                f"resume_from_checkpoint: got {str(resume_from_checkpoint)!r:.80}, but a run continues from the newest "
                "checkpoint in its output_dir: give True, and the run's folder as output_dir. To start a new run from its "
                'student, give overrides={"loop.start_from": FOLDER}'
            )
        there = (self.output_dir / "config.yaml").is_file()
        if resume_from_checkpoint and self._new_folder and not there:
            raise ConfigError(
                [
                    "resume_from_checkpoint: got True without args.output_dir, and each run then gets a new folder, so that "
                    "no run is ever continued: set output_dir"
                ]
            )
        self._trained = None  # frees its networks
        given = self._settings.context
        with session() if given.size == 1 else nullcontext(given) as context:
            accept = accept_changes or self._settings.accept
            settings = replace(self._settings, context=context, accept=accept)
            if resume_from_checkpoint and there:
                self._trained = resume_training(self.output_dir, self.config, settings)
            else:
                self._trained = create_run(self.config, self.output_dir, sys.argv, settings)
        self.output_dir = self._trained.run  # rank 0's: each rank may have chosen another new folder
        return self._trained

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The EMA student as a diffusers pipeline, whose call has its steps, size and guidance as defaults.

        It shares the frozen weights with the trainer. RunError before training; ValueError for model="shapes".
        """
        from gdmd.export.student import student_pipeline

        family = self._family()
        _, weights = student_weights(self.output_dir, "last")
        method = self.config.method
        pipe: DiffusionPipeline = student_pipeline(family, weights, method.student_steps, method.student_sampler)
        return pipe

    def save_lora(self, folder: str | Path) -> list[Path]:
        """Write the student as a LoRA for diffusers and ComfyUI, with its scheduler and model card; returns the files.

        With several ranks, rank 0 writes, and the others return no files. ValueError for a pipeline that was not loaded
        from a folder or hub id: a LoRA has to name its base model.
        """
        return self._export(Path(folder)) if rank_info().is_main else []

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline with the student merged in, for ``DiffusionPipeline.from_pretrained``; on rank 0."""
        if not rank_info().is_main:
            return
        if self._settings.given.pipeline is not None:
            self.pipeline.save_pretrained(folder)
        else:
            self._require_run()
            export_run(self.output_dir, Path(folder), merged=True)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Export the student (a LoRA, or the whole pipeline of a full student), upload it, and return its URL.

        With several ranks, rank 0 does so, and the others return "".
        """
        from gdmd.export.upload import check_hub_target, push_to_hub

        if not rank_info().is_main:
            return ""
        check_hub_target(repo_id, token)
        folder = self.output_dir / "export"
        self._export(folder, repo_id)
        return push_to_hub(folder, repo_id, private=private, token=token)

    def _export(self, folder: Path, repo_id: str | None = None) -> list[Path]:
        model = real_model(self.config, self.output_dir)
        self._require_run()
        if model.path.startswith(PYTHON):
            raise ValueError(
                "the given pipeline was not loaded from a folder or hub id, which a LoRA has to name as its base model; "
                "write the whole pipeline with save_pretrained(FOLDER)"
            )
        return export_run(self.output_dir, folder, repo_id=repo_id)

    def _require_run(self) -> None:
        if not (self.output_dir / "config.yaml").is_file():
            raise RunError(f"{self.output_dir} holds no run to export yet; call train() first.")

    def _family(self) -> Family:
        """What the student started as, with the text encoders."""
        from gdmd.models.loading import LazyTextEncoder
        from gdmd.models.tokens import ENCODER

        model = real_model(self.config, self.output_dir)
        if self._trained is None or self._trained.components is None:
            raise RunError(f"{self.output_dir} is not trained yet by this trainer; call train() first.")
        roles: Any = self._trained.components.roles
        if model.embeddings is not None:  # the training used them instead of the text encoders
            LazyTextEncoder(roles.family).load()
            own = {name: part for name, part in roles.family.pipe.components.items() if name.startswith(ENCODER)}
            roles.start.pipe.register_modules(**own)
        family: Family = roles.start
        return family
