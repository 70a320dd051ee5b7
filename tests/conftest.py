"""Every test runs on one thread and from the same seeds, so that it neither fights for cores nor depends on order.

No test connects to a model hub.
"""

import gc
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import gdmd, shared_assets  # noqa: F401
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=1000, deadline=None, database=None, print_blob=True)  # make fuzz
settings.load_profile("repeatable")

gc.disable()  # while hundreds of modules are imported, which leave no garbage


def pytest_collection_finish(session: pytest.Session) -> None:
    """From here on the collector looks at what the tests make, not at the million objects of the libraries again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which processes that are not killed do not need; on a slow disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tiny pipelines; each is saved on first use (``tiny_pipelines.saved``)."""
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture
def saved(folders: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tiny pipeline saved with another scheduler, and other keys of the configs of its parts."""

    import tiny_pipelines as tiny

    def save(
        name: str, scheduler: Any = None, parts: dict[str, dict[str, Any]] | None = None, called: str = ""
    ) -> Path:
        folder = tmp_path / (called or "base")
        shutil.copytree(tiny.saved(folders, name), folder)
        index = json.loads((folder / "model_index.json").read_text())
        if scheduler is not None:
            scheduler.save_pretrained(folder / "scheduler")
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
        index |= (parts or {}).get("index", {})
        (folder / "model_index.json").write_text(json.dumps(index))
        for part in ("transformer", "unet", "vae"):
            if part in (parts or {}):
                config = folder / part / "config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | (parts or {})[part]))
        return folder

    return save
