"""``gdmd study``: a blind human preference study from image folders or models: plan, serve, analyze, simulate."""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from gdmd.cli.common import Json, messages, print_json
from gdmd.config.extras import install
from gdmd.config.study import ADDRESS, CONSENT, PORT, StudyConfig
from gdmd.io import typed

study_app = typer.Typer(
    no_args_is_help=True,
    help="Human preference study: plan, serve, analyze, simulate.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_SHOWN = 20  # links on the screen
TOKEN_VARIABLE = "GDMD_STUDY_TOKEN"
Study = Annotated[Path, typer.Argument(metavar="STUDY", help="The study folder.")]
Raters = Annotated[int, typer.Option(min=1, help="How many raters; each gets a link.")]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of images per rater.")]
Votes = Annotated[int, typer.Option(min=1, help="Raters per pair of images; 2 or more show their agreement.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed.")]


class Asked(StrEnum):
    """What is asked about each pair."""

    overall = "overall"
    quality = "quality"
    alignment = "alignment"


@study_app.command("plan")
def plan_command(
    models: Annotated[list[str], typer.Argument(metavar="NAME=FOLDER...", help="Two or more: images, or Shapes runs.")],
    study: Annotated[Path, typer.Option("--out", "-o", help="The study folder to write; must not exist.")],
    raters: Raters = 10,
    pairs: Pairs = 60,
    votes: Votes = 3,
    images: Annotated[int, typer.Option(min=1, help="Images per prompt and model.")] = 1,
    repeats: Annotated[int, typer.Option(min=0, help="Pairs shown again, for self-consistency.")] = 3,
    checks: Annotated[int, typer.Option(min=0, help="Attention checks.")] = 2,
    question: Annotated[list[Asked] | None, typer.Option(help="Asked of each pair; default: all three.")] = None,
    against: Annotated[str | None, typer.Option(metavar="NAME", help="Only this model against each other.")] = None,
    per_task: Annotated[int, typer.Option(min=1, help="Prompts per task, where only Shapes models are given.")] = 10,
    common: Annotated[bool, typer.Option("--common", help="Use the prompts that all models have.")] = False,
    consent: Annotated[Path | None, typer.Option(help="A text file: what raters agree to.")] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="Address at which raters reach the page; their links begin with it.")
    ] = ADDRESS,
    title: Annotated[
        str, typer.Option(help="What raters read on top; must not name a model.")
    ] = "Which image do you prefer?",
    seed: Seed = 0,
) -> None:
    """Write a blind study: who sees which images on which side; images under random names; one link per rater.

    \b
    A folder is in GenEval's layout (00000/metadata.jsonl, 00000/samples/*.png) or flat (prompts.jsonl and images);
    or it is a run of the Shapes world, or teacher, teacher-4, teacher-4-plain: then the images are drawn here.
      gdmd study plan ours=images/ours dmd2=images/dmd2 -o studies/one
      gdmd study plan ours=a dmd2=b sdxl=c -o studies/two --against ours --raters 20 --pairs 80 --question overall
      gdmd study plan student=runs/shapes-seed0 teacher -o studies/shapes --per-task 10
    """
    asked = tuple(dict.fromkeys(one.value for one in question)) if question else StudyConfig().questions
    cfg = _config(
        raters=raters, pairs_per_rater=pairs, votes_per_pair=votes, images_per_prompt=images, repeats=repeats,
        checks=checks, against=against, title=title, seed=seed, consent=_consent(consent), questions=asked,
    )  # fmt: skip
    _write_study(cfg, models, study, common, per_task, _checked_address(address))


@study_app.command("serve")
def serve_command(
    study: Study,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = a free one.")] = PORT,
    token_file: Annotated[Path | None, typer.Option(help="A file with the organizer's token.")] = None,
) -> None:
    """Serve the study until Ctrl-C. Votes are on disk before a rater sees the next pair.

    \b
    The organizer's token (progress, votes) comes from --token-file or GDMD_STUDY_TOKEN. On loopback one is made
    where none is given. Put a TLS proxy in front of any other address: tokens travel with every request.
    Examples:
      gdmd study serve studies/one
      GDMD_STUDY_TOKEN=$(openssl rand -hex 16) gdmd study serve studies/one --host 0.0.0.0
    """
    from gdmd.study.records import read_plan

    read_plan(study)
    serve = _web()
    token = _organizer_token(token_file)
    if token is None:
        if not serve.is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines, so the results need a token of yours; "
                f"set {TOKEN_VARIABLE} or give --token-file, or keep the default --host 127.0.0.1"
            )
        token = secrets.token_urlsafe(18)
        _say(f"organizer's token: {token}")
    serve.checked_token(token)
    listening = serve.listen(host, port)
    address = serve.address_of(listening)
    _say(f"serving {address}  (progress at {address}/api/progress with the organizer's token as a bearer token)")
    _say_links(study, address)
    serve.run_server(study, listening, token)


@study_app.command("analyze")
def analyze_command(
    study: Study,
    json: Json = False,
    report: Annotated[Path | None, typer.Option("--out", "-o", help="Report folder; default: STUDY/report.")] = None,
    max_failed: Annotated[int, typer.Option(min=0, help="Attention checks a rater may fail and still count.")] = 0,
    replicates: Annotated[int, typer.Option(min=200, help="Bootstrap replicates.")] = 2000,
) -> None:
    """Win rates, intervals, tests, Bradley-Terry scores, agreement, bias: report.html, report.md, figure, CSV, JSON.

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
    found = analyze(plan, votes, max_failed, replicates)
    path = write_report(found, votes, report or study / "report")
    if json:
        print_json(found.json())
    else:
        _print_pairs(found)
    _say(f"report: {path}")


@study_app.command("simulate")
def simulate_command(
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="A planned study; default: a made-up one.")
    ] = None,
    json: Json = False,
    win_rate: Annotated[float, typer.Option(help="True win rate of the first model.")] = 0.6,
    tie_rate: Annotated[float, typer.Option(help="True share of ties.")] = 0.15,
    left_bias: Annotated[float, typer.Option(help="Share of votes given to the left image without looking.")] = 0.0,
    careless: Annotated[float, typer.Option(help="Share of raters who answer by chance.")] = 0.0,
    spread: Annotated[float, typer.Option(help="How much prompts and raters differ, in logits.")] = 0.0,
    raters: Raters = 10,
    pairs: Pairs = 60,
    votes: Votes = 3,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a made-up study.")] = 200,
    studies: Annotated[int, typer.Option(min=1, max=10_000, help="How many studies are simulated.")] = 100,
    seed: Seed = 0,
) -> None:
    """Ask simulated raters with a known taste: does the analysis find it, and how often with these numbers?

    \b
    The votes of a real study are never touched.
    Examples:
      gdmd study simulate --win-rate 0.55 --raters 20 --pairs 60
      gdmd study simulate studies/one --win-rate 0.6 --spread 0.5
    """
    from gdmd.study.records import read_plan
    from gdmd.study.report import plain_table
    from gdmd.study.simulate import recovery, synthetic_plan, taste_of

    taste = taste_of(win_rate, tie_rate, left_bias, careless, spread)
    if study is None:
        cfg = _config(raters=raters, pairs_per_rater=pairs, votes_per_pair=votes, seed=seed, questions=("overall",))
        plan = synthetic_plan(cfg, ("first", "second"), prompts)
    else:
        plan = read_plan(study)
    found = recovery(plan, taste, studies, seed)
    if json:
        print_json(vars(found))
        return
    print(plain_table(_recovered(found)))


def _recovered(found: Any) -> dict[str, str]:
    return {
        "true win rate among decided votes": f"{found.truth:.3f}",
        f"mean of {found.studies} simulated studies": f"{found.mean_win_rate:.3f}",
        "Wilson interval holds it": f"{found.wilson_covered:.0%}",
        "clustered interval holds the score": f"{found.clustered_covered:.0%}",
        "sign test p < .05, right side": f"{found.found:.0%}",
    }


def _say_links(study: Path, address: str) -> None:
    """The links to send to the raters; of a large study the first ones."""
    from gdmd.study.records import LINKS

    links = _web().served_links(study, address)
    for number, one in enumerate(links[:_SHOWN]):
        _say(f"rater {number}: {one}")
    if len(links) > _SHOWN:
        _say(f"and {len(links) - _SHOWN} more in {study / LINKS}")


def _checked_address(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"--address {address!r} is not an address; write it like https://study.example.org")
    return address


def _write_study(cfg: StudyConfig, models: list[str], study: Path, common: bool, per_task: int, address: str) -> None:
    from gdmd.study.design import votes_needed
    from gdmd.study.draw_images import draw_models
    from gdmd.study.folders import named_folders
    from gdmd.study.prepare import check_new, link, prepare
    from gdmd.study.records import LINKS

    check_new(study)
    with TemporaryDirectory(prefix="gdmd-study-") as place:
        folders = draw_models(named_folders(models), per_task, cfg.images_per_prompt, cfg.seed, Path(place))
        prepared = prepare(cfg, folders, study, common, address)
    for warning in prepared.warnings:
        _say(f"warning: {warning}")
    screens = len(prepared.plan.raters[0].trials)
    _say(f"{cfg.raters} raters x {screens} screens: {prepared.votes_per_duel} votes per model pair and question")
    _say(f"(a true win rate of 55 % needs {votes_needed(0.55)} decided votes, 60 % needs {votes_needed(0.6)})")
    first = link(address, prepared.tokens[0])
    _say(f"links: {study / LINKS}, one per rater, such as {first}; now: gdmd study serve {typed(study)}")


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


def _organizer_token(path: Path | None) -> str | None:
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

    from gdmd.study.report import result_table

    Console().print(result_table(found.pairs).rich())


def _say(text: str) -> None:
    messages().print(text, markup=False, highlight=False, soft_wrap=True)
