"""Construction gain and realized gain: what the targets of an iteration promise, and what its updates bring.

    construction gain    mean_k (R_k(D(x_tar)) - R_k(D(x0))) / Z_k    x0: the student's prediction from x_tau, before
    realized gain        mean_k (R_k(D(x0')) - R_k(D(x0))) / Z_k      x0': after the updates, from the same x_tau

x_tar: where the loss of the iteration's student updates is least. In units of the method's Z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from gdmd.methods.gdmd import Gdmd
from gdmd.methods.gdmd_tilted import GdmdTilted
from gdmd.methods.scorer import Scorer, mean_advantage
from gdmd.methods.sizes import SeveralSizes
from gdmd.types import Method

CONSTRUCTION, REALIZED = "gain/construction", "gain/realized"
"""Keys of metrics.jsonl."""


def gains_hook(method: Method) -> Callable[[], Mapping[str, float]]:
    """A hook that measures both gains of the last iteration: one student call, three decoded and scored batches.

    It draws nothing and its scores do not count in the statistics of the training. It returns nothing for a method that
    does not keep its targets, or that has no rewards.
    """

    method = method.method if isinstance(method, SeveralSizes) else method

    @torch.no_grad()
    def measured() -> Mapping[str, float]:
        if not isinstance(method, Gdmd | GdmdTilted) or method.constructed is None or not method.cfg.rewarded:
            return {}
        own, scorer = method.constructed, Scorer(method.scorer.codec, method.scorer.rewards)
        rollout, prompts = own.rollout, own.prompts
        after = method.roles.student(rollout.x_tau, rollout.tau, rollout.cond).x0
        before = scorer(rollout.x0, prompts)  # [R, b]
        z = method.scale.value().to(before.device)
        found = {}
        for key, x in ((CONSTRUCTION, own.x_tar), (REALIZED, after)):
            gain = mean_advantage(scorer(x, prompts), before, z)  # [b], NaN = not scored
            found[key] = float(prompts.ranks.all_gather(gain).double().nanmean())
        return found

    return measured
