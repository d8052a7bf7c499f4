"""One Python thread per core with one OpenMP thread each: how the bench uses a few CPU cores.

For small models this is 1.5 times faster than OpenMP inside each operation, and it does not collapse when
another process holds a core (PEERS.md §6 and §7).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

MOST = 4  # beyond this the interpreter's lock eats the gain


def default_shards(device: torch.device) -> int:
    """Threads that pay on this machine: one per core that this process may use, at most four; 1 on a GPU."""
    if device.type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores))


@contextmanager
def threads(shards: int) -> Iterator[Callable[..., list[Any]]]:
    """A `map` over `shards` threads, results in order; torch's own number of threads is 1 meanwhile.

    With one shard it is the plain `map`, and torch keeps its threads.
    """
    if shards == 1:
        yield lambda function, items: [function(item) for item in items]
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(shards) as pool:
            yield lambda function, items: list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)
