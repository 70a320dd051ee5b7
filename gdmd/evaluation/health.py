"""The health of a training run: statistics to watch, each with a rule that says ok, look or bad.

Rules compare windows of a fifth of the logged rows: "at the end" is the mean of the last fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev
from typing import Literal

from gdmd.config.describe import is_trained
from gdmd.config.validation import DIVERSITY, PREFIX
from gdmd.reporting.plots import BINS, Chart, Metrics, curves, r_histogram, stacked_curves
from gdmd.runs import validation_scores
from gdmd.training.displacement import HEALTHY, MOVED, STUCK

Status = Literal["ok", "look", "bad", "unknown"]
WINDOWS = 5
FEW = 10
"""Fewest logged rows for which a panel is judged."""


@dataclass(frozen=True)
class Panel:
    """A figure (SVG text), its status, the finding in a sentence, and the rule behind it."""

    title: str
    svg: str
    status: Status
    finding: str
    rule: str


Judge = Callable[[Metrics], tuple[Status, str]]


@dataclass(frozen=True)
class _Watched:
    title: str
    keys: Mapping[str, str]
    rule: str
    judge: Judge


def health_panels(metrics: Metrics, trained: Collection[str] = (), advice: str = "") -> list[Panel]:
    """The panels for which the run has logged values. trained: names of the rewards that train the student.

    advice: what to do against reward hacking.
    """
    drawn = [(watched, curves(metrics, watched.keys, watched.title)) for watched in _WATCHED]
    gains = [Chart("construction: R(target) - R(sample)", CONSTRUCTED), Chart("realized: after the updates", REALIZED)]
    drawn.append((_GAINS, stacked_curves(metrics, gains, _GAINS.title)))
    drawn.append((_OPTIMALITY, r_histogram(metrics)))
    panels = [
        Panel(watched.title, svg, *(_FEW_ROWS if len(metrics) < FEW else watched.judge(metrics)), watched.rule)
        for watched, svg in drawn
        if svg
    ]
    own = {name for name in validation_scores.labels(metrics) if is_trained(name, trained)}
    return [*_validation(metrics, own, advice), *panels]


def _validation(metrics: Metrics, trained: Collection[str], advice: str) -> list[Panel]:
    """Trained scores of the validation images above held-out ones and the images' diversity, with the teacher's."""
    names = sorted(validation_scores.labels(metrics), key=lambda name: name not in trained)
    titles = {name: f"{name} ({'trained' if name in trained else 'held out'})" for name in names}
    titles[DIVERSITY] = "diversity of a prompt's images (1 - cosine)"
    charts = [
        Chart(f"{title}{f', {size}' if size else ''}", PREFIX + label, validation_scores.teacher_score(metrics, label))
        for name, title in titles.items()
        for size in ("", *validation_scores.sizes_of(metrics, name))
        for label in [f"{name}/{size}" if size else name]
    ]
    title = "Validation scores"
    svg = stacked_curves(metrics, charts, title)
    status, finding = _validated(metrics, names, trained)
    finding = f"{finding} {advice}".rstrip() if status == "bad" else finding
    return [Panel(title, svg, status, finding, _VALIDATION_RULE)] if svg else []


def _validated(metrics: Metrics, names: Sequence[str], trained: Collection[str]) -> tuple[Status, str]:
    held_out = [name for name in names if name not in trained]
    if not held_out:
        return "unknown", "No held-out scorer: reward hacking would not be seen here; set validation.scorers."
    if hacking := validation_scores.reward_hacking(metrics, trained):
        return "bad", hacking
    share = validation_scores.diversity_share(metrics)
    spread = "" if share is None else f" The diversity of a prompt's images is {share:.2f} times the teacher's."
    trends = {name: found for name in held_out if (found := validation_scores.trend(metrics, name))}
    if not trends:
        few = f"Fewer than {validation_scores.FEW} validations after step 0: too few to judge."
        return "unknown", few + spread
    fallen = [name for name, found in trends.items() if found.sign < 0]
    text = f"Held-out scores fall: {', '.join(fallen)}." if fallen else "No held-out score falls."
    status: Status = "look" if fallen or (share is not None and share < validation_scores.LITTLE) else "ok"
    return status, text + spread


def summary(panels: Sequence[Panel]) -> str:
    """How many panels have each status: "4 ok, 1 look"."""
    counts = {status: sum(panel.status == status for panel in panels) for status in ("ok", "look", "bad", "unknown")}
    names = {"unknown": "not judged"}
    return ", ".join(f"{count} {names.get(status, status)}" for status, count in counts.items() if count)


def training_curves(metrics: Metrics) -> list[tuple[str, str]]:
    """(title, SVG) of losses, rewards of sample and target (by model, and over all of several), weights and speed."""
    names = reward_names(metrics)
    together = {"reward/sample": "sample", "reward/target": "implicit target"}
    drawn = [
        ("Losses", {"loss/student": "student", "loss/fake": "fake score"}),
        *([("Reward, all models", together)] if len(names) != 1 else []),
        *((f"Reward {name}", _pair(name)) for name in names),
        ("Weight of the DMD step", {"weight/mean": "mean weight w", "weight/r_mean": "mean r"}),
        ("Effective number of targets", {"weight/effective": "(sum w)^2 / sum w^2"}),
        ("Shares of r", {"weight/share_below_half": "r < 1/2", "weight/share_clipped": "r = 0 or 1"}),
        ("Training speed, images/s", {"speed/images_per_s": "images/s"}),
    ]
    figures = [(title, curves(metrics, keys, title)) for title, keys in drawn]
    return [(title, svg) for title, svg in figures if svg]


def reward_names(metrics: Metrics) -> list[str]:
    """The reward models a run was trained on, from its keys reward/NAME/sample and reward/NAME/target."""
    keys = dict.fromkeys(key for row in metrics for key in row)
    parts = [key.split("/") for key in keys]
    named = [part[1] for part in parts if len(part) == 3 and part[0] == "reward" and part[2] in ("sample", "target")]
    return list(dict.fromkeys(named))


def _pair(name: str) -> Mapping[str, str]:
    return {f"reward/{name}/sample": "sample", f"reward/{name}/target": "implicit target"}


def _windows(metrics: Metrics, key: str) -> list[list[float]]:
    """The finite values of a key in WINDOWS parts of equal length, from first to last."""
    values = [row[key] for row in metrics if math.isfinite(row.get(key, math.nan))]
    edges = [round(k * len(values) / WINDOWS) for k in range(WINDOWS + 1)]
    return [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _end(metrics: Metrics, key: str) -> float:
    """The mean over the last window; NaN without values."""
    last = _windows(metrics, key)[-1]
    return fmean(last) if last else math.nan


def _within(value: float, ok: float, look: float) -> Status:
    """Status "ok" up to ``ok``, "look" up to ``look``, else "bad"; "unknown" for NaN."""
    return "unknown" if math.isnan(value) else "ok" if value <= ok else "look" if value <= look else "bad"


def _worst(*found: Status) -> Status:
    order: Sequence[Status] = ("unknown", "ok", "look", "bad")
    return max(found, key=order.index)


_FEW_ROWS: tuple[Status, str] = ("unknown", f"Fewer than {FEW} logged rows: too few to judge.")


def _latents(metrics: Metrics) -> tuple[Status, str]:
    mean, std = _end(metrics, "latent/mean"), _end(metrics, "latent/std")
    if math.isnan(std) or math.isnan(mean):
        return "unknown", "Mean or std was not logged."
    spread: Status = "ok" if 0.7 <= std <= 1.4 else "look" if 0.5 <= std <= 2 else "bad"
    status = _worst(spread, _within(abs(mean), 0.3, 1.0))
    text = f"At the end: mean {mean:+.2f}, std {std:.2f}."
    scored = _end(metrics, "latent/scored_std")
    if math.isfinite(scored):
        status = _worst(status, _within(scored / std, 1.5, 2.5))
        text += f" The scored latents have {scored / std:.2f} times that std."
    return status, text


def _moves(metrics: Metrics) -> tuple[Status, str]:
    end = _end(metrics, MOVED)
    if math.isnan(end):
        return "unknown", "The distance was not measured."
    status: Status = "ok" if end >= HEALTHY else "look" if end >= STUCK else "bad"
    return status, f"At the end {end:.2g} of the spread."


def _gap(metrics: Metrics) -> tuple[Status, str]:
    means = [fmean(window) for window in _windows(metrics, "gap/real") if window]
    if len(means) < WINDOWS or min(means) <= 0:
        return "unknown", "The gap was not logged."
    ratio = means[-1] / min(means)
    text = f"At the end {means[-1]:.3g}, {ratio:.2f} times the lowest fifth."
    reward, distilled = _end(metrics, "gap/pull"), _end(metrics, "gap/grad")
    if math.isfinite(reward) and distilled > 0:
        share = reward / distilled
        return _worst(_within(ratio, 1.15, 1.5), _within(share, 0.5, 1.0)), (
            f"{text} The reward gradient's part is {share:.2f} times the distillation gradient."
        )
    return _within(ratio, 1.15, 1.5), text


def _fake_score(metrics: Metrics) -> tuple[Status, str]:
    ratios = {}
    for key, name in _THIRDS.items():
        means = [fmean(window) for window in _windows(metrics, key) if window]
        if len(means) == WINDOWS and means[1] > 0:
            ratios[name] = means[-1] / means[1]
    if not ratios:
        return "unknown", "The loss was not logged."
    worst = max(ratios, key=lambda name: ratios[name])
    return _within(ratios[worst], 1.15, 1.5), f"At most {ratios[worst]:.2f} times the second fifth (at {worst})."


def _gain(metrics: Metrics) -> tuple[Status, str]:
    windows = _windows(metrics, "reward/gain")
    middle = [value for window in windows[1:-1] for value in window]
    if len(middle) < 3 or not windows[-1]:
        return "unknown", "The gain was not logged."
    spread = pstdev(middle)
    fall = (fmean(middle) - fmean(windows[-1])) / spread if spread else 0.0
    return _within(
        fall, 2.0, 4.0
    ), f"At the end {fmean(windows[-1]):+.3g}; before {fmean(middle):+.3g} +- {spread:.2g}."


def _two_gains(metrics: Metrics) -> tuple[Status, str]:
    values = [row[REALIZED] for row in metrics if math.isfinite(row.get(REALIZED, math.nan))]
    if len(values) < FEW:
        return "unknown", _FEW_ROWS[1]
    mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
    status: Status = "bad" if mean < -4 * error else "look" if mean < -2 * error else "ok"
    text = f"Realized {mean:+.2g} +- {error:.2g} Z per iteration (mean, standard error)."
    constructed = [row[CONSTRUCTED] for row in metrics if math.isfinite(row.get(CONSTRUCTED, math.nan))]
    return status, f"{text} The targets promise {fmean(constructed):+.2g} Z." if constructed else text


def _group_spread(metrics: Metrics) -> tuple[Status, str]:
    end = _end(metrics, SPREAD)
    if math.isnan(end):
        return "unknown", "The spread was not logged."
    return ("ok" if end >= 0.1 else "look" if end >= 0.02 else "bad"), f"At the end {end:.2f} of the whole spread."


def _optimality(metrics: Metrics) -> tuple[Status, str]:
    shares = [_end(metrics, f"histogram/r_{k}") for k in range(BINS)]
    if any(map(math.isnan, shares)) or not (total := sum(shares)):
        return "unknown", "The histogram was not logged."
    center, ends = (sum(shares[k] for k in places) / total for places in ((4, 5), (0, BINS - 1)))
    status = _worst(_within(center, 0.9, 0.99), _within(ends, 0.5, 0.9))
    return status, f"At the end {center:.0%} of r are in 0.4 to 0.6, and {ends:.0%} below 0.1 or above 0.9."


_VALIDATION_RULE = (
    "ok: no held-out score falls, and the diversity of a prompt's images is at least "
    f"{validation_scores.LITTLE:g} times the teacher's. "
    "bad: a trained score rises while a held-out one falls, or while the diversity falls to less than "
    f"{validation_scores.KEPT:g} times that of the first third (reward hacking). look: a held-out score falls, or the "
    "diversity is lower than that. "
    "A score rises or falls if a t-test finds the means of the first and the last third of the validations after step 0 "
    f"different (p < {validation_scores.LEVEL:g})."
)
CONSTRUCTED, REALIZED, SPREAD = "gain/construction", "gain/realized", "reward/group_share"
_THIRDS = {"fake_loss/t0": "t below 1/3", "fake_loss/t1": "t in 1/3 to 2/3", "fake_loss/t2": "t above 2/3"}
_OPTIMALITY = _Watched(
    "Optimality r",
    {},
    "ok: at most 90 % of r in 0.4 to 0.6 and at most half of them in the outer tenths. bad: above 99 % (the rewards cannot "
    "tell the targets from the sample) or above 90 % (Z is too small). look: between.",
    _optimality,
)
_GAINS = _Watched(
    "Construction gain and realized gain",
    {},
    "ok: the mean realized gain of the run is not below 0 by more than two standard errors. bad: by more than four: the "
    "updates lower the rewards that train the student; lower its learning rate, or look at the fake score. look: between. "
    "The construction gain is not judged: a whole one-step target overshoots, so it is often negative even where the "
    "updates, which go a small part of the way, gain. Z is the running std of a reward.",
    _two_gains,
)
_WATCHED: Sequence[_Watched] = (
    _Watched(
        "Student moves",
        {MOVED: "distance from the teacher's samples"},
        f"ok: at the end samples from the same noise differ from the teacher's by at least {HEALTHY} of the spread of the "
        f"teacher's. bad: by less than {STUCK}: the student is still almost the teacher; raise its learning rate (LoRA "
        "needs about 10 times the rate of full weights) or train longer. look: between.",
        _moves,
    ),
    _Watched(
        "Latent mean and std",
        {"latent/mean": "mean", "latent/std": "std", "latent/scored_std": "std of what is scored"},
        "ok: std in 0.7 to 1.4, |mean| up to 0.3, scored std up to 1.5 times the std. bad: std below 0.5 (collapse to gray) "
        "or above 2 (over-saturation), |mean| above 1, or scored std above 2.5 times (rewards judge images off the data "
        "manifold). look: between.",
        _latents,
    ),
    _Watched(
        "Gap to the teacher, mean |x0 - x0_real|",
        {
            "gap/real": "|x0 - x0_real|",
            "gap/grad": "rms of x0_fake - x0_real",
            "gap/pull": "rms of the reward gradient",
        },
        "ok: at the end at most 1.15 times its lowest fifth. bad: above 1.5 times: the student leaves the teacher (reward "
        "hacking, or a fake score that lags behind). look: between. A reward gradient is ok up to 0.5 and bad above 1 times "
        "the distillation gradient. The gap does not reach 0, because the teacher is guided.",
        _gap,
    ),
    _Watched(
        "Loss of the fake score by thirds of t",
        {key: name.removeprefix("t ") for key, name in _THIRDS.items()},
        "ok: at the end at most 1.15 times the second fifth of the run, in every third. bad: above 1.5 times: the fake "
        "score no longer follows the student, and the DMD gradient is wrong; raise its learning rate or updates. look: "
        "between.",
        _fake_score,
    ),
    _Watched(
        "Gain of the target, R(target) - R(sample)",
        {"reward/gain": "gain"},
        "ok: the last fifth is at most two standard deviations below the middle of the run. bad: more than four: "
        "distillation and rewards disagree. look: between. A negative mean is normal: targets from late t are blurrier "
        "than the student's own image.",
        _gain,
    ),
    _Watched(
        "Reward spread within a group, of the whole spread",
        {SPREAD: "std within a group / std of all"},
        "ok: at the end the rewards of a group differ by at least 0.1 of what they differ over the batch. bad: by less than "
        "0.02: the rewards tell prompts apart, but not the images of one prompt; take another reward, or more noise "
        "between the images. look: between.",
        _group_spread,
    ),
)
