"""Suggestions for unknown names: near misses, and what options of diffusers, TRL and accelerate are called here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

FROM_OTHER_LIBRARIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "learning_rate"), ("loop.lr_student", "loop.lr_fake")),
    **dict.fromkeys(("student_lr", "generator_lr", "lr_generator"), ("loop.lr_student",)),
    **dict.fromkeys(("fake_lr", "critic_lr", "guidance_lr", "lr_critic", "fake_score_lr"), ("loop.lr_fake",)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), ("loop.lr_schedule",)),
    **dict.fromkeys(("lr_warmup_steps", "warmup_steps", "num_warmup_steps"), ("loop.warmup",)),
    **dict.fromkeys(
        ("max_steps", "max_train_steps", "num_train_steps", "train_steps", "num_steps", "total_steps", "iterations"),
        ("loop.steps",),
    ),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), ("loop.steps",)),
    **dict.fromkeys(("train_batch_size", "per_device_train_batch_size", "bs"), ("loop.batch_size",)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "micro_batch_size"), ("loop.micro_batch",)),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad_norm", "gradient_clipping"), ("loop.clip",)),
    **dict.fromkeys(("mixed_precision", "bf16", "fp16"), ("loop.precision",)),
    **dict.fromkeys(("torch_dtype", "weight_dtype"), ("model.dtype",)),
    **dict.fromkeys(("optim", "use_8bit_adam", "optimizer_type"), ("loop.optimizer",)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_betas"), ("loop.betas",)),
    "adam_weight_decay": ("loop.weight_decay",),
    **dict.fromkeys(("ema_decay", "ema_rate", "use_ema"), ("loop.ema",)),
    **dict.fromkeys(("save_steps", "checkpointing_steps", "save_every", "save_interval"), ("loop.checkpoint_every",)),
    **dict.fromkeys(("save_total_limit", "checkpoints_total_limit"), ("loop.keep_checkpoints",)),
    **dict.fromkeys(("logging_steps", "log_interval", "log_steps"), ("loop.log_every",)),
    **dict.fromkeys(
        ("validation_steps", "validate_every", "sample_every", "eval_steps", "eval_every"), ("validation.every",)
    ),
    **dict.fromkeys(("validation_prompts", "validation_prompt", "eval_prompts"), ("validation.prompts",)),
    "num_validation_images": ("validation.images",),
    **dict.fromkeys(("validation_rewards", "eval_rewards", "held_out"), ("validation.scorers",)),
    **dict.fromkeys(("metric_for_best_model",), ("loop.best_metric",)),
    **dict.fromkeys(("lora_r", "r", "rank"), ("model.lora_rank",)),
    "alpha": ("model.lora_alpha",),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_layers"), ("model.lora_targets",)),
    **dict.fromkeys(
        ("pretrained_model_name_or_path", "pretrained_model", "model_name_or_path", "model_id", "base_model"),
        ("model.path",),
    ),
    **dict.fromkeys(("resolution", "image_size", "size"), ("model.height", "model.width")),
    **dict.fromkeys(("gradient_checkpointing", "enable_gradient_checkpointing"), ("model.checkpointing",)),
    "torch_compile": ("model.compile",),
    **dict.fromkeys(("max_sequence_length", "max_length"), ("model.max_tokens",)),
    **dict.fromkeys(("guidance_scale", "cfg", "cfg_scale", "real_guidance_scale"), ("method.guidance",)),
    **dict.fromkeys(("num_inference_steps", "num_student_steps", "denoising_steps"), ("method.student_steps",)),
    **dict.fromkeys(("num_generations", "num_image_per_prompt", "group"), ("method.group_size",)),
    **dict.fromkeys(("dfake_gen_update_ratio", "ttur"), ("method.fake_updates",)),
    **dict.fromkeys(("reward", "reward_fn", "reward_model", "reward_funcs"), ("rewards",)),
    **dict.fromkeys(
        ("dataset", "dataset_name", "prompt_file", "prompt_path", "prompt_dataset", "train_data"), ("prompts.file",)
    ),
    "train_data_dir": ("real_data.source",),
}
"""Option of another library, in lower case with "_" -> the fields that do the same or nearly the same."""

OPTIONS = {
    **dict.fromkeys(("output_dir", "output", "run", "run_dir", "logging_dir"), "--run FOLDER"),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), "--resume FOLDER"),
    **dict.fromkeys(("num_processes", "num_gpus", "gpus", "nproc_per_node"), "--gpus N"),
}
"""Option of another library -> the command-line option of ``gdmd train``."""


def near(got: str, known: Sequence[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The most similar known names, best first, ignoring case."""
    plain = {name.lower(): name for name in known}
    return [plain[one] for one in difflib.get_close_matches(got[:100].lower(), list(plain), n=most, cutoff=cutoff)]


def listed(names: Sequence[str], quoted: bool = True) -> str:
    """'a', 'b' or 'c'."""
    shown = [f"'{name}'" if quoted else name for name in names]
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def similar_fields(got: str, siblings: Sequence[str], fields: Sequence[str]) -> str:
    """Suggestion for an unknown key, "; did you mean ...?", or "".

    siblings: the known keys of the same section; fields: every path of the config.
    """
    name = got.lower().replace("-", "_").removeprefix("__")
    if name in OPTIONS and "loop" in fields:
        return f"; it is the option {OPTIONS[name]}"
    meant = [path for path in FROM_OTHER_LIBRARIES.get(name, ()) if path in fields]
    if meant:
        return f"; did you mean {' and '.join(meant)}?" if name in ("resolution", "image_size", "size") else _ask(meant)
    if similar := near(got, siblings):
        return f"; did you mean '{similar[0]}'?"
    last = {path: path.rpartition(".")[2] for path in fields if "." in path}
    same = [path for path, own in last.items() if own == name][:3]
    spelled = near(name, list(last.values()), cutoff=0.85)
    return _ask(same or [path for path, own in last.items() if own in spelled][:3])


def _ask(paths: Sequence[str]) -> str:
    return f"; did you mean {listed(paths, quoted=False)}?" if paths else ""
