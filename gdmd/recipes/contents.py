"""Hashes of the weights that generated images, to which stored results belong."""

from __future__ import annotations

from pathlib import Path

from gdmd.config.model import DiffusersModel
from gdmd.config.run import ShapesModel
from gdmd.io import content_hash, file_hash
from gdmd.models.lora_location import PEFT_CONFIG
from gdmd.rewards.weights import weights_content
from gdmd.runs.assets import asset_path


def base_content(model: DiffusersModel | ShapesModel) -> str:
    """A hash of the frozen networks, or the base model's commit on the hub: also of LoRAs and what the student starts as."""
    if isinstance(model, ShapesModel):
        given = {"shapes_teacher": model.teacher, "shapes_vae": model.vae}
        return content_hash(*(file_hash(Path(path or asset_path(name))) for name, path in given.items()))
    own = pipeline_content(model)
    more = [f"{lora_content(one.path, one.revision)} {one.weight}" for one in model.teacher_loras]
    more += [base_content(model.start)] if model.start is not model else []
    return content_hash(own, *more) if more else own


def pipeline_content(model: DiffusersModel) -> str:
    """A hash of the pipeline at model.path alone, or its commit on the hub."""
    return weights_content(model.location, model.revision, model.variant)


def checkpoint_content(run: Path, step: int) -> str:
    """A hash of a checkpoint: of its state.json, which has the hashes of all its files."""
    return file_hash(run / "checkpoints" / f"step_{step:06d}" / "state.json")


def lora_content(lora: str, revision: str | None = None) -> str:
    """A hash of a LoRA, or the hub's commit. Includes the PEFT config next to a file: it holds alpha."""
    config = Path(lora).parent / PEFT_CONFIG
    if Path(lora).is_file() and config.is_file():
        return content_hash(weights_content(lora), weights_content(str(config)))
    return weights_content(lora, revision)
