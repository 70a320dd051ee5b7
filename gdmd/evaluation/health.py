"""The health monitor of a run: which statistics to watch, and a sentence each on what healthy looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gdmd.reporting.plots import Metrics, curves, r_histogram


@dataclass(frozen=True)
class Panel:
    """A figure (SVG text) and what to look for in it."""

    title: str
    svg: str
    healthy: str


def health_panels(metrics: Metrics) -> list[Panel]:
    """The panels for which the run has logged values."""
    drawn = [Panel(title, curves(metrics, keys, title, unit), healthy) for title, keys, unit, healthy in _WATCHED]
    drawn.append(Panel("Histogram of r", r_histogram(metrics), _R_HEALTHY))
    return [panel for panel in drawn if panel.svg]


def training_curves(metrics: Metrics) -> list[str]:
    """Losses, rewards of sample and target (in all and by model), mean weight, share of r below one half."""
    losses = {"loss/student": "student", "loss/fake": "fake"}
    figures = [
        curves(metrics, losses, "Losses"),
        curves(metrics, {"reward/sample": "sample", "reward/target": "implicit target"}, "Reward, all models"),
        *(curves(metrics, _pair(name), f"Reward {name}") for name in reward_names(metrics)),
        curves(metrics, {"weight/mean": "mean weight w", "weight/r_mean": "mean r"}, "Weight of the DMD step"),
        curves(metrics, {"weight/effective": "(sum w)^2 / sum w^2"}, "Effective number of targets"),
        curves(metrics, {"weight/share_below_half": "r < 1/2", "weight/share_clipped": "r = 0 or 1"}, "Shares of r"),
        curves(metrics, {"speed/images_per_s": "images/s"}, "Training speed", "images / s"),
    ]
    return [figure for figure in figures if figure]


def reward_names(metrics: Metrics) -> list[str]:
    """The reward models a run was trained on, from its keys reward/NAME/sample and reward/NAME/target."""
    keys = dict.fromkeys(key for row in metrics for key in row)
    parts = [key.split("/") for key in keys]
    named = [part[1] for part in parts if len(part) == 3 and part[0] == "reward" and part[2] in ("sample", "target")]
    return list(dict.fromkeys(named))


def _pair(name: str) -> Mapping[str, str]:
    return {f"reward/{name}/sample": "sample", f"reward/{name}/target": "implicit target"}


_R_HEALTHY = (
    "Healthy: r spreads over several bins on both sides of 1/2 (dashed) and keeps doing so. One bright line at 1/2 means "
    "that the rewards cannot tell the targets from the sample; bright lines at 0 and 1 mean that Z is too small."
)
_WATCHED: Sequence[tuple[str, Mapping[str, str], str, str]] = (
    (
        "Latent mean and std",
        {"latent/mean": "mean", "latent/std": "std", "latent/scored_std": "std of what is scored"},
        "",
        "Healthy: after the first iterations the mean stays near 0 and the std near 1, the scale of the data's latents. "
        "A std that falls steadily is collapse to grey; one that climbs is over-saturation. The scored std should stay "
        "close to the sample's: far above it, the rewards judge pictures off the data manifold.",
    ),
    (
        "Gap to the teacher, mean |x0 - x0_real|",
        {
            "gap/real": "|x0 - x0_real|",
            "gap/grad": "rms of x0_fake - x0_real",
            "gap/pull": "rms of the rewards' gradient's part",
        },
        "",
        "Healthy: falls quickly, then flattens. It does not reach 0, because guidance keeps pulling; a rise after the "
        "plateau means that the student runs away from the teacher (reward hacking, or a fake that lags behind). "
        "With method.reward_gradient its part should stay well below the rms of x0_fake - x0_real.",
    ),
    (
        "Fake loss by thirds of t",
        {"fake_loss/t0": "t below 1/3", "fake_loss/t1": "1/3 to 2/3", "fake_loss/t2": "above 2/3"},
        "",
        "Healthy: three flat, ordered lines. A line that climbs means that the fake no longer follows the student there: "
        "the DMD gradient is then wrong; raise the fake's learning rate or its updates.",
    ),
    (
        "Gain of the target, R(target) - R(sample)",
        {"reward/gain": "gain"},
        "",
        "Healthy: near 0 without a sudden fall. Targets from late t are blurrier than the student's own picture, so a "
        "good student's mean gain lies below 0; what steers is how it differs between the targets of a group. A gain "
        "that keeps falling says that distillation and rewards pull apart, and that NaPO holds most steps back.",
    ),
)
