"""Records of a study: Prompt, Trial, Rater, Plan (for the admin only) and Vote (one answer, with its models).

A study folder holds ``plan.json`` (which image is whose: for the admin only), ``raters.csv`` (one link per rater),
``images/<random id>.png`` (re-encoded: no metadata) and ``votes.sqlite``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from gdmd.config.base import Config
from gdmd.config.study import Question
from gdmd.io import RunError

Answer = Literal["left", "right", "tie"]
Kind = Literal["pair", "repeat", "check"]
ANSWERS: tuple[Answer, ...] = ("left", "right", "tie")
PLAN, LINKS, IMAGES, VOTES = "plan.json", "raters.csv", "images", "votes.sqlite"


class Prompt(Config):
    """A prompt and its task (GenEval's "tag"; "" without one)."""

    text: str
    task: str = ""


class Trial(Config):
    """One screen of one rater: two images of one prompt. ``left_model`` and ``right_model`` never leave the server.

    ``pair`` identifies the two images regardless of side, so that raters and repeats can be compared.
    """

    id: str
    kind: Kind
    pair: str
    prompt: int
    left: str
    right: str
    left_model: str
    right_model: str
    expected: Answer | None = None


class Rater(Config):
    """The screens of one rater, in order, and the SHA-256 of the token (the token itself is in raters.csv)."""

    token_sha256: str
    trials: tuple[Trial, ...]


class Plan(Config):
    """Everything that is decided before the first vote."""

    version: Literal[1] = 1
    title: str
    consent: str
    questions: tuple[Question, ...]
    models: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    raters: tuple[Rater, ...]
    seed: int

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Plan:
        for trial in (trial for rater in self.raters for trial in rater.trials):
            known = 0 <= trial.prompt < len(self.prompts) and {trial.left_model, trial.right_model} <= set(self.models)
            if not known or not all(re.fullmatch(r"\w+", image) for image in (trial.left, trial.right)):
                raise ValueError(f"screen {trial.id!r} names a prompt, model or image that the plan does not have")
        return self


@dataclass(frozen=True)
class Vote:
    """One answer to one question about two models, ``first`` and ``second`` in the plan's order.

    score: 1 = first preferred, 0 = second preferred, 1/2 = tie.
    """

    rater: int
    question: Question
    kind: Kind
    pair: str
    prompt: int
    task: str
    first: str
    second: str
    score: float
    answer: Answer
    expected: Answer | None
    elapsed_ms: int
    at: str


def token_hash(token: str) -> str:
    """SHA-256 of a token. The plan stores only this, so that reading plan.json lets nobody vote."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_plan(folder: Path) -> Plan:
    """The plan of a study folder. RunError if it is missing or not a plan."""
    path = folder / PLAN
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}. Give the folder that 'gdmd study plan' wrote."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        raise RunError(f"{path} is not a study plan: {place}: {reason}. Write it with 'gdmd study plan'.") from None


def votes_of(plan: Plan, rows: Iterator[tuple[str, str, str, int, str]]) -> list[Vote]:
    """(trial, question, answer, elapsed_ms, at) of the store -> votes with models. RunError for rows of another plan."""
    places = {trial.id: (rater, trial) for rater, who in enumerate(plan.raters) for trial in who.trials}
    votes = []
    for trial_id, question, answer, elapsed_ms, at in rows:
        if trial_id not in places:
            raise RunError(
                f"the votes contain screen {trial_id}, which is not in the plan: votes and plan belong to different "
                "studies. Restore the plan with which the votes were collected."
            )
        rater, trial = places[trial_id]
        votes.append(vote_of(plan, rater, trial, question, answer, elapsed_ms, at))  # type: ignore[arg-type]
    return votes


def vote_of(
    plan: Plan, rater: int, trial: Trial, question: Question, answer: Answer, elapsed_ms: int = 0, at: str = ""
) -> Vote:
    """Unblind an answer: left and right become first and second in the plan's order of models."""
    first, second = sorted((trial.left_model, trial.right_model), key=plan.models.index)
    left_score = {"left": 1.0, "right": 0.0, "tie": 0.5}[answer]
    return Vote(
        rater=rater,
        question=question,
        kind=trial.kind,
        pair=trial.pair,
        prompt=trial.prompt,
        task=plan.prompts[trial.prompt].task,
        first=first,
        second=second,
        score=left_score if trial.left_model == first else 1 - left_score,
        answer=answer,
        expected=trial.expected,
        elapsed_ms=elapsed_ms,
        at=at,
    )
