"""``gdmd rewards``: list, fetch, convert and serve reward models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gdmd.cli.common import SETTINGS, Device, Json, log, print_json

rewards_app = typer.Typer(
    no_args_is_help=True,
    help="Reward models: list, fetch, convert, serve.",
    context_settings=SETTINGS,
)
Kind = Annotated[
    str,
    typer.Argument(
        metavar="KIND", help="clip, hps, hps_v2, pickscore, imagereward, aesthetic, hpsv3, geneval2 or ocr."
    ),
]
TOKEN_VARIABLE = "GDMD_REWARD_TOKEN"


@rewards_app.command("list")
def list_command(json: Json = False) -> None:
    """List the pretrained rewards: formula, range and weights.

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


@rewards_app.command("fetch", short_help="Download published weights.")
def fetch_command(
    kind: Kind,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder; default: where recipes look.")
    ] = None,
) -> None:
    """Download published weights at their pinned revision; a file in another format is converted and verified.

    \b
    Examples:
      gdmd rewards fetch hps              for rewards=[{kind: hps}]
      gdmd rewards fetch clip -o m/clip   for rewards=[{kind: clip, path: m/clip}]
    """
    from gdmd.programs.reward_tools import fetch

    path = fetch(kind, folder, log)
    log(f"ready: {path}; use it as {{kind: {kind}{f', path: {folder}' if folder else ''}}}")


@rewards_app.command("convert", short_help="Convert a third-party file to safetensors for transformers.")
def convert_command(
    kind: Kind,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' file, .pt or .safetensors.")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder; default: where recipes look.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the published one, pinned.")] = None,
) -> None:
    """Convert a third-party file to safetensors for transformers; nothing but tensors is read from it.

    \b
    Examples:
      gdmd rewards convert hps HPS_v2.1_compressed.pt
      gdmd rewards convert imagereward ImageReward.pt -o models/imagereward
    """
    from gdmd.rewards.weights import pretrained_weights

    pretrained_weights(kind)
    from gdmd.rewards.convert import convert

    log(f"converted to {convert(kind, file, folder, tokenizer)}")


@rewards_app.command("serve", short_help="Serve rewards over HTTP.")
def serve_command(
    rewards: Annotated[list[str], typer.Argument(metavar="KIND...", help="clip, hps, ..., or module:function.")],
    host: Annotated[str, typer.Option(help="Address; any but a loopback address needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port.")] = 8766,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Maximum images per request.")] = 64,
    megabytes: Annotated[int, typer.Option(min=1, help="Maximum size of a request, in megabytes.")] = 256,
    rate: Annotated[int, typer.Option(min=1, help="Maximum requests per minute and client.")] = 600,
) -> None:
    """Serve rewards over HTTP to training runs on other machines, which name them with kind: remote.

    The bearer token is read from GDMD_REWARD_TOKEN; without one, only loopback addresses are allowed.

    \b
    Examples:
      gdmd rewards serve clip pickscore --device cuda
      export GDMD_REWARD_TOKEN=$(openssl rand -hex 16)
      gdmd rewards serve hps --host 0.0.0.0
    """
    from gdmd.programs.reward_server import Limits, serve

    serve(rewards, host, port, device, os.environ.get(TOKEN_VARIABLE), Limits(batch, megabytes * 1_000_000, rate), log)
