"""Every test runs on one thread and from the same seeds, so that it neither fights for cores nor depends on order.

None reaches for a model hub.
"""

import gc
import os
import random

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

gc.disable()  # while hundreds of modules are imported, nothing of which is garbage


def pytest_collection_finish(session: pytest.Session) -> None:
    """From here on the collector looks at what the tests make, not at the million objects of the libraries again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
