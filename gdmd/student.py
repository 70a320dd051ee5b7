"""``load_student``: a trained student as a diffusers pipeline, from a run, an export, or the Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gdmd.config.image_source import SourceConfig
from gdmd.config.load import validated
from gdmd.config.shapes_pipeline import HUB_ID
from gdmd.hub import hub_file, hub_reason, offline, transport_errors
from gdmd.io import RunError, near_name
from gdmd.runs.student_file import EXPORT_FILE

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from gdmd.config.model import DiffusersModel


def load_student(
    run_or_export: str | Path,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline whose call samples the student: ``load_student(FOLDER)("a red cube").images[0]``.

    It loads a run (the EMA student of its newest checkpoint), a folder of ``gdmd export``, or the hub id of one.
    Steps, image size and guidance of the training are the defaults of the call. ``base``: the base model, if it has
    moved. ``dtype``: fp32, bf16 or fp16, or a torch dtype; default: that of the training. ``device``: default: a GPU if
    there is one. ValueError for a run of the Shapes world, a missing or different base, and a device that torch lacks here;
    RunError for other folders.
    """
    from gdmd.diffusion.device import pick_device
    from gdmd.programs.export import real_model
    from gdmd.recipes.run_folders import config_of

    folder, place = Path(run_or_export), pick_device(None if device is None else str(device))
    if (folder / "config.yaml").is_file():
        real_model(config_of(folder), folder)  # before anything is loaded
        return _of_run(folder, base, _name(dtype), place)
    if not (folder / EXPORT_FILE).is_file():
        folder = _from_hub(str(run_or_export))
    return _of_export(folder, base, _name(dtype), place)


def _of_run(run: Path, base: str | None, dtype: str | None, device: str) -> DiffusionPipeline:
    from gdmd.export.lora import check_fits
    from gdmd.export.student import student_pipeline
    from gdmd.models.loading import open_family
    from gdmd.programs.export import read_student, real_model

    cfg, _, weights = read_student(run, "last", base, "base=FOLDER")
    model: DiffusersModel = real_model(cfg, run).start
    # an offloaded text encoder is on the CPU, where only gdmd's own calls look for it
    own = model.model_copy(update={"dtype": dtype or model.dtype, "quantization": "none", "offload": "none"})
    family = open_family(own, device)
    check_fits(family, weights)
    pipe: DiffusionPipeline = student_pipeline(family, weights, cfg.method.student_steps, cfg.method.student_sampler)
    return pipe


def _of_export(folder: Path, base: str | None, dtype: str | None, device: str) -> DiffusionPipeline:
    from gdmd.export.student import with_call
    from gdmd.sources.pipelines import open_export

    asked = {"base": base, "dtype": dtype, "device": device}
    given = {name: value for name, value in asked.items() if value is not None}
    cfg: SourceConfig = validated(SourceConfig, {"name": "student", "where": str(folder), **given}, "load_student")
    with _without_warnings("diffusers.loaders.lora_base"):  # of a LoRA that has no layers of the text encoders
        source = open_export(cfg)
    source.pipe.set_progress_bar_config(disable=False)
    pipe: DiffusionPipeline = with_call(source.pipe, source.arguments)
    return pipe


@contextmanager
def _without_warnings(library: str) -> Iterator[None]:
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _from_hub(name: str) -> Path:
    """The folder in the cache of an export on the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    hub_id = re.fullmatch(HUB_ID, name) and not Path(name).parent.is_dir()
    if Path(name).exists() or not hub_id:
        above = next((one for one in list(Path(name).parents)[:2] if (one / "config.yaml").is_file()), None)
        near = f" Did you mean {above}?" if above else ""
        seen = f"it holds neither config.yaml nor {EXPORT_FILE}.{near}"
        seen = seen if Path(name).exists() else f"it does not exist.{near_name(name)}"
        raise RunError(
            f"{name}: {seen} Give a run folder, a folder written by gdmd export, or the hub id (ORG/NAME) of one."
        )
    try:
        hub_file(name, EXPORT_FILE)
        return Path(snapshot_download(name, local_files_only=bool(offline())))
    except (HfHubHTTPError, OSError, *transport_errors()) as error:
        raise RunError(f"{name}: no such folder, and {hub_reason(error, EXPORT_FILE, None, offline())}") from error


def _name(dtype: str | torch.dtype | None) -> str | None:
    """The name of a dtype in configs. ValueError for an unsupported dtype."""
    if dtype is None:
        return None
    from gdmd.diffusion.device import DTYPES

    names = {name: name for name in DTYPES} | {str(value): name for name, value in DTYPES.items()}
    if str(dtype) not in names:
        raise ValueError(f"dtype {dtype} is not supported; give {', '.join(DTYPES)} or the torch dtype")
    return names[str(dtype)]
