"""Which scorers of an evaluation a model was trained on."""

from __future__ import annotations

import pytest

from gdmd.config.image_source import read_source
from gdmd.config.rewards import ClipConfig, CompositeConfig, RemoteConfig
from gdmd.evaluation.preference import _trained
from gdmd.evaluation.scorers import check_trained, read_scorers


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
