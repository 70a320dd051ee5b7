"""A small study for tests: images of two models in GenEval's layout, with the model's name in the PNG text."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from gdmd.config.study import StudyConfig
from gdmd.study.prepare import prepare
from gdmd.study.records import LINKS, Plan

MODELS = ("Secret-Alpha", "Secret-Beta")
ADMIN = "admin-0123456789-token"
TASKS = ("counting", "position")


def write_images(folder: Path, model: str, prompts: int, side: int = 32) -> Path:
    """One image per prompt, of one color per model and prompt, with the model's name in the file."""
    for k in range(prompts):
        samples = folder / f"{k:05d}" / "samples"
        samples.mkdir(parents=True)
        meta = {"tag": TASKS[k % 2], "prompt": f"an image of thing number {k}"}
        (samples.parent / "metadata.jsonl").write_text(json.dumps(meta))
        info = PngImagePlugin.PngInfo()
        info.add_text("model", model)
        pixels = np.random.default_rng(k).integers(0, 256, (side, side, 3), dtype=np.uint8)
        pixels[..., MODELS.index(model)] = 255
        Image.fromarray(pixels).save(samples / f"{model}.png", pnginfo=info)
    return folder


def write_study(folder: Path, prompts: int = 6, **settings: Any) -> tuple[Path, Plan, list[str]]:
    """(study folder, plan, the raters' tokens)."""
    folders = {model: write_images(folder / "images" / model, model, prompts) for model in MODELS}
    cfg = StudyConfig(**{"raters": 2, "pairs_per_rater": 4, "votes_per_pair": 2, "repeats": 1, "checks": 1, **settings})
    study = folder / "study"
    plan = prepare(cfg, folders, study).plan
    with (study / LINKS).open() as file:
        return study, plan, [row["token"] for row in csv.DictReader(file)]


class Server:
    """The real server in a separate process, on a free port."""

    def __init__(self, study: Path, port: int = 0) -> None:
        code = (
            "import sys, socket, uvicorn; from pathlib import Path; from gdmd.study.serve import create_app\n"
            "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
            "s.bind(('127.0.0.1', int(sys.argv[3]))); s.listen(64); print('port', s.getsockname()[1], flush=True)\n"
            "uvicorn.run(create_app(Path(sys.argv[1]), sys.argv[2]), fd=s.fileno(), log_level='warning')"
        )
        root = str(Path(__file__).resolve().parents[2])
        environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": root}
        command = [sys.executable, "-c", code, str(study), ADMIN, str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r"port (\d+)", self.process.stdout.readline())
        assert found, "the server did not start"
        self.url = f"http://127.0.0.1:{found[1]}"

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self.process.kill()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()
