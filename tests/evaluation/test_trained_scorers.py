"""Which scorers of an evaluation a model was trained on."""

from __future__ import annotations

from typing import Any

import pytest

from gdmd.config.image_source import read_source
from gdmd.config.rewards import ClipConfig, CompositeConfig, RemoteConfig
from gdmd.evaluation.model_page import task_lines
from gdmd.evaluation.preference import _trained
from gdmd.evaluation.run_measures import measure_groups
from gdmd.evaluation.scorers import check_trained, read_scorers
from gdmd.shapes.grammar import TASKS


def test_trained_names_are_checked() -> None:
    """A misspelled one would leave its column marked as held out."""
    specs = read_scorers(["clip", "my_rewards:warm"])
    with pytest.raises(ValueError, match="trained=pickscor: unknown scorer; did you mean 'pickscore'"):
        check_trained([read_source("model,trained=pickscor")], specs)
    with pytest.raises(
        ValueError, match="trained=xyz: unknown scorer; the scorers here are 'clip' and 'my_rewards:warm'"
    ):
        check_trained([read_source("first"), read_source("second,trained=clip+xyz")], specs)
    check_trained([read_source("model,trained=my_rewards:warm+pickscore")], specs)  # a kind of reward without a column


def test_scorer_with_a_trained_part_was_trained_on() -> None:
    parts = [{"reward": {"kind": kind}} for kind in ("hps", "clip")]
    both = CompositeConfig.model_validate({"kind": "composite", "parts": parts})
    served = RemoteConfig(url="http://host:1", reward="hps")
    assert [_trained(one, ("hps",)) for one in (both, served, ClipConfig())] == [True, True, False]
    assert _trained(both, ("aesthetic",)) is False and _trained(both, None) is None


def test_shapeseval_and_geneval_are_marked_for_a_model_trained_on_their_checker() -> None:
    """Partial credit is a part of ShapesEval's checker, and the reward geneval that of GenEval."""

    def row(name: str, trained: list[str] | None, **more: Any) -> dict[str, Any]:
        source = {"name": name, "kind": "run", "where": name, "nfe": 4, "step": 1, "trained": trained}
        return {"source": source, "scores": {}, **more}

    right = {"overall": 0.5} | dict.fromkeys(TASKS, 0.5)
    shapes = {"shapeseval": right, "shapeseval_interval": [0.4, 0.6]}
    names: dict[str, list[str] | None] = {"a": ["shapes_partial_credit"], "b": [], "c": None}
    lines = task_lines({name: row(name, trained, **shapes) for name, trained in names.items()})
    assert [cell.text for cell in lines[0].cells] == [
        "0.500 [0.400, 0.600] †",
        "0.500 [0.400, 0.600]",
        "0.500 [0.400, 0.600] ?",
    ]
    geneval = {"geneval": {"overall": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    lines = task_lines({name: row(name, [name], **geneval) for name in ("geneval", "clip")})
    assert [cell.text.endswith("†") for cell in lines[0].cells] == [True, False]

    evaluated = {"shapeseval": right, "rewards": {"shapes_clip": 0.5}, "fidelity": 0.9, "coverage": 0.8, "nfe": 4}
    unseen, trained, _ = measure_groups({"GDMD": evaluated}, ["shapes_partial_credit"])
    assert [one.title for one in unseen.rows][:1] == ["shapes_clip"] and trained.rows[0].title == "ShapesEval"
