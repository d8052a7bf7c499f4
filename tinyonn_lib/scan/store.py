"""Where a scan keeps its totals: any Redis-protocol server, one hash per worker, absolute values.

A worker writes all it has so far (not what is new), its position in the data and an epoch in one MULTI/EXEC.
That is idempotent: killed before it, the last epoch stands; killed after it, the new one does; sent twice, the same.
Readers add the workers up. Layout (docs: `tinyonn:{SCAN}:...`, braces keep one scan on one cluster node):

- `tinyonn:{SCAN}:meta`      hash: `fingerprint`, `layout`, `share:W` (JSON)
- `tinyonn:{SCAN}:workers`   set of worker names
- `tinyonn:{SCAN}:worker:W`  hash: `epoch`, `position`, `counts`, and one field `LAYER/STATISTIC` per packed row;
  rows and counts are little-endian float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.connection import Connection
from tinyonn_lib.scan.statistics import COUNTERS, LAYOUT_VERSION, STATISTICS, Layout, Totals, merge

_FLOAT = np.dtype("<f8")


class Store:
    """Totals of one scan on a Redis-protocol server.

    Args:
        where: a redis URL (`redis://`, `rediss://`, `unix://`) or the path of a unix socket.
        scan_id: name of the scan on that server; letters, digits and `._-/` only.
        retry_seconds: how long a lost connection is retried before giving up.

    Raises:
        BenchError: URL that cannot be understood; from every method when the server cannot be reached,
            refuses the password, or refuses the write. Passwords never appear in messages.
    """

    def __init__(self, where: str | Path, scan_id: str, *, retry_seconds: float = 10.0) -> None:
        if not scan_id or not all(c.isalnum() or c in "._-/" for c in scan_id):
            raise BenchError(f"scan id {scan_id!r}: use letters, digits and . _ - / only")
        self.scan_id = scan_id
        self._connection = Connection(where, retry_seconds)
        self._redis = self._connection.redis
        self._try = self._connection.attempt
        self._epochs: dict[str, int] = {}

    @property
    def address(self) -> str:
        """The URL without password, fit for messages and manifests."""
        return self._connection.address

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; the data stay."""
        self._redis.close()

    def begin(self, layout: Layout, fingerprint: Mapping[str, object], *, worker: str = "", share: str = "") -> None:
        """Start the scan, or make sure that it may be continued.

        Args:
            layout: layers, widths, rho.
            fingerprint: JSON-able facts that must not change within a scan (model, data, parameters).
            worker, share: name of this worker and hash of its share of the samples, which must not change either.

        Raises:
            BenchError: the scan exists with another fingerprint or layout; the line names what differs.
        """
        wanted = {
            "fingerprint": json.dumps(dict(fingerprint), sort_keys=True, default=str),
            "layout": json.dumps(layout.describe(), sort_keys=True),
        }
        if share:
            wanted[f"share:{worker}"] = json.dumps({"samples": share})

        def attempt() -> dict[bytes, bytes]:
            with self._redis.pipeline(transaction=True) as pipe:
                for field, value in wanted.items():
                    pipe.hsetnx(self._key("meta"), field, value)
                pipe.hgetall(self._key("meta"))
                found: dict[bytes, bytes] = pipe.execute()[-1]
            return found

        found = self._try(attempt)
        for field, value in wanted.items():
            there = found[field.encode()].decode()
            if there != value:
                changed = _difference(json.loads(there), json.loads(value))
                raise BenchError(
                    f"scan {self.scan_id!r} cannot be continued, {changed}: go back to the old values, or start a new "
                    "scan (another run folder or scan id)"
                )

    def commit(self, worker: str, totals: Totals, position: int) -> int:
        """Write a worker's absolute totals and its position, all or nothing.

        Args:
            worker: name of the worker.
            totals: everything this worker has counted since the scan began.
            position: samples that are in `totals`; the next one to scan.

        Returns:
            The new epoch, 1 for the first commit.

        Raises:
            BenchError: no connection within `retry_seconds` (the line says up to where all is safe), or
                another process writes as the same worker.
        """
        import redis

        key = self._key(f"worker:{worker}")
        before = self._epochs.get(worker, 0)
        fields: dict[str, Any] = {"epoch": before + 1, "position": position, "counts": _pack(totals.counts)}
        for row, (layer, width) in enumerate(zip(totals.layout.layers, totals.layout.widths, strict=True)):
            for column, name in enumerate(STATISTICS):
                fields[f"{layer}/{name}"] = _pack(totals.sums[row, column, :width])

        def attempt() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.watch(key)
                there = int(pipe.hget(key, "epoch") or 0)
                if there == before + 1 and attempts:
                    return  # the answer to an earlier attempt was lost, the write was not
                if there != before:
                    raise BenchError(
                        f"scan {self.scan_id!r}: epoch {there} of worker {worker!r} was written by another process; "
                        "stop it, or give each worker its own name"
                    )
                attempts.append(1)
                pipe.multi()
                pipe.hset(key, mapping=fields)
                pipe.sadd(self._key("workers"), worker)
                pipe.execute()

        attempts: list[int] = []
        safe = f"everything up to epoch {before} is safe" if before else "nothing was committed yet"
        try:
            self._try(attempt, safe=safe)
        except redis.WatchError:
            raise BenchError(f"scan {self.scan_id!r}: two processes write as worker {worker!r}; stop one") from None
        self._epochs[worker] = before + 1
        return before + 1

    def resume(self, worker: str) -> tuple[Totals, int, int] | None:
        """(totals, position, epoch) of the worker's last commit, None when it has none yet."""
        layout = self.layout()
        state = self._try(lambda: self._redis.hgetall(self._key(f"worker:{worker}")))
        if not state or layout is None:
            self._epochs[worker] = 0
            return None
        self._epochs[worker] = int(state[b"epoch"])
        return _unpack(layout, state), int(state[b"position"]), self._epochs[worker]

    def layout(self) -> Layout | None:
        """The layout the scan was begun with, None when it was not begun.

        Raises:
            BenchError: written by another version of the layout.
        """
        text = self._try(lambda: self._redis.hget(self._key("meta"), "layout"))
        if text is None:
            return None
        found = json.loads(text)
        if found["version"] != LAYOUT_VERSION or found["statistics"] != list(STATISTICS):
            raise BenchError(f"scan {self.scan_id!r} was written by another version of the bench: scan again")
        return Layout(tuple(found["layers"]), tuple(found["widths"]), found["rho"])

    def workers(self) -> dict[str, tuple[int, int]]:
        """Every worker that has committed -> (position, epoch), by name."""
        names = sorted(name.decode() for name in self._try(lambda: self._redis.smembers(self._key("workers"))))
        keys = {name: self._key(f"worker:{name}") for name in names}
        found = {name: self._try(partial(self._redis.hmget, key, "position", "epoch")) for name, key in keys.items()}
        return {name: (int(position), int(epoch)) for name, (position, epoch) in found.items()}

    def totals(self) -> Totals:
        """Sum over all workers, added in the order of their names.

        Raises:
            BenchError: no worker has committed anything.
        """
        layout = self.layout()
        names = sorted(self.workers())
        if layout is None or not names:
            raise BenchError(f"scan {self.scan_id!r} has no committed totals on {self.address}: run the scan first")
        states = [self._try(partial(self._redis.hgetall, self._key(f"worker:{name}"))) for name in names]
        return merge(_unpack(layout, state) for state in states)

    def clear(self) -> None:
        """Delete this scan from the server."""
        names = list(self.workers())
        keys = [self._key("meta"), self._key("workers"), *(self._key(f"worker:{name}") for name in names)]
        self._try(lambda: self._redis.delete(*keys))
        self._epochs.clear()

    def _key(self, what: str) -> str:
        return f"tinyonn:{{{self.scan_id}}}:{what}"


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    parts = [f"{key} was {there.get(key)!r:.80} and is {wanted.get(key)!r:.80}" for key in keys[:3]]
    return ", ".join(parts) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _pack(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, dtype=_FLOAT).tobytes()


def _unpack(layout: Layout, state: Mapping[bytes, bytes]) -> Totals:
    totals = Totals.zeros(layout)
    try:
        totals.counts[:] = np.frombuffer(state[b"counts"], _FLOAT).reshape(-1, len(COUNTERS))
        for row, (layer, width) in enumerate(zip(layout.layers, layout.widths, strict=True)):
            for column, name in enumerate(STATISTICS):
                totals.sums[row, column, :width] = np.frombuffer(state[f"{layer}/{name}".encode()], _FLOAT)
    except (KeyError, ValueError):
        raise BenchError("the totals on the server are damaged: someone else wrote to these keys; scan again") from None
    return totals
