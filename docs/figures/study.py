"""Draws the figures of docs/guides/human-study.md: ``python docs/figures/study.py STUDY`` with a study of Shapes models.

    gdmd study plan "50 guided steps=teacher" "4 guided steps=teacher-4" "4 plain steps=teacher-4-plain" \\
        -o STUDY --raters 12 --pairs 45

The votes are simulated: alignment follows the checker's partial credit of the two images, quality the preference
scorer, overall their mean, each with noise. Needs the shipped assets, Chromium and chromedriver.
"""

import csv
import hashlib
import math
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from study_world import Server  # noqa: E402
from webdriver import Browser  # noqa: E402

from gdmd.config.run import ShapesReward  # noqa: E402
from gdmd.data.prompts import batch_of  # noqa: E402
from gdmd.recipes.build_rewards import build_rewards  # noqa: E402
from gdmd.rewards.preprocessing import from_pil  # noqa: E402
from gdmd.study.analyze import analyze  # noqa: E402
from gdmd.study.records import IMAGES, LINKS, VOTES, Plan, Trial, read_plan, votes_of  # noqa: E402
from gdmd.study.report import write_report  # noqa: E402
from gdmd.study.store import Store  # noqa: E402

FOLDER = Path(__file__).parents[1] / "img"
SHOWN = 17
"""Screens of the first rater that are answered before the screenshot."""
READY = "return !document.querySelector('#screen').hidden && document.querySelectorAll('.side img.ready').length === 2"


class NoText:
    """A text encoder that encodes nothing: the scorers read the captions themselves."""

    def encode(self, texts: object) -> dict[str, torch.Tensor]:
        return {"none": torch.zeros(1)}

    def null(self, count: int) -> dict[str, torch.Tensor]:
        return {}


def scores(plan: Plan, study: Path) -> dict[str, tuple[float, float]]:
    """(partial credit, preference score) of every image of the study, by its random name."""
    texts = {name: plan.prompts[t.prompt].text for r in plan.raters for t in r.trials for name in (t.left, t.right)}
    pixels = from_pil([Image.open(study / IMAGES / f"{name}.png") for name in texts])
    rewards = build_rewards([ShapesReward(kind="shapes_partial_credit"), ShapesReward(kind="shapes_pref")])
    with torch.no_grad():
        both = [reward.score(pixels, batch_of(tuple(texts.values()), NoText())).tolist() for reward in rewards]
    return dict(zip(texts, zip(*both, strict=True), strict=True))


def answer(gain: float, trial: Trial, rng: random.Random) -> str:
    """What a simulated rater says: about the same for a small gain, else the better side, now and then the other."""
    if trial.expected is not None:
        return trial.expected
    seen = gain + rng.gauss(0, 0.25)
    return "tie" if abs(seen) < 0.12 else "left" if seen > 0 else "right"


def vote(plan: Plan, study: Path) -> None:
    """Store all answers of all raters, except those on the first rater's last screens."""
    known, rng, store = scores(plan, study), random.Random(5), Store(study / VOTES)
    for number, rater in enumerate(plan.raters):
        store.consent(number, hashlib.sha256(plan.consent.encode()).hexdigest())
        for trial in rater.trials[: SHOWN if number == 0 else None]:
            (credit, beauty), (credit_right, beauty_right) = known[trial.left], known[trial.right]
            fits, looks = credit - credit_right, math.tanh(beauty - beauty_right)
            gains = {"overall": (fits + looks) / 2, "quality": looks, "alignment": fits}
            given = {question: answer(gains[question], trial, rng) for question in plan.questions}
            store.vote(number, trial.id, given, rng.randrange(2000, 9000))
    store.close()


def main() -> None:
    """The rating page in the middle of a study, and the analysis of the simulated votes."""
    torch.set_num_threads(1)
    study = Path(sys.argv[1])
    plan = read_plan(study)
    with (study / LINKS).open() as file:
        token = next(csv.DictReader(file))["token"]
    vote(plan, study)
    store = Store(study / VOTES)
    votes = votes_of(plan, store.rows())
    store.close()
    found = replace(analyze(plan, votes), title="Simulated raters, Shapes teacher")
    page = write_report(found, votes, study / "report")
    server = Server(study)
    window = Browser(Path(tempfile.mkdtemp()) / "profile", ["--window-size=1120,900"])
    try:
        window.open(f"{server.url}/#token={token}")
        window.until(READY, 60)
        window.press("left", "down")
        time.sleep(2)  # the page fades in
        window.screenshot(FOLDER / "study_page.png")
        window.send("POST", window.session + "/window/rect", {"width": 1180, "height": 1290})
        window.open(page.resolve().as_uri())
        window.until("return document.readyState === 'complete'", 60)
        window.screenshot(FOLDER / "study_report.png")
    finally:
        window.close()
        server.kill()
    for name in ("study_page", "study_report"):
        image = Image.open(FOLDER / f"{name}.png").convert("RGB").quantize(128, dither=Image.Dither.NONE)
        image.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
