"""What is in a store, as tables: scans, shards, strongest units. Reads only."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.connection import Connection
from tinyonn_lib.scan.server import private_server, socket_path
from tinyonn_lib.scan.shards import Shard
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.tables import units_table


@contextmanager
def reading(folder: Path) -> Iterator[str]:
    """URL of a server with what the private server of `folder` holds, whatever that one is doing.

    A scan that runs now is asked over its socket. The data of one that does not run are copied first, so that it may
    start meanwhile.
    """
    url = f"unix://{quote(str(socket_path(folder.resolve())))}"
    connection = Connection(url, retry_seconds=0.0)
    with suppress(BenchError):
        connection.attempt(connection.redis.ping)
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tinyonn-") as copy:
        with suppress(FileNotFoundError):  # nothing was ever written
            shutil.copytree(folder / "appendonlydir", Path(copy) / "store" / "appendonlydir")
        with private_server(Path(copy) / "store") as server:
            yield server.url


def scan_ids(url: str) -> list[str]:
    """Names of the scans on a server, sorted."""
    connection = Connection(url, retry_seconds=1.0)
    found = connection.attempt(lambda: list(connection.redis.scan_iter("tinyonn:{*}:meta", count=1000)))
    return sorted(key.decode()[len("tinyonn:{") : -len("}:meta")] for key in found)


def scan_table(stores: list[Store]) -> pd.DataFrame:
    """One row per scan: `scan, done, samples, shards, complete, targets, units, bytes`."""
    rows = []
    for store in stores:
        layout, shards = store.layout(), store.shards()
        rows.append(
            {
                "scan": store.scan_id,
                "done": sum(shard.position - shard.samples.start for shard in shards),
                "samples": sum(len(shard.samples) for shard in shards),
                "shards": len(shards),
                "complete": sum(shard.complete for shard in shards),
                "targets": len(layout.targets) if layout else 0,
                "units": layout.units if layout else 0,
                "bytes": sum(_bytes(store, shard) for shard in shards),
            }
        )
    return pd.DataFrame(rows)


def shard_table(store: Store) -> pd.DataFrame:
    """One row per shard: `shard, first, last` (samples), `done, epoch, bytes`, `worker` (who holds it)."""
    return pd.DataFrame(
        {
            "shard": shard.number,
            "first": shard.samples.start,
            "last": shard.samples.stop - 1,
            "done": shard.position - shard.samples.start,
            "epoch": shard.epoch,
            "bytes": _bytes(store, shard),
            "worker": _worker(shard),
        }
        for shard in store.shards()
    )


def target_table(totals: Totals) -> pd.DataFrame:
    """One row per kind of target: `kind, targets, units, tokens, samples`."""
    rows = [
        {"kind": target.kind, "targets": 1, "units": target.rows, "tokens": int(tokens), "samples": int(samples)}
        for target, (tokens, samples, *_) in zip(totals.layout.targets, totals.counts, strict=True)
    ]
    ways = {"targets": "sum", "units": "sum", "tokens": "max", "samples": "max"}
    return pd.DataFrame(rows).groupby("kind", sort=False, as_index=False).agg(ways)


def strongest(totals: Totals, top: int) -> pd.DataFrame:
    """The `top` units of each kind by mean activity: `kind, target, row, act, freq, grad`."""
    units = units_table(totals).sort_values("act", ascending=False, kind="stable")
    return units.groupby("kind", sort=False).head(top)[["kind", "target", "row", "act", "freq", "grad"]]


def _bytes(store: Store, shard: Shard) -> int:
    redis = store.connection.redis
    return int(store.connection.attempt(lambda: redis.memory_usage(store.key(f"shard:{shard.number}"), samples=0)) or 0)


def _worker(shard: Shard) -> str:
    if shard.holder is None:
        return "done" if shard.complete else "-"
    return f"{shard.holder} (gone)" if shard.holder.dead() else str(shard.holder)
