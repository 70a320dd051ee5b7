"""Which configuration continues a run: that of its folder, also when an older version wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gdmd.programs.folders import check_resumable, resumed
from gdmd.recipes.read import read_recipe
from gdmd.runs.errors import RunError
from gdmd.runs.rundir import create


def older_run(tmp_path: Path) -> Path:
    """A run of a version that knew neither ``real_data`` nor ``loop.start_from``."""
    config = read_recipe("shapes_smoke", []).model_dump(mode="json")
    del config["real_data"], config["loop"]["start_from"]
    return create(tmp_path / "run", config).path


def test_fields_that_are_new_count_as_their_defaults(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    cfg, again = resumed(run, None, ["loop.steps=9"])
    assert cfg.real_data is None and cfg.loop.steps == 9
    assert again.config == yaml.safe_load((run / "config.yaml").read_text()) == cfg.model_dump(mode="json")


def test_a_new_field_at_another_value_is_another_configuration(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="loop.start_from:  -> elsewhere"):
        check_resumable(older_run(tmp_path), None, ["loop.start_from=elsewhere"])


def test_a_recipe_given_again_is_compared_with_the_completed_one(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    assert check_resumable(run, "shapes_smoke", ["loop.steps=9"]).loop.steps == 9
    with pytest.raises(RunError, match="method.gamma"):
        check_resumable(run, "shapes_smoke", ["method.gamma=0.25"])
