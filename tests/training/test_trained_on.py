"""Which rewards a run that starts from another one counts as seen in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import Gdmd

from gdmd.config.image_source import read_source
from gdmd.recipes.read import read_recipe
from gdmd.recipes.run_folders import config_of
from gdmd.runs.run_folder import TRAINED_BEFORE, create, open_run, read_facts, write_facts
from gdmd.runs.student_file import EXPORT_FILE
from gdmd.runs.trained_on import note_start, rewards_of_start, trained_on
from gdmd.sources.open import open_source

PARTIAL = "rewards=[{kind: shapes_partial_credit}]"


def seen(run: str) -> tuple[str, ...]:
    return trained_on(config_of(Path(run)), Path(run))


def test_rewards_of_the_runs_before_count_as_trained(gdmd: Gdmd) -> None:
    """Also those of the run before the last one, by way of a student file, and where the last run has no rewards."""
    gdmd.trained()
    first = ("shapes_clip", "shapes_pref")
    assert seen("run") == first and TRAINED_BEFORE not in read_facts(Path("run"))
    assert gdmd.train("loop.start_from=run", PARTIAL, "loop.seed=1", "--run", "second").code == 0
    assert seen("second") == ("shapes_partial_credit", *first)
    facts = read_facts(Path("second"))
    write_facts(Path("second"), {key: one for key, one in facts.items() if key != TRAINED_BEFORE})
    assert seen("second") == ("shapes_partial_credit", *first)  # a run of an earlier version
    write_facts(Path("second"), facts)
    assert gdmd("pretrain", "student", "--run", "second", "--out", "file").code == 0
    (file,) = Path("file").glob("*.safetensors")
    plain = ("method.gamma=0", "loop.steps=1", "loop.seed=2", "--run", "third")
    assert gdmd.train(f"loop.start_from={file}", *plain).code == 0
    assert seen("third") == ("shapes_partial_credit", *first)
    assert open_source(read_source("third,trained=hps+shapes_pref")).info.trained == (*seen("third"), "hps")
    assert "shapes_clip *" in gdmd("eval", "third").out


def test_a_start_whose_configuration_is_of_another_version(gdmd: Gdmd) -> None:
    """All its rewards count, because whether they trained the student is not known."""
    gdmd.trained()
    config = Path("run/config.yaml")
    config.write_text(config.read_text() + "\nremoved: 1\n")
    assert open_run(Path("run")).config["removed"] == 1
    assert rewards_of_start("run") == ("shapes_clip", "shapes_pref")
    assert rewards_of_start("shapes:dmd") == ()


@pytest.mark.parametrize(
    "start", ["model.path=old/export", "model.student=old/export", "model.student_lora=old/export/l.st"]
)
def test_rewards_of_an_export_count_as_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    """Also after the export is gone; without a record of the start, while it is there."""
    monkeypatch.chdir(tmp_path)
    folder = Path("old/export")
    folder.mkdir(parents=True)
    (folder / "l.st").touch()
    (folder / EXPORT_FILE).write_text(json.dumps({"rewards": ["pickscore", "hps"]}))
    cfg = read_recipe("sdxl_gdmd", ["model.path=/models/sdxl", start, "rewards=[{kind: hps}]"])
    run = create(Path("run"), cfg.model_dump(mode="json"))
    assert trained_on(cfg, run.path) == ("hps", "pickscore")
    note_start(cfg, run.path)
    (folder / EXPORT_FILE).write_text(json.dumps({"rewards": ["clip"]}))
    note_start(cfg, run.path)  # the run has no checkpoint yet, so it starts from the new export
    assert trained_on(cfg, run.path) == ("hps", "clip")
    (run.checkpoints / "step_000001").mkdir(parents=True)
    (folder / EXPORT_FILE).write_text(json.dumps({"rewards": ["pickscore"]}))
    note_start(cfg, run.path)
    assert trained_on(cfg, run.path) == ("hps", "clip")
    (folder / EXPORT_FILE).unlink()
    assert trained_on(cfg, run.path) == ("hps", "clip")
    other = read_recipe("sdxl_gdmd", ["model.path=/models/sdxl", "rewards=[{kind: hps}]"])
    assert trained_on(other, tmp_path) == ("hps",)


def test_a_teacher_that_is_an_export_does_not_train_the_student(tmp_path: Path) -> None:
    (tmp_path / EXPORT_FILE).write_text(json.dumps({"rewards": ["pickscore"]}))
    words = [f"model.path={tmp_path}", "model.student=/models/sdxl", "rewards=[{kind: hps}]"]
    assert trained_on(read_recipe("sdxl_gdmd", words), tmp_path / "run") == ("hps",)
