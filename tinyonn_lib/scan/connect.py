"""Open the store of a scan: on a given server, else on a private one that lives as long as the block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.store import Store


@contextmanager
def open_store(redis_url: str, folder: Path, scan_id: str) -> Iterator[Store]:
    """A store on `redis_url`, or, when that is empty, on a private server whose data live in `folder`.

    A password comes from the environment variable `TINYONN_REDIS_PASSWORD`, never from parameters: those are printed.
    """
    if redis_url:
        with Store(with_password(redis_url), scan_id) as store:
            yield store
    else:
        with private_server(folder) as server, Store(server.url, scan_id) as store:
            yield store


def with_password(url: str) -> str:
    """The URL with `TINYONN_REDIS_PASSWORD` put in, if that is set and the URL has none."""
    password, parts = os.environ.get("TINYONN_REDIS_PASSWORD"), urlsplit(url)
    if not password or parts.password:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()
