"""Open the store of a scan: on a given server, else on a private one that lives as long as the block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyonn_lib.scan.server import private_server
from tinyonn_lib.scan.store import Store


@contextmanager
def open_store(redis_url: str, folder: Path, scan_id: str) -> Iterator[Store]:
    """A store on `redis_url`, or, when that is empty, on a private server whose data live in `folder`."""
    if redis_url:
        with Store(redis_url, scan_id) as store:
            yield store
    else:
        with private_server(folder) as server, Store(server.url, scan_id) as store:
            yield store
