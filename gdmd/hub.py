"""Probe the model hub once before loading from it, instead of waiting a minute for retries.

Libraries that read the hub try every file six times with growing pauses; if the hub does not answer, they read only
their cache. Heavy imports are local.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def hub_file(name: str, file: str, revision: str | None = None) -> Path:
    """A file of the repository ``name``, from the cache or downloaded. Raises the hub's errors; see ``hub_reason``."""
    import huggingface_hub

    cached_only = bool(unreachable(name, file, revision))
    return Path(huggingface_hub.hf_hub_download(name, file, revision=revision, local_files_only=cached_only))


@cache
def unreachable(name: str, file: str, revision: str | None = None) -> str:
    """Why the hub cannot be reached for a file, so that only its cache can be used; "" if it can.

    Raises the hub's definite answers: no such id, revision or file, or gated access.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if away := offline():
        return away
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=TIMEOUT)
    except RepositoryNotFoundError as error:  # unknown, private or gated; a cached file may still be used
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            raise
        return _first_line(error)
    except (RevisionNotFoundError, EntryNotFoundError):
        raise
    except (HfHubHTTPError, OSError, *transport_errors()) as error:
        return _first_line(error)
    return ""


@cache
def offline() -> str:
    """Why the hub does not answer at all, from one request per process; "" if it does."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except (OSError, *transport_errors()) as error:
        return f"{constants.ENDPOINT}: {_first_line(error)}"
    return ""


def hub_reason(error: Exception, file: str, revision: str | None = None, away: str = "") -> str:
    """The meaning and cure of an error of the hub, in a few words. away: the result of ``unreachable``."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "access is gated; accept its terms on the hub and run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}; give a branch, tag or commit"
        case errors.RepositoryNotFoundError():
            return "the hub has no such id (or it is private: run `hf auth login`)"
        case errors.LocalEntryNotFoundError():
            why = f" ({away})" if away else ""
            return (
                f"it is not in the cache, and the hub cannot be reached{why}; check the network, or give a local folder"
            )
        case errors.EntryNotFoundError():
            return f"it has no file {file}"
    return f"the hub cannot be read ({_first_line(error)}); try again, or give a local folder"


def transport_errors() -> tuple[type[Exception], ...]:
    """The errors of the HTTP library that this version of huggingface_hub uses."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx2", "httpx") if name in sys.modules)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
