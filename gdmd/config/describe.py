"""Short descriptions of a recipe, computed from its fields: method, student, length, rewards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.rewards import CompositeConfig, RemoteConfig
from gdmd.config.run import RewardConfig, RunConfig

METHODS = {
    "gdmd": "GDMD (arXiv 2604.19009)",
    "gdmd_tilted": "tilted GDMD (beyond arXiv 2604.19009)",
    "gdmd_ablation": "GDMD with a control (arXiv 2604.19009)",
    "gdmd_tilted_shuffled": "tilted GDMD, rewards shuffled",
    "dmd": "DMD (arXiv 2311.18828)",
    "dmd2": "DMD2 (arXiv 2405.14867)",
    "dmdr": "DMDR (arXiv 2511.13649)",
    "dmd_refl": "DMD with ReFL (arXiv 2304.05977)",
    "dmd_nft": "DMD with DiffusionNFT (arXiv 2509.16117)",
    "dmd_grpo": "DMD with Flow-GRPO (arXiv 2505.05470)",
}
"""Names and papers by method.kind."""
SHORT_NAMES = {
    "gdmd": "GDMD",
    "gdmd_tilted": "tilted GDMD",
    "gdmd_ablation": "GDMD control",
    "gdmd_tilted_shuffled": "tilted GDMD control",
    "dmd": "DMD",
    "dmd2": "DMD2",
    "dmdr": "DMDR",
    "dmd_refl": "DMD + ReFL",
    "dmd_nft": "DMD + NFT",
    "dmd_grpo": "DMD + GRPO",
}
"""Names in tables and figures, by method.kind."""
REWARD_WEIGHTS = ("reward_gradient", "rl_weight", "tilt", "continuation_weight", "gamma")
"""Fields of the methods that set how strongly rewards act. The reward gradient comes first: with it long runs on Shapes
exploited their rewards and lost most diversity (docs/results.md)."""


def student_updates(method: MethodConfig) -> int:
    """Student updates of one iteration."""
    match method:
        case GDMDConfig() | TiltedGDMDConfig():
            return method.group_size
        case DMDConfig() | DMDReFLConfig() | DMDNFTConfig() | DMDGRPOConfig():
            return method.student_updates
        case DMD2Config() | DMDRConfig():
            return 1


def student(cfg: RunConfig) -> str:
    """The student in a few words: "4-step LoRA of rank 64 at 1024 x 1024"."""
    count, model = len(cfg.method.student_steps), cfg.model
    if not isinstance(model, DiffusersModel):
        return f"{count}-step student"
    whole = model.full in ("student", "both")
    kind = "student, all weights" if whole else f"LoRA of rank {model.lora_rank}"
    sizes = ", ".join(f"{width} x {height}" for height, width in model.sizes)
    return f"{count}-step {kind} at {sizes or f'{model.width} x {model.height}'}"


def length(cfg: RunConfig) -> str:
    """Iterations, batch and student updates: "750 iterations of 32 samples, 3,000 student updates"."""
    updates = cfg.loop.steps * student_updates(cfg.method)
    iterations, samples = counted(cfg.loop.steps, "iteration"), counted(cfg.loop.batch_size, "sample")
    return f"{iterations} of {samples}, {counted(updates, 'student update')}"


def counted(number: int, noun: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def facts(cfg: RunConfig) -> dict[str, str]:
    """The main settings of a run for its report."""
    return {
        "model": cfg.model.path if isinstance(cfg.model, DiffusersModel) else "the Shapes world",
        "method": f"{METHODS[cfg.method.kind]}, teacher guidance {cfg.method.guidance:g}",
        "student": student(cfg),
        "training": length(cfg),
        "rewards": ", ".join(trained_rewards(cfg)) or "none",
        "prompts": Path(cfg.prompts.file).name if cfg.prompts.file else "captions of the training data",
        **({"real images": ", ".join(cfg.real_data.source)} if cfg.real_data else {}),
        **({"started from": cfg.loop.start_from} if cfg.loop.start_from else {}),
    }


def trained_rewards(cfg: RunConfig) -> tuple[str, ...]:
    """Labels of the rewards that train a run, including the parts of composites; () for a method without rewards."""
    return tuple(label for spec in cfg.rewards for label in labels_of(spec)) if cfg.method.rewarded else ()


def is_trained(name: str, trained: Collection[str]) -> bool:
    """Whether a reward of this name in the log is one of ``trained_rewards``; a remote one counts as what it serves."""
    return name in trained or name.removeprefix("remote_") in trained


def against_hacking(cfg: RunConfig) -> str:
    """What to do when a run exploits its rewards, in the order in which to try it; "" for a run without rewards."""
    if not cfg.method.rewarded:
        return ""
    held_out = next((spec.label for spec in cfg.held_out), "LABEL")
    values = {name: getattr(cfg.method, name, 0) for name in REWARD_WEIGHTS}
    weights = ", then ".join(f"method.{name} (now {value:g})" for name, value in values.items() if value > 0)
    return (
        f"What to do, in this order: take an earlier checkpoint, chosen by a held-out score (loop.best_metric=validation/"
        f"{held_out}, with loop.checkpoint_every = validation.every); lower {weights}; train for fewer loop.steps; add a "
        "reward of another kind to rewards."
    )


def labels_of(spec: RewardConfig) -> tuple[str, ...]:
    """A reward's label and those of its parts; for a remote reward also its name on the server."""
    if isinstance(spec, CompositeConfig):
        return (spec.label, *(label for part in spec.parts for label in labels_of(part.reward)))
    return (spec.label, spec.reward) if isinstance(spec, RemoteConfig) else (spec.label,)
