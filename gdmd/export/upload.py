"""Upload an exported student to the Hugging Face Hub, and check beforehand that it can be uploaded.

No message contains a token: errors of the client are reworded and not chained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.hub import offline, transport_errors
from gdmd.io import RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "run `hf auth login` with a token that has write access, or set HF_TOKEN"


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder to the model repository ``repo_id`` (ORG/NAME), which is created if needed; returns its URL.

    Files of the same name are replaced, others stay. After an interruption, the same call sends only what is missing.
    ``private``: of a new repository; default: the organization's. ``token``: default: that of ``hf auth login`` or HF_TOKEN.
    RunError if the Hub refuses, ValueError for a wrong id.
    """
    from gdmd._version import __version__

    if not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        raise RunError(f"{folder} is not a folder with files; give one that `gdmd export` wrote.")
    api = _client(repo_id, token)
    with _explained(repo_id, str(api.token)):
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload a student with gdmd {__version__}",
            ignore_patterns=["*.partial"],
        )
    return url


def push_checkpoint(checkpoint: Path, repo_id: str) -> None:
    """Upload RUN/checkpoints/step_STEP, in place of the checkpoint that is there, and what resuming needs.

    A new repository is private. ``hf download ORG/NAME --local-dir RUN`` and ``gdmd train --resume RUN`` continue from
    it on another machine. The Hub's history keeps the checkpoints that were replaced.
    """
    run, api = checkpoint.parents[1], _client(repo_id, None)
    facts = ["config.yaml", "run.json", "metrics.jsonl"]
    with _explained(repo_id, str(api.token)):
        api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=run,
            allow_patterns=[*facts, f"checkpoints/{checkpoint.name}/*"],
            delete_patterns=["checkpoints/*"],
            commit_message=f"Upload {checkpoint.name}",
        )


def check_hub_target(repo_id: str, token: str | None = None) -> None:
    """Check, before anything is trained or exported, that ``push_to_hub`` can upload to ``repo_id``.

    ValueError for a wrong id, RunError if the Hub does not answer, nobody is logged in, or the user cannot write there.
    """
    api = _client(repo_id, token)
    with _explained(repo_id, str(api.token)):
        account = api.whoami()
    if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise RunError(f"cannot upload to {repo_id}: the token is read-only; {LOGIN}.")
    name, owner = account.get("name"), repo_id.partition("/")[0]
    roles = {str(org.get("name")).lower(): org.get("roleInOrg") for org in account.get("orgs") or ()}
    if owner.lower() == str(name).lower():
        return
    if owner.lower() not in roles:
        known = ", ".join([str(name), *(str(org.get("name")) for org in account.get("orgs") or ())])
        raise RunError(f"cannot upload to {repo_id}: {name} is not a member of {owner}; use one of {known}.")
    if roles[owner.lower()] == "read":
        raise RunError(
            f"cannot upload to {repo_id}: {name} can only read from {owner}; ask its owner for write access."
        )


def check_repo_id(repo_id: str) -> None:
    """ValueError unless ``repo_id`` is ORG/NAME as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if found := re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)/?$", repo_id):
        raise ValueError(f"hub id {repo_id!r} is an address; give {found[1]}")
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"{repo_id!r} is not a hub id; give ORG/NAME, each of letters, digits, '-', '_' and '.', at most 96 characters"
        )


def _client(repo_id: str, token: str | None) -> HfApi:
    """The Hub's client. ValueError for a wrong id; RunError without a token, or if the Hub does not answer."""
    check_repo_id(repo_id)
    from huggingface_hub import HfApi, get_token

    offline.cache_clear()  # hours of training may lie between two uploads
    if away := offline():
        raise RunError(f"cannot upload to {repo_id}: {away}. Connect to the Hub, then `gdmd export RUN --push-to-hub`.")
    found = (token or get_token() or "").strip()
    if not found:
        raise RunError(f"cannot upload to {repo_id}: nobody is logged in; {LOGIN}.")
    if not re.fullmatch(r"[!-~]+", found):  # the HTTP client's error would print it
        raise RunError(f"cannot upload to {repo_id}: the token has a space or a special character; copy it again.")
    return HfApi(token=found)


@contextmanager
def _explained(repo_id: str, token: str) -> Iterator[None]:
    """Errors of the Hub and of its client as RunError. They are not chained: the request in them contains the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        reason = _reason(error)
    except RuntimeError as error:  # of one large file, raised from the Hub's answer
        reason = _reason(error.__cause__) if error.__cause__ else "a file was not accepted; try again"
    except ValueError as error:  # among them: metadata of README.md that the Hub does not accept
        reason = " ".join(str(error).split()).rstrip(".")
    except (OSError, *transport_errors()) as error:
        reason = f"the connection failed ({type(error).__name__}); the same command continues the upload"
    else:
        return
    raise RunError(f"cannot upload to {repo_id}: {reason}.".replace(token, "***")) from None


def _reason(error: Any) -> str:
    """The meaning and cure of the Hub's answer, by its status."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known: Mapping[int | None, str] = {
        401: f"the Hub does not accept the token; {LOGIN}",
        403: "the token cannot write there; give it write access, or use another ORG/NAME",
        404: "the user or organization does not exist, or the token cannot access it; check ORG/NAME",
        409: "the repository changed during the upload; try again",
        413: "a file is too large for the Hub; export a LoRA, or shard the weights",
        429: "the Hub asks to wait (too many requests); the same command continues the upload",
    }
    if status in known:
        return known[status]
    said = " ".join((getattr(error, "server_message", None) or type(error).__name__).split()).rstrip(".")
    return f"the Hub answered {status or 'nothing'} ({said}); the same command continues the upload"
