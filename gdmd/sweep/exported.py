"""The images of an exported LoRA: ``gdmd export``, then diffusers alone in another process (``plain_diffusers``)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.image_files import open_image
from gdmd.io import RunError, write_atomic
from gdmd.rewards.preprocessing import from_pil
from gdmd.runs.process import stop_signals
from gdmd.shapes.evaluate import image_captions
from gdmd.shapes.grammar import Split
from gdmd.training.rank import module_arguments

PLAIN = Path(__file__).with_name("plain_diffusers.py")


def draw_exported(cfg: RunConfig, run: Path, folder: Path, split: Split) -> Tensor:
    """Images [N, 3, S, S] of ``image_captions``, read from the PNG files that diffusers wrote in ``folder``.

    The noise is diffusers' own, seeded by image, so it differs from that of the run's other evaluations.
    """
    assert isinstance(cfg.model, DiffusersModel)
    export, images, call = folder / "export", folder / "images", folder / "call.json"
    captions = image_captions(cfg.eval, split)
    content = {
        "base": str(Path(cfg.model.location).resolve()),
        "captions": captions[:: cfg.eval.images],
        "images": cfg.eval.images,
        "seed": cfg.eval.seed,
    }
    write_atomic(call, json.dumps(content, indent=1), "the captions")
    _python([*module_arguments("gdmd"), "export", str(run), "--out", str(export)])
    _python(["-P", str(PLAIN), str(export), str(call), str(images)])
    return from_pil([open_image(images / f"{number:05d}.png") for number in range(len(captions))])


def _python(arguments: Sequence[str]) -> None:
    """Run ``python ARGUMENTS`` and wait for it. RunError if it fails; SystemExit if a signal stops this process."""
    with stop_signals() as stopped:
        process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL)
        while process.poll() is None and not stopped:
            time.sleep(0.05)
    if stopped:
        process.terminate()
        process.wait()
        sys.exit(128 + stopped[0])
    if process.returncode:
        raise RunError(f"`python {' '.join(arguments)}` ended with exit code {process.returncode}; its log is above")
