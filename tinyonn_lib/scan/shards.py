"""How the samples of a scan are shared out: fixed contiguous shards, whatever the number of workers.

A shard is summed from zero, sample after sample, by one worker at a time; the scan is the sum of its shards in their
order. Both orders are fixed, so one worker, ten, and ten of which nine were killed get the same bits (float64 sums
depend on their order). Only the number of shards changes the bits, so it belongs to the scan.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import psutil

from tinyonn_lib.errors import BenchError


@dataclass(frozen=True)
class Cut:
    """Which samples there are and in how many shards they are cut.

    Attributes:
        samples: how many there are.
        samples_sha256: hash of their token ids, in order.
        shards: parts they are cut into; never more than samples.
    """

    samples: int
    samples_sha256: str
    shards: int

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]], shards: int) -> Cut:
        """The cut of these token ids.

        Raises:
            BenchError: fewer than one shard.
        """
        if shards < 1:
            raise BenchError(f"shards={shards}: a scan has at least one shard")
        digest = hashlib.sha256()
        for sample in samples:
            ids = np.asarray(sample, dtype="<i8")
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return cls(len(samples), digest.hexdigest(), min(shards, max(1, len(samples))))

    def range(self, shard: int) -> range:
        """Global indices of the samples of one shard; lengths differ by one at most."""
        return range(shard * self.samples // self.shards, (shard + 1) * self.samples // self.shards)


@dataclass(frozen=True)
class Holder:
    """The process that works on a shard.

    Attributes:
        host: its name, for people.
        place: the machine, its boot and its process namespace: where `pid` means something.
        pid, started: process id and start time (seconds since 1970), which together never repeat.
    """

    host: str
    place: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        return cls(platform.node(), _place(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def parse(cls, text: bytes) -> Holder:
        """Back from `dump`; what cannot be read is somebody somewhere."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls("unknown", "", 0, 0.0)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def dead(self) -> bool:
        """True when it is known to be gone: only for processes of this machine; others are given time."""
        if self.place != _place():
            return False
        try:
            process = psutil.Process(self.pid)
            # The start time is reckoned from the boot time, which moves when the clock is set.
            return abs(process.create_time() - self.started) > 5.0 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Shard:
    """Where one shard stands.

    Attributes:
        number: from 0.
        samples: global indices of its samples.
        position: global index of the next sample; all before it are committed.
        epoch: commits so far.
        holder: who works on it now, None when nobody does.
    """

    number: int
    samples: range
    position: int
    epoch: int
    holder: Holder | None

    @property
    def complete(self) -> bool:
        """Whether all its samples are committed."""
        return self.position >= self.samples.stop

    @property
    def free(self) -> bool:
        """Whether there is work left that nobody alive does."""
        return not self.complete and (self.holder is None or self.holder.dead())


@cache
def _place() -> str:
    """Two containers of one machine share its boot but not its processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - a link into nowhere, only its inode counts
    except OSError:
        return platform.node()
