"""What a human preference study is made of: how many raters, pairs, repeats and attention checks, and what is asked."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gdmd.config.base import Config, Count, NonNegativeCount

Question = Literal["overall", "quality", "alignment"]
"""overall: which image is better for the prompt; quality: which looks better; alignment: which follows the prompt."""

CONSENT = """\
You will see pictures made by computer programs, two at a time, with the sentence they were made from.
Say which one you prefer; there are no right or wrong opinions.

Your answers and the time they took are stored under a random number, without your name, address or device.
You may stop at any moment by closing the page, and go on later with the same link.
"""

PORT = 8765
ADDRESS = f"http://127.0.0.1:{PORT}"
"""Where ``gdmd study serve`` listens unless it is told otherwise."""

Words = Annotated[str, Field(min_length=1, max_length=20_000)]


class StudyConfig(Config):
    """The plan's settings. Every rater sees pairs_per_rater + repeats + checks screens."""

    seed: NonNegativeCount = 0
    raters: Annotated[Count, Field(le=10_000)] = 10
    pairs_per_rater: Annotated[Count, Field(le=5_000)] = 60
    votes_per_pair: Count = 3
    """How many raters judge the same two images; agreement between raters needs at least 2."""
    images_per_prompt: Count = 1
    repeats: NonNegativeCount = 3
    """Pairs that a rater sees again, sides exchanged: self-consistency, left out of the win rates."""
    checks: NonNegativeCount = 2
    """Pairs with an obvious answer (an image beside a ruined copy of itself): attention."""
    questions: Annotated[tuple[Question, ...], Field(min_length=1)] = ("overall", "quality", "alignment")
    against: str | None = None
    """Compare only this model with each other one (the paper's Fig. 8); None: every pair of models."""
    title: Words = "Which picture do you prefer?"
    consent: Words = CONSENT

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.questions)) != len(self.questions):
            raise ValueError(f"questions names one twice: {', '.join(self.questions)}; give each once")
        if self.repeats > self.pairs_per_rater:
            raise ValueError(
                f"repeats is {self.repeats}, above pairs_per_rater = {self.pairs_per_rater}: "
                "only pairs that were shown can be shown again; lower repeats"
            )
        if self.votes_per_pair > self.raters:
            raise ValueError(
                f"votes_per_pair is {self.votes_per_pair}, above raters = {self.raters}: "
                "nobody judges the same pair twice; lower votes_per_pair or invite more raters"
            )
        return self
