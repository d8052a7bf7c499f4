"""Where a scan keeps its totals: any Redis-protocol server, one hash per shard, absolute values.

A worker writes all that a shard has so far (not what is new), the position in the data and an epoch in one MULTI/EXEC.
That is idempotent: killed before it, the last epoch stands; killed after it, the new one does; sent twice, the same.
Readers add the shards up. Layout (`docs/store.md`; braces keep one scan on one cluster node):

- `tinyonn:{SCAN}:meta`      hash: `fingerprint`, `layout`, `cut` (JSON)
- `tinyonn:{SCAN}:shard:K`   hash: `epoch`, `position`, `owner`, `counts`, `norms`, and one field `TARGET/STATISTIC`
  per packed row; packed values are little-endian float64.
- `tinyonn:{SCAN}:claim:K`   who works on the shard, expires unless renewed (`claims.py`)
- `tinyonn:{SCAN}:param:...` the readable view (`readable.py`)
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.claims import Claims
from tinyonn_lib.scan.connection import Connection
from tinyonn_lib.scan.packing import pack, unpack
from tinyonn_lib.scan.shards import Cut, Holder, Shard
from tinyonn_lib.scan.statistics import Layout, Totals, merge


class ShardLost(BenchError):
    """Somebody else has taken the shard over; what was done since the last commit is theirs to do again."""


class Store:
    """Totals of one scan on a Redis-protocol server.

    Args:
        where: a redis URL (`redis://`, `rediss://`, `unix://`) or the path of a unix socket.
        scan_id: name of the scan on that server; letters, digits and `._-/` only.
        retry_seconds: how long a lost connection is retried before giving up.

    Attributes:
        connection: to the server.
        claims: which shards this worker works on; a shard is claimed before it is committed.

    Raises:
        BenchError: URL that cannot be understood; from every method when the server cannot be reached,
            refuses the password, or refuses the write. Passwords never appear in messages.
    """

    def __init__(self, where: str | Path, scan_id: str, *, retry_seconds: float = 10.0) -> None:
        if not scan_id or not all(c.isalnum() or c in "._-/" for c in scan_id):
            raise BenchError(f"scan id {scan_id!r}: use letters, digits and . _ - / only")
        self.scan_id = scan_id
        self.connection = Connection(where, retry_seconds)
        self.claims = Claims(self.connection, self.key)
        self._redis = self.connection.redis
        self._try = self.connection.attempt
        self._epochs: dict[int, int] = {}
        self._cut: Cut | None = None

    @property
    def address(self) -> str:
        """The URL without password, fit for messages and manifests."""
        return self.connection.address

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; the data stay."""
        self._redis.close()

    def key(self, what: str) -> str:
        """The full name of one of the scan's keys."""
        return f"tinyonn:{{{self.scan_id}}}:{what}"

    def begin(self, layout: Layout, fingerprint: Mapping[str, object], cut: Cut) -> None:
        """Start the scan, or make sure that it may be continued.

        Args:
            layout: what is watched.
            fingerprint: JSON-able facts that must not change within a scan (model, data, parameters).
            cut: samples and shards, which must not change either.

        Raises:
            BenchError: the scan exists with another fingerprint, layout or cut; the line names what differs.
        """
        wanted = {
            "fingerprint": json.dumps(dict(fingerprint), sort_keys=True, default=str),
            "layout": json.dumps(layout.describe(), sort_keys=True),
            "cut": json.dumps(asdict(cut), sort_keys=True),
        }

        def attempt() -> dict[bytes, bytes]:
            with self._redis.pipeline(transaction=True) as pipe:
                for field, value in wanted.items():
                    pipe.hsetnx(self.key("meta"), field, value)
                pipe.hgetall(self.key("meta"))
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
        self._cut = cut

    def commit(self, shard: int, totals: Totals, position: int) -> int:
        """Write a shard's absolute totals and its position, all or nothing.

        Args:
            shard: number of the shard, which this worker has claimed.
            totals: everything of the shard's samples so far.
            position: global index of its next sample: all before it are in `totals`.

        Returns:
            The new epoch, 1 for the first commit.

        Raises:
            ShardLost: another worker has taken the shard.
            BenchError: no connection within `retry_seconds`; the line says up to where all is safe.
        """
        import redis

        key, before = self.key(f"shard:{shard}"), self._epochs.get(shard, 0)
        fields = {"epoch": before + 1, "position": position, **pack(totals)}

        def attempt() -> None:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.watch(key)
                epoch, owner = pipe.hmget(key, "epoch", "owner")
                if owner == self.claims.token and int(epoch or 0) == before + 1 and attempts:
                    return  # the answer to an earlier attempt was lost, the write was not
                if owner != self.claims.token or int(epoch or 0) != before:
                    raise self._lost(shard)
                attempts.append(1)
                pipe.multi()
                pipe.hset(key, mapping=fields)
                self.claims.alive(pipe, shard)
                pipe.execute()

        attempts: list[int] = []
        safe = f"everything up to epoch {before} of shard {shard} is safe" if before else "what was committed is safe"
        try:
            self._try(attempt, safe=safe)
        except redis.WatchError:
            raise self._lost(shard) from None
        self._epochs[shard] = before + 1
        return before + 1

    def resume(self, shard: int) -> tuple[Totals, int, int] | None:
        """(totals, position, epoch) of the shard's last commit, None when it has none yet."""
        layout = self.layout()
        state = self._try(lambda: self._redis.hgetall(self.key(f"shard:{shard}")))
        if layout is None or b"epoch" not in state:
            self._epochs[shard] = 0
            return None
        self._epochs[shard] = int(state[b"epoch"])
        return unpack(layout, state), int(state[b"position"]), self._epochs[shard]

    def layout(self) -> Layout | None:
        """The layout the scan was begun with, None when it was not begun.

        Raises:
            BenchError: written by another version of the bench.
        """
        text = self._try(lambda: self._redis.hget(self.key("meta"), "layout"))
        return None if text is None else Layout.parse(json.loads(text))

    def cut(self) -> Cut | None:
        """Samples and shards, None when the scan was not begun."""
        if self._cut is None:
            text = self._try(lambda: self._redis.hget(self.key("meta"), "cut"))
            self._cut = None if text is None else Cut(**json.loads(text))
        return self._cut

    def shards(self, patience: float | None = None) -> list[Shard]:
        """Where every shard stands; one round trip that moves no totals. Empty when the scan was not begun."""
        cut = self.cut()
        if cut is None:
            return []

        def attempt() -> list[Any]:
            with self._redis.pipeline(transaction=False) as pipe:
                for number in range(cut.shards):
                    pipe.hmget(self.key(f"shard:{number}"), "position", "epoch")
                    pipe.get(self.key(f"claim:{number}"))
                found: list[Any] = pipe.execute()
            return found

        found, shards = self._try(attempt, patience=patience), []
        for number, ((position, epoch), claim) in enumerate(zip(found[::2], found[1::2], strict=True)):
            samples = cut.range(number)
            done = samples.start if position is None else int(position)
            shards.append(Shard(number, samples, done, int(epoch or 0), Holder.parse(claim) if claim else None))
        return shards

    def totals(self, shards: Container[int] | None = None) -> Totals:
        """Sum of all that is committed, shard after shard; of the given shards only, if any are.

        Raises:
            BenchError: nothing is.
        """
        layout = self.layout()
        begun = [each.number for each in self.shards() if each.epoch and (shards is None or each.number in shards)]
        if layout is None or not begun:
            raise BenchError(f"scan {self.scan_id!r} has no committed totals on {self.address}: run the scan first")

        def parts() -> Iterator[Totals]:
            for number in begun:
                yield unpack(layout, self._try(partial(self._redis.hgetall, self.key(f"shard:{number}"))))

        return merge(parts())

    def halves(self) -> list[Totals]:
        """The scan in two halves, by shards; none when it has a single shard.

        Two halves of data tell how much of a score is the data's: samples are drawn in random order.
        """
        cut = self.cut()
        if cut is None or cut.shards < 2:
            return []
        middle = cut.shards // 2
        return [self.totals(range(middle)), self.totals(range(middle, cut.shards))]

    def publish(self) -> int:
        """Write the averages of everything committed so far in the readable layout; returns the number of units."""
        from tinyonn_lib.scan import readable

        return readable.publish(self)

    def clear(self) -> None:
        """Delete this scan from the server."""
        from tinyonn_lib.scan import readable

        readable.remove(self)
        cut = self.cut()
        numbers = range(cut.shards if cut else 0)
        keys = [self.key("meta"), *(self.key(f"{what}:{k}") for k in numbers for what in ("shard", "claim"))]
        self._try(lambda: self._redis.delete(*keys))
        self._epochs.clear()
        self._cut = None

    def _lost(self, shard: int) -> ShardLost:
        holder = self.claims.holder(shard)
        return ShardLost(f"scan {self.scan_id!r}: shard {shard} was taken over by {holder or 'another worker'}")


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    keys = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    parts = [f"{key} was {there.get(key)!r:.80} and is {wanted.get(key)!r:.80}" for key in keys[:3]]
    return ", ".join(parts) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
