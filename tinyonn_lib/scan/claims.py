"""Who works on which shard: claims that expire, so that a shard of the dead goes on elsewhere.

Two things make a claim. The field `owner` of the shard's hash says whose commits are accepted; it changes hands in
the same transaction that takes the claim, so a worker that was thought dead and comes back is refused at its next
commit. The key `claim:K` says that the owner is alive: it expires unless renewed. A claim of a process of this machine
that is gone is taken at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any
from uuid import uuid4

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.connection import Connection
from tinyonn_lib.scan.shards import Holder

LEASE_SECONDS = 15.0


class Claims:
    """The claims of one worker on the shards of one scan.

    Args:
        connection: to the server.
        key: makes the full key of `shard:K` and `claim:K`.

    Attributes:
        token: names this worker, unlike any other.
    """

    def __init__(self, connection: Connection, key: Callable[[str], str]) -> None:
        self._connection, self._key = connection, key
        self.token = uuid4().hex.encode()

    def take(self, shard: int) -> bool:
        """Take the shard, unless somebody who may be alive holds it."""
        import redis

        try:
            return self._change(shard, self._take)
        except redis.WatchError:  # somebody was quicker
            return False

    def renew(self, shard: int) -> bool:
        """Say that we are alive; False when somebody else has taken the shard."""
        import redis

        try:
            return self._change(shard, self._renew, patience=0.0)
        except redis.WatchError:  # most likely a commit of our own, which renews, too; else the next call tells
            return True

    def release(self, shard: int) -> None:
        """Give the shard back, if it is ours. A server that is gone is no error: the claim expires."""
        import redis

        with contextlib.suppress(BenchError, redis.WatchError):
            self._change(shard, self._release, patience=0.0)

    def alive(self, pipe: Any, shard: int) -> None:
        """Add to a transaction that we are alive."""
        pipe.set(self._key(f"claim:{shard}"), Holder.me().dump(), px=int(LEASE_SECONDS * 1000))

    def holder(self, shard: int) -> Holder | None:
        """Who holds the shard now."""
        claim = self._connection.attempt(lambda: self._connection.redis.get(self._key(f"claim:{shard}")))
        return Holder.parse(claim) if claim else None

    def _take(self, pipe: Any, shard: int, owner: bytes | None, claim: bytes | None) -> bool:
        if owner != self.token and claim is not None and not Holder.parse(claim).dead():
            return False
        pipe.multi()
        pipe.hset(self._key(f"shard:{shard}"), "owner", self.token)
        self.alive(pipe, shard)
        return True

    def _renew(self, pipe: Any, shard: int, owner: bytes | None, claim: bytes | None) -> bool:
        if owner != self.token:
            return False
        pipe.multi()
        self.alive(pipe, shard)
        return True

    def _release(self, pipe: Any, shard: int, owner: bytes | None, claim: bytes | None) -> bool:
        if owner != self.token:
            return False
        pipe.multi()
        pipe.hdel(self._key(f"shard:{shard}"), "owner")
        pipe.delete(self._key(f"claim:{shard}"))
        return True

    def _change(
        self,
        shard: int,
        change: Callable[[Any, int, bytes | None, bytes | None], bool],
        patience: float | None = None,
    ) -> bool:
        """Run `change` as a transaction on what is there; False when it declines."""

        def attempt() -> bool:
            with self._connection.redis.pipeline(transaction=True) as pipe:
                pipe.watch(self._key(f"shard:{shard}"), self._key(f"claim:{shard}"))
                owner = pipe.hget(self._key(f"shard:{shard}"), "owner")
                done = change(pipe, shard, owner, pipe.get(self._key(f"claim:{shard}")))
                if done:
                    pipe.execute()
                return done

        return self._connection.attempt(attempt, patience=patience)


class Lease:
    """A thread that renews the claim on `shard`, so that a step may take as long as it likes.

    Attributes:
        shard: the shard in work, None between shards.
        lost: True once somebody else has taken it: everything done since the last commit is theirs to do again.
    """

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="tinyonn-lease", daemon=True)
        self.shard: int | None = None
        self.lost = False

    def hold(self, shard: int | None) -> None:
        """From now on renew the claim on this shard, and on no other."""
        self.lost, self.shard = False, shard

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 3):
            shard = self.shard
            try:
                if shard is not None and not self._claims.renew(shard) and shard == self.shard:
                    self.lost = True
            except BenchError:
                continue  # the server is away for a moment; the next commit will tell if for good
