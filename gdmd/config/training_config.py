"""``TrainingConfig``: the options of a run under the names of transformers and TRL, for ``gdmd.DistillationTrainer``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from gdmd.config.base import Config, Count, DeviceName, NonNegative, NonNegativeCount, Positive
from gdmd.config.model import DiffusersModel, Pixels
from gdmd.config.training import Decay, LoopConfig
from gdmd.config.validation import ValidationConfig

Folder = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]
_SECTIONS: Mapping[str, Mapping[str, FieldInfo]] = {
    "loop": LoopConfig.model_fields,
    "model": DiffusersModel.model_fields,
    "validation": ValidationConfig.model_fields,
}


def _sets(path: str) -> Any:
    """A field that sets a field of the recipe and has its description; None keeps the recipe's value."""
    section, _, name = path.partition(".")
    described = _SECTIONS[section][name].description
    return Field(default=None, description=f"{path}: {described}", json_schema_extra={"sets": path})


class TrainingConfig(Config):
    """How long, how fast and where to train. A field that is None keeps the value of the recipe.

    The recipe is the one that ships for the model's family and the method; ``recipe`` names another one. Fields that have
    no name here are set by their path in the recipe: ``overrides={"loop.clip": 0.5}``.
    """

    output_dir: Folder | None = Field(
        default=None, description="The run folder: checkpoints, metrics, images, report. Default: a new one in ./runs."
    )
    recipe: Folder | None = Field(
        default=None, description="Name or .yaml file of the recipe to start from; default: by family and method."
    )
    device: DeviceName | None = Field(
        default=None, description='Such as "cuda:1" or "cpu"; default: a GPU, if there is one.'
    )
    max_steps: Count | None = _sets("loop.steps")
    learning_rate: Positive | None = _sets("loop.lr_student")
    fake_learning_rate: Positive | None = _sets("loop.lr_fake")
    lr_scheduler_type: Literal["constant", "cosine", "linear"] | None = _sets("loop.lr_schedule")
    warmup_steps: NonNegativeCount | None = _sets("loop.warmup")
    max_grad_norm: NonNegative | None = _sets("loop.clip")
    optim: Literal["adamw", "adamw8bit"] | None = _sets("loop.optimizer")
    ema_decay: Decay | None = _sets("loop.ema")
    per_device_batch_size: Count | None = Field(
        default=None, description="Samples per backward pass on one device (loop.micro_batch)."
    )
    gradient_accumulation_steps: Count | None = Field(
        default=None,
        description="Backward passes per update. With per_device_batch_size and the number of processes it gives "
        "loop.batch_size; without it the recipe's batch is kept and accumulated in parts of per_device_batch_size.",
    )
    mixed_precision: Literal["no", "bf16"] | None = Field(
        default=None, description='"bf16" or "no" (fp32): loop.precision. The frozen weights have dtype.'
    )
    dtype: Literal["fp32", "bf16"] | None = _sets("model.dtype")
    gradient_checkpointing: bool | None = _sets("model.checkpointing")
    height: Pixels | None = _sets("model.height")
    width: Pixels | None = _sets("model.width")
    sizes: tuple[tuple[Pixels, Pixels], ...] | None = _sets("model.sizes")
    lora_rank: Count | None = _sets("model.lora_rank")
    lora_alpha: Positive | None = _sets("model.lora_alpha")
    lora_target_modules: tuple[str, ...] | None = _sets("model.lora_targets")
    save_steps: Count | None = _sets("loop.checkpoint_every")
    save_total_limit: NonNegativeCount | None = _sets("loop.keep_checkpoints")
    logging_steps: Count | None = _sets("loop.log_every")
    seed: NonNegativeCount | None = _sets("loop.seed")
    report_to: tuple[str, ...] | str | None = _sets("loop.report_to")
    validation_prompts: tuple[str, ...] | str | None = _sets("validation.prompts")
    validation_steps: NonNegativeCount | None = _sets("validation.every")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of the recipe, by its path; they win over the fields above."
    )

    def _mistakes(self) -> Iterator[str]:
        if self.gradient_accumulation_steps is not None and self.per_device_batch_size is None:
            yield (
                "gradient_accumulation_steps counts passes of per_device_batch_size samples, which is not set; set both, "
                'or overrides={"loop.batch_size": N} for the samples of one update'
            )

    def recipe_values(self, world_size: int = 1) -> dict[str, Any]:
        """The fields that are set, as recipe path -> value; ``world_size`` processes share the batch."""
        values = dict(self._named())
        if self.mixed_precision is not None:
            values["loop.precision"] = {"no": "fp32", "bf16": "bf16"}[self.mixed_precision]
        if self.per_device_batch_size is not None:
            values["loop.micro_batch"] = self.per_device_batch_size
            if self.gradient_accumulation_steps is not None:
                samples = self.per_device_batch_size * self.gradient_accumulation_steps * world_size
                values["loop.batch_size"] = samples
        return values | self.overrides

    def _named(self) -> Iterator[tuple[str, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value is not None and isinstance(field.json_schema_extra, dict):
                yield str(field.json_schema_extra["sets"]), list(value) if isinstance(value, tuple) else value
