"""Local path or hub id? And is the hub there? Answered within seconds, never by minutes of retries."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from tinyonn_lib.errors import BenchError

PROBE_SECONDS = 4.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".txt", ".safetensors", ".bin", ".gguf", ".csv")


def local_path(source: str, what: str) -> Path | None:
    """The path if `source` exists here, None if it can only be a hub id.

    Args:
        source: a path, or a hub id such as "owner/name" (for data sets also "owner/name:config:split").
        what: "model" or "dataset", for the message.

    Raises:
        BenchError: it looks like a path, and nothing is there.
    """
    if not isinstance(source, str) or not source.strip():
        raise BenchError(f"The {what} is empty: give a local path or a hub id such as owner/name.")
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source.split(":")[0] if what == "dataset" else source
    if name.lower().endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(name):
        raise BenchError(f"No such file or folder: {source} (nor is it a hub id such as owner/name).")
    return None


def require_hub(hub_id: str, what: str) -> None:
    """Return if the hub answers for `hub_id`; otherwise say how to do it offline.

    Raises:
        BenchError: HF_HUB_OFFLINE is set, nothing answers within about four seconds, or the hub knows no such id.
    """
    from huggingface_hub import constants

    kind = " --repo-type dataset" if what == "dataset" else ""
    name = hub_id.split("/")[-1]
    offline = (
        f"On a connected machine run 'hf download{kind} {hub_id} --local-dir {name}', copy the folder here and "
        f"give its path instead."
    )
    if _offline():
        raise BenchError(f"No local folder '{hub_id}', and HF_HUB_OFFLINE is set, so the hub is not asked. {offline}")
    answer = _asked(f"{constants.ENDPOINT}/api/{what}s/{hub_id}")
    if answer is None:
        raise BenchError(f"No local folder '{hub_id}', and the hub cannot be reached from here. {offline}")
    if answer in (401, 403, 404):
        raise BenchError(
            f"The hub has no {what} '{hub_id}' that we may read (status {answer}): check the spelling, or log in "
            "with 'hf auth login' if it is gated."
        )


def reachable() -> bool:
    """Whether the hub answers anything within about four seconds; False if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not _offline() and _asked(constants.ENDPOINT) is not None


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _asked(url: str) -> int | None:
    """The status that comes back, None if none does in time."""
    answer: list[int | None] = [None]
    # A thread, because the look-up of a name obeys no timeout.
    probe = threading.Thread(target=lambda: answer.__setitem__(0, _status(url)), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return answer[0]


def _status(url: str) -> int | None:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS - 1) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None
