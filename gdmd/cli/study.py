"""``gdmd study``: a blind human preference study of image folders or Shapes models: plan, serve, analyze, simulate."""

from __future__ import annotations

import math
import os
import secrets
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from gdmd.cli.common import SETTINGS, Json, log, messages, print_json
from gdmd.config.extras import install
from gdmd.config.study import ADDRESS, CONSENT, PORT, StudyConfig
from gdmd.io import address_of, is_loopback, listen, typed
from gdmd.reporting.progress_bar import phase

study_app = typer.Typer(
    no_args_is_help=True,
    help="Blind human preference study: plan, serve, analyze, simulate.",
    context_settings=SETTINGS,
)

WIDTH = 12
"""Characters of a column of the results."""
MAX_LINKS = 20
"""Links that ``serve`` prints."""
TOKEN_VARIABLE = "GDMD_STUDY_TOKEN"
Study = Annotated[Path, typer.Argument(metavar="STUDY", help="The study folder.")]
Raters = Annotated[int, typer.Option(min=1, help="Number of raters; each gets a link.")]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of images per rater.")]
Votes = Annotated[int, typer.Option(min=1, help="Raters per image pair; their agreement needs 2 or more.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed.")]


_HYPOTHETICAL = "of a hypothetical study; default"


class QuestionName(StrEnum):
    """A question about each pair."""

    overall = "overall"
    quality = "quality"
    alignment = "alignment"


@study_app.command("plan", short_help="Write a blind study: plan, images, links for raters.")
def plan_command(
    models: Annotated[
        list[str], typer.Argument(metavar="NAME=FOLDER...", help="Two or more image folders or Shapes runs.")
    ],
    study: Annotated[Path, typer.Option("--out", "-o", help="The study folder to write; must not exist.")],
    raters: Raters = 10,
    pairs: Pairs = 60,
    votes: Votes = 3,
    images: Annotated[int, typer.Option(min=1, help="Images per prompt and model.")] = 1,
    repeats: Annotated[int, typer.Option(min=0, help="Pairs shown twice, for self-consistency.")] = 3,
    checks: Annotated[int, typer.Option(min=0, help="Attention checks per rater.")] = 2,
    question: Annotated[
        list[QuestionName] | None, typer.Option(help="Question about each pair; may be repeated; default: all.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare only this model with each other one.")
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="Prompts per task if only Shapes models are given; default: 10.")
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Use only the prompts that all models have.")] = False,
    consent: Annotated[Path | None, typer.Option(help="A text file that raters agree to.")] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="Address of the page for raters; their links begin with it.")
    ] = ADDRESS,
    title: Annotated[
        str, typer.Option(help="Title of the page; must not name a model.")
    ] = "Which image do you prefer?",
    seed: Seed = 0,
) -> None:
    """Write a blind study: who sees which images, on which side; images under random names; a link per rater.

    An image folder has GenEval's layout (00000/metadata.jsonl, 00000/samples/*.png) or is flat (prompts.jsonl and
    images). For a Shapes run, teacher, teacher-4 or teacher-4-plain the images are generated now.

    \b
    Examples:
      gdmd study plan ours=images/ours dmd2=images/dmd2 -o studies/one
      gdmd study plan ours=a dmd2=b sdxl=c -o studies/two --against ours
      gdmd study plan student=runs/shapes-seed0 teacher -o studies/shapes
    """
    questions = tuple(dict.fromkeys(one.value for one in question)) if question else StudyConfig().questions
    cfg = _config(
        raters=raters, pairs_per_rater=pairs, votes_per_pair=votes, images_per_prompt=images, repeats=repeats,
        checks=checks, against=against, title=title, seed=seed, consent=_consent(consent), questions=questions,
    )  # fmt: skip
    _write_study(cfg, models, study, common, per_task, _checked_address(address))


@study_app.command("serve", short_help="Serve the study until Ctrl-C.")
def serve_command(
    study: Study,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = a free one.")] = PORT,
    token_file: Annotated[Path | None, typer.Option(help="A file with the admin token.")] = None,
) -> None:
    """Serve the study until Ctrl-C. Votes are on disk before a rater sees the next pair.

    The admin token, which gives access to progress and votes, comes from --token-file or GDMD_STUDY_TOKEN. On loopback
    addresses one is generated if none is given. Put a TLS proxy in front of any other address: every request carries a
    token.

    \b
    Examples:
      gdmd study serve studies/one
      export GDMD_STUDY_TOKEN=$(openssl rand -hex 16)
      gdmd study serve studies/one --host 0.0.0.0
    """
    from gdmd.study.records import read_plan

    read_plan(study)
    serve = _web()
    token = _admin_token(token_file)
    if token is None:
        if not is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines, so the results need an admin token: "
                f"set {TOKEN_VARIABLE} or give --token-file, or keep the default --host 127.0.0.1"
            )
        token = secrets.token_urlsafe(18)
        log(f"admin token: {token}")
    serve.checked_token(token)
    listening = listen(host, port)
    address = address_of(listening)
    log(f"serving {address}  (progress: {address}/api/progress with the admin token as bearer token)")
    _log_links(study, address)
    serve.run_server(study, listening, token)


@study_app.command("analyze", short_help="Analyze the votes and write a report.")
def analyze_command(
    study: Study,
    json: Json = False,
    report: Annotated[Path | None, typer.Option("--out", "-o", help="Report folder; default: STUDY/report.")] = None,
    max_failed: Annotated[int, typer.Option(min=0, help="Attention checks that a rater may fail.")] = 0,
    replicates: Annotated[int, typer.Option(min=200, help="Bootstrap replicates.")] = 2000,
) -> None:
    """Win rates with intervals and tests, Bradley-Terry scores, agreement, bias; as HTML, Markdown, CSV, figure.

    \b
    Examples:
      gdmd study analyze studies/one
      gdmd study analyze studies/one --json
    """
    from gdmd.study.analyze import analyze
    from gdmd.study.records import VOTES, read_plan, votes_of
    from gdmd.study.report import write_report
    from gdmd.study.store import Store

    plan = read_plan(study)
    if not (study / VOTES).is_file():
        raise ValueError(f"{study} has no votes yet; serve it first: gdmd study serve {typed(study)}")
    store = Store(study / VOTES)
    votes = votes_of(plan, store.rows())
    store.close()
    with phase(f"analyzing {len(votes)} votes", messages(), plain=False):
        found = analyze(plan, votes, max_failed, replicates)
    path = write_report(found, votes, report or study / "report")
    if json:
        print_json(found.json())
    else:
        _print_pairs(found)
    log(f"report: {path}")


@study_app.command("simulate", short_help="Simulate raters: what can a study detect?")
def simulate_command(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="A planned study; default: a hypothetical one.")
    ] = None,
    json: Json = False,
    win_rate: Annotated[float, typer.Option(help="True win rate of the first model.")] = 0.6,
    tie_rate: Annotated[float, typer.Option(help="True share of ties.")] = 0.15,
    left_bias: Annotated[float, typer.Option(help="Share of votes for the left image, cast without looking.")] = 0.0,
    careless: Annotated[float, typer.Option(help="Share of raters who answer at random.")] = 0.0,
    spread: Annotated[float, typer.Option(help="Standard deviation over prompts and raters, in logits.")] = 0.0,
    raters: Annotated[int | None, typer.Option(min=1, help=f"Raters {_HYPOTHETICAL}: 10.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help=f"Pairs of images per rater {_HYPOTHETICAL}: 60.")] = None,
    votes: Annotated[int | None, typer.Option(min=1, help=f"Raters per image pair {_HYPOTHETICAL}: 3.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help=f"Prompts {_HYPOTHETICAL}: 200.")] = None,
    studies: Annotated[int, typer.Option(min=1, max=10_000, help="Number of simulated studies.")] = 100,
    seed: Seed = 0,
) -> None:
    """Simulate raters with known preferences: how often does the analysis detect them, with these numbers?

    The votes of a real study are not touched.

    \b
    Examples:
      gdmd study simulate --win-rate 0.55 --raters 20 --pairs 60
      gdmd study simulate studies/one --win-rate 0.6 --spread 0.5
    """
    from gdmd.study.records import read_plan
    from gdmd.study.report import plain_table
    from gdmd.study.simulate import rater_model_of, recovery, synthetic_plan

    rater_model = rater_model_of(win_rate, tie_rate, left_bias, careless, spread)
    numbers = {"raters": raters, "pairs_per_rater": pairs, "votes_per_pair": votes, "prompts": prompts}
    given = {name: number for name, number in numbers.items() if number is not None}
    if study is None:
        prompts = given.pop("prompts", 200)
        usual = StudyConfig()
        repeats = min(usual.repeats, given.get("pairs_per_rater", usual.pairs_per_rater))
        cfg = _config(**given, repeats=repeats, seed=seed, questions=("overall",))
        plan = synthetic_plan(cfg, ("first", "second"), prompts)
    elif given:
        names = ", ".join(f"--{name.partition('_')[0]}" for name in given)
        raise ValueError(f"{names}: {study} has its own numbers; leave these out, or the study for a hypothetical one")
    else:
        plan = read_plan(study)
    found = recovery(plan, rater_model, studies, seed)
    if json:
        print_json(vars(found))
        return
    print(plain_table(_recovered(found)))


def _recovered(found: Any) -> dict[str, str]:
    covered = found.clustered_covered
    return {
        "true win rate among decided votes": f"{found.truth:.3f}",
        f"mean of {found.studies - found.lost} simulated studies": f"{found.mean_win_rate:.3f}",
        "Wilson interval contains it": f"{found.wilson_covered:.0%}",
        "clustered interval contains the score": "no interval" if math.isnan(covered) else f"{covered:.0%}",
        "sign test p < .05, correct side": f"{found.found:.0%}",
    } | ({"no decided vote, or no rater who passed the checks": f"{found.lost} studies"} if found.lost else {})


def _log_links(study: Path, address: str) -> None:
    """Print the links for the raters; only the first ones of a large study."""
    from gdmd.study.records import LINKS

    links = _web().served_links(study, address)
    for number, address in enumerate(links[:MAX_LINKS]):
        log(f"rater {number}: {address}")
    if len(links) > MAX_LINKS:
        log(f"and {len(links) - MAX_LINKS} more in {study / LINKS}")


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"--address {address!r} is not an address; write it like https://study.example.org")
    return address


def _write_study(
    cfg: StudyConfig, models: list[str], study: Path, common: bool, per_task: int | None, address: str
) -> None:
    from gdmd.study.design import votes_needed
    from gdmd.study.draw_images import draw_models
    from gdmd.study.folders import named_folders
    from gdmd.study.prepare import check_new, link, prepare
    from gdmd.study.records import LINKS

    check_new(study)
    with TemporaryDirectory(prefix="gdmd-study-") as temporary:
        folders = draw_models(named_folders(models), per_task, cfg.images_per_prompt, cfg.seed, Path(temporary))
        prepared = prepare(cfg, folders, study, common, address)
    for warning in prepared.warnings:
        log(f"warning: {warning}")
    screens = len(prepared.plan.raters[0].trials)
    log(f"{cfg.raters} raters x {screens} screens: {prepared.votes_per_model_pair} votes per model pair and question")
    log(f"(a true win rate of 55 % needs {votes_needed(0.55)} decided votes, 60 % needs {votes_needed(0.6)})")
    first = link(address, prepared.tokens[0])
    log(f"links: {study / LINKS}, one per rater, such as {first}; now: gdmd study serve {typed(study)}")


def _config(**fields: Any) -> StudyConfig:
    from gdmd.config.load import validated

    config: StudyConfig = validated(StudyConfig, fields, "study")
    return config


def _consent(path: Path | None) -> str:
    if path is None:
        return CONSENT
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the consent text {path}: {error}; give a UTF-8 text file") from error


def _admin_token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the token file {path}: {error}; write the token into it") from error


def _web() -> Any:
    try:
        from gdmd.study import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs {error.name}, which is not installed; do: {install('study')}") from error
    return serve


def _print_pairs(found: Any) -> None:
    from rich.console import Console

    from gdmd.study.report import pair_tables

    console = Console()
    for models, table in pair_tables(found.pairs).items():
        console.print(models, markup=False, highlight=False)
        console.print(table.rich(width=WIDTH))
    console.print("[low, high]: 95 % over prompts and raters; of the win rate Wilson's interval.", markup=False)
