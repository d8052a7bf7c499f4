"""Start scan workers on this host through `accelerate launch`, watch them, and fetch the totals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.launch import command as launcher
from tinyonn_lib.lm.launch import environment, watch
from tinyonn_lib.progress import Progress
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.workers import URL_VARIABLE, Job, work

_WHO, _AGAIN = "scan worker", "what was committed is safe; run the same command again to go on"


def scan(
    job: Job,
    store: Store,
    processes: int,
    model: nn.Module,
    *,
    progress: Progress | None = None,
) -> Totals:
    """The job, by one process (this one, with the model that it holds) or by several that load their own.

    Args, returns, errors: as `launch`.
    """
    if processes == 1:
        return work(job, model, store, progress)
    return launch(job, store, processes, progress=progress)


def launch(
    job: Job,
    store: Store,
    processes: int,
    *,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> Totals:
    """Scan with several processes on this host; returns when the scan is complete.

    The workers go when this process goes. Called again after a kill, it goes on from the last commits. Cores are shared
    out, so each worker computes with cores/processes threads; with as many threads each, any number of them gives the
    same bits.

    Args:
        job: what to do; the store and the number of workers are filled in.
        store: of the scan, such as one on a private server that this process holds.
        processes: how many workers.
        progress: called with (samples done, samples, text), about every second as long as more are done.
        log: gets every line that a worker prints.

    Returns:
        The totals of the whole scan.

    Raises:
        BenchError: what a worker says went wrong, a worker that was killed, or fewer shards than workers.
    """
    if not 1 <= processes <= job.shards:
        raise BenchError(
            f"{processes} workers cannot share {job.shards} shards: choose 1 to {job.shards}, or more shards"
        )
    with tempfile.TemporaryDirectory(prefix="tinyonn-") as folder:
        path = Path(folder) / "job.json"
        replace(job, scan_id=store.scan_id, url="", processes=processes).write(path)
        known = environment(processes, folder) | {URL_VARIABLE: store.connection.url}
        watch(command(path, processes), known, log=log, who=_WHO, again=_AGAIN, look=_Board(store, progress).look)
    return store.totals()


def command(job: Path, processes: int) -> list[str]:
    """How accelerate is called. job: the file. Also fit to be typed, on each host of several."""
    return launcher("tinyonn_lib.scan.workers", job, processes)


class _Board:
    """Tells how far the workers are together, as the store has it, whenever that has changed."""

    def __init__(self, store: Store, progress: Progress | None) -> None:
        self._store, self._progress = store, progress
        self._done = 0
        self.look("going on from the last commit")

    def look(self, text: str = "") -> None:
        """Ask the store. text: what to say instead of the number of workers."""
        if self._progress is None:
            return
        with suppress(BenchError):  # the workers will tell if the server is gone for good
            shards = self._store.shards(patience=0.0)
            done = sum(shard.position - shard.samples.start for shard in shards)
            if done != self._done:
                self._done = done
                working = sum(shard.holder is not None for shard in shards)
                self._progress(
                    done, sum(len(shard.samples) for shard in shards), text or (f"{working} workers" if working else "")
                )
