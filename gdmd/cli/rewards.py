"""``gdmd rewards``: the published reward models: list, fetch, convert, check, serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import Json, messages, print_json

rewards_app = typer.Typer(
    no_args_is_help=True,
    help="Reward models: list, fetch, convert, check, serve.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
Kind = Annotated[
    str, typer.Argument(metavar="KIND", help="clip, hps, hps_v2, pickscore, imagereward, aesthetic or ocr.")
]
TOKEN_VARIABLE = "GDMD_REWARD_TOKEN"


@rewards_app.command("list")
def list_command(json: Json = False) -> None:
    """Every published reward: formula, range, weights, and whether they are converted here.

    \b
    Examples:
      gdmd rewards list
      gdmd rewards list --json
    """
    from gdmd.programs.reward_tools import listing

    rows = listing()
    if json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['kind']:12} {row['about']}")
        ready = {None: "as published", "": f"to fetch: gdmd rewards fetch {row['kind']}"}.get(
            row["converted"], f"in {row['converted']}"
        )
        print(f"{'':12} range {row['range']}; {row['weights']}; {ready}")


@rewards_app.command("fetch")
def fetch_command(
    kind: Kind,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to; default: where recipes look.")
    ] = None,
) -> None:
    """Download the published weights at their pinned revision; a .pt is converted to safetensors and verified at once.

    \b
    Examples:
      gdmd rewards fetch hps              for rewards=[{kind: hps}]
      gdmd rewards fetch clip -o m/clip   for rewards=[{kind: clip, path: m/clip}]
    """
    from gdmd.programs.reward_tools import fetch

    path = fetch(kind, folder, _say)
    _say(f"ready: {path}; use it as {{kind: {kind}{f', path: {folder}' if folder else ''}}}")


@rewards_app.command("convert")
def convert_command(
    kind: Kind,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' .pt file.")],
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Where to; default: the rewards folder.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the pinned one.")] = None,
) -> None:
    """Convert a third-party .pt once to safetensors; only tensors are read from it.

    \b
    Examples:
      gdmd rewards convert hps HPS_v2.1_compressed.pt
      gdmd rewards convert imagereward ImageReward.pt --tokenizer models/bert-base-uncased -o models/imagereward
    """
    from gdmd.rewards.weights import published

    published(kind)
    from gdmd.rewards.convert import convert

    _say(f"converted to {convert(kind, file, folder, tokenizer)}")


@rewards_app.command("check")
def check_command(
    kind: Kind,
    path: Annotated[str | None, typer.Option(help="Folder or hub id of the weights; default: the pinned ones.")] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of CLIP, for aesthetic.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the scores to this golden file.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with this golden file; exit code 2 if not equal.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Allowed difference, relative to 1 + |score|.")] = 1e-3,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    json: Json = False,
) -> None:
    """Score five built-in images; record the scores once, or compare with recorded ones.

    \b
    Examples:
      gdmd rewards check clip --record golden/clip.json
      gdmd rewards check clip --against golden/clip.json
    """
    if record and against:
        raise ValueError("give --record or --against, not both")
    from gdmd.rewards.weights import published

    published(kind)
    from gdmd.programs.reward_tools import check

    given = {"path": path, "clip": clip}
    spec = {"kind": kind, **{key: value for key, value in given.items() if value is not None}}
    rows = check(spec, record, against, tolerance, device)
    if json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['pil']:10.5f} {row['tensor']:10.5f}  {row['prompt'][:60]!r}")
    _say(f"recorded in {record}" if record else f"equal to {against}" if against else "pil, tensor, prompt")


@rewards_app.command("serve")
def serve_command(
    rewards: Annotated[list[str], typer.Argument(metavar="KIND...", help="clip, hps, ..., or module:function.")],
    host: Annotated[str, typer.Option(help="Address; other than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 8766,
    device: Annotated[str, typer.Option(help="Where the rewards run.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Most images per request.")] = 64,
    megabytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 256,
    rate: Annotated[int, typer.Option(min=1, help="Requests per minute and client.")] = 600,
) -> None:
    """Serve rewards to trainings on other machines (a reward of kind remote there). JSON and PNG.

    \b
    The bearer token comes from GDMD_REWARD_TOKEN; without one only loopback addresses are served.
    Examples:
      gdmd rewards serve clip pickscore --device cuda
      GDMD_REWARD_TOKEN=$(openssl rand -hex 16) gdmd rewards serve hps --host 0.0.0.0
    """
    from gdmd.programs.reward_server import Limits, serve

    serve(rewards, host, port, device, os.environ.get(TOKEN_VARIABLE), Limits(batch, megabytes * 1_000_000, rate), _say)


def _say(text: str) -> None:
    messages().print(text, markup=False, highlight=False, soft_wrap=True)
