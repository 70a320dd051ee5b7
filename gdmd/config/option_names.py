"""What options of diffusers, TRL, accelerate and other trainers are called here: for errors and for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class OptionName(NamedTuple):
    """One row of the table."""

    elsewhere: str
    """The names of one option, separated by spaces; lower case, with "_"."""
    here: str
    """Fields, separated by spaces; or a command with its option; or "" if gdmd has no such option."""
    note: str = ""
    """What differs: meaning, unit or values."""

    @property
    def is_command(self) -> bool:
        """Whether ``here`` is an option of a command."""
        return self.here.startswith("gdmd ")

    @property
    def fields(self) -> list[str]:
        """The dotted paths of the fields; empty for a command and for what gdmd does not have."""
        return [] if self.is_command else self.here.split()


OPTION_NAMES = (
    OptionName("pretrained_model_name_or_path model_name_or_path model_id base_model", "model.path"),
    OptionName("revision", "model.revision"),
    OptionName("variant", "model.variant"),
    OptionName("torch_dtype weight_dtype", "model.dtype", "of frozen weights; trained weights are always fp32"),
    OptionName("mixed_precision bf16 fp16", "loop.precision", "fp32 or bf16"),
    OptionName("resolution image_size size", "model.height model.width", "set both"),
    OptionName("resolutions buckets aspect_ratio_buckets multi_resolution", "model.sizes", "a list of [height, width]"),
    OptionName("max_sequence_length max_length", "model.max_tokens", "0 is the family's default"),
    OptionName("rank lora_r r", "model.lora_rank"),
    OptionName("lora_alpha alpha", "model.lora_alpha", "the scale is lora_alpha / lora_rank"),
    OptionName("target_modules lora_target_modules lora_layers", "model.lora_targets", "ends of layer names"),
    OptionName("cpu_offload enable_model_cpu_offload offload group_offload", "model.offload", "none, idle or base"),
    OptionName("gradient_checkpointing enable_gradient_checkpointing", "model.checkpointing", "on by default"),
    OptionName("torch_compile", "model.compile"),
    OptionName("learning_rate lr", "loop.lr_student loop.lr_fake", "two networks are trained"),
    OptionName("student_lr generator_lr lr_generator", "loop.lr_student"),
    OptionName("fake_lr critic_lr guidance_lr lr_critic fake_score_lr", "loop.lr_fake"),
    OptionName("lr_scheduler lr_scheduler_type scheduler", "loop.lr_schedule", "constant, cosine or linear"),
    OptionName("lr_warmup_steps warmup_steps num_warmup_steps", "loop.warmup", "in student updates"),
    OptionName("max_steps max_train_steps num_train_steps train_steps", "loop.steps", "outer iterations"),
    OptionName("num_steps total_steps iterations", "loop.steps", "outer iterations"),
    OptionName("num_train_epochs num_epochs epochs", "loop.steps", "outer iterations; there are no epochs"),
    OptionName("train_batch_size bs", "loop.batch_size", "of all GPUs together"),
    OptionName("per_device_train_batch_size per_device_batch_size", "loop.batch_size", "of all GPUs together"),
    OptionName(
        "gradient_accumulation_steps grad_accum", "loop.micro_batch", "samples per backward pass, not their number"
    ),
    OptionName("micro_batch_size", "loop.micro_batch", "samples per backward pass on one GPU"),
    OptionName("max_grad_norm grad_clip clip_grad_norm gradient_clipping", "loop.clip", "0 turns it off"),
    OptionName("optim use_8bit_adam optimizer_type", "loop.optimizer", "adamw or adamw8bit"),
    OptionName("adam_beta1 adam_beta2 adam_betas", "loop.betas", "a list: [0.9, 0.999]"),
    OptionName("adam_weight_decay", "loop.weight_decay"),
    OptionName("ema_decay ema_rate use_ema", "loop.ema", "the decay per student update; 0 turns it off"),
    OptionName("save_steps checkpointing_steps save_every save_interval", "loop.checkpoint_every"),
    OptionName("save_total_limit checkpoints_total_limit", "loop.keep_checkpoints", "0 keeps all"),
    OptionName("metric_for_best_model", "loop.best_metric"),
    OptionName("greater_is_better", "loop.best_direction", "max or min"),
    OptionName("logging_steps log_interval log_steps", "loop.log_every"),
    OptionName("validation_steps validate_every eval_steps eval_every sample_every", "validation.every"),
    OptionName("validation_prompts validation_prompt eval_prompts", "validation.prompts", "a list, or a file"),
    OptionName("num_validation_images", "validation.images", "per prompt"),
    OptionName("validation_rewards eval_rewards held_out", "validation.scorers", "a list of {kind: ...}"),
    OptionName("seed", "loop.seed"),
    OptionName("fsdp sharding_strategy", "loop.sharding", "full (FULL_SHARD) or hybrid (HYBRID_SHARD)"),
    OptionName("guidance_scale cfg cfg_scale real_guidance_scale", "method.guidance", "of the teacher, in training"),
    OptionName(
        "num_inference_steps num_student_steps denoising_steps",
        "method.student_steps",
        "a number N, or the times of the steps",
    ),
    OptionName("dfake_gen_update_ratio ttur", "method.fake_updates", "fake updates per outer iteration"),
    OptionName(
        "num_generations num_image_per_prompt group",
        "method.images_per_prompt method.group_size",
        "images_per_prompt: methods with group advantages; group_size: student updates per rollout of GDMD",
    ),
    OptionName(
        "beta kl kl_coef kl_weight",
        "",
        "the DMD loss takes the place of a KL penalty; method.beta scales the positive and negative policies",
    ),
    OptionName("reward reward_fn reward_model reward_funcs", "rewards", "a list of {kind: ...}"),
    OptionName("dataset dataset_name prompt_file prompt_path prompt_dataset train_data", "prompts.file"),
    OptionName("caption_column prompt_column", "prompts.column"),
    OptionName("train_data_dir", "real_data.source", "images, for DMD2's GAN"),
    OptionName("output_dir output run run_dir logging_dir", "gdmd train --run FOLDER"),
    OptionName("resume resume_from resume_from_checkpoint", "gdmd train --resume FOLDER"),
    OptionName("num_processes num_gpus gpus nproc_per_node", "gdmd train --gpus N", "or torchrun"),
    OptionName("report_to log_with logger loggers tracker trackers use_wandb", "loop.report_to", "a list"),
    OptionName("push_to_hub hub_model_id hub_repo_id", "gdmd export --push-to-hub ORG/NAME", "also of gdmd train"),
)
"""Every option with another name, meaning or unit here. One row a line where it fits."""


def option_named(name: str) -> OptionName | None:
    """The row that has this name of another library; case, "-" and leading dashes do not matter."""
    plain = name.lower().lstrip("-").replace("-", "_")
    return next((row for row in OPTION_NAMES if plain in row.elsewhere.split()), None)


def described(row: OptionName, fields: Sequence[str]) -> str:
    """The row as part of an error: "here this is called ... (note)". fields: those that the recipe has."""
    if not row.here:
        return f"gdmd has no such setting: {row.note}"
    note = f" ({row.note})" if row.note else ""
    if row.is_command:
        return f"here this is `{row.here}`{note}"
    found = [path for path in row.fields if path in fields]
    if found:
        return f"here this is called {' and '.join(found)}{note}"
    section = row.fields[0].partition(".")[0]
    return f"here this is called {' or '.join(row.fields)}{note}, which the {section} of this recipe does not have"


def option_table() -> str:
    """The page "Option names elsewhere" of the docs."""
    lines = [
        "# Option names elsewhere",
        "",
        "What an option of diffusers' training scripts, TRL or accelerate is called here. The error messages of gdmd give "
        "the same answers.",
        "",
        "| elsewhere | here | note |",
        "|---|---|---|",
    ]
    for row in OPTION_NAMES:
        elsewhere = ", ".join(f"`{name}`" for name in row.elsewhere.split())
        here = f"`{row.here}`" if row.is_command else ", ".join(f"`{path}`" for path in row.fields) or "-"
        lines.append(f"| {elsewhere} | {here} | {row.note} |")
    return "\n".join(lines) + "\n"
