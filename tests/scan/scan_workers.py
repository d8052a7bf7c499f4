"""Scan workers in processes of their own, forked from one that has imported everything: started in no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from scan_models import samples, tiny
from scan_totals import bits

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan import claims, scan
from tinyonn_lib.scan.scan import scan_samples
from tinyonn_lib.scan.store import Store

SAMPLES = 40
OPTIONS: dict[str, Any] = {"rho": 0.1, "shards": 5, "flush_seconds": 0.0, "fingerprint": {"model": "tiny"}}
_CONTEXT = multiprocessing.get_context("forkserver")
# What takes seconds to import; the rest of the path is unknown to that process.
_CONTEXT.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "tinyonn_lib.scan.scan"])


def texts() -> list[list[int]]:
    return samples(SAMPLES, high=40)


def _work(answer: Connection, url: str, scan_id: str, pause: float, lease: float, records: Path | None) -> None:
    torch.set_num_threads(1)
    claims.LEASE_SECONDS, scan._TELL_SECONDS = lease, 0.0
    begun: list[bool] = []

    def progress(done: int, total: int, text: str) -> None:
        if not begun and not text.startswith("going on"):
            begun.append(True)
            answer.send("working")
            answer.recv()
        time.sleep(pause)

    try:
        with Store(url, scan_id, retry_seconds=1.0) as store:
            found = scan_samples(tiny(), texts(), store, records=records, progress=progress, **OPTIONS)
        answer.send(bits(found))
    except BenchError as error:
        answer.send(str(error))


class Worker:
    """One worker that commits after every sample and then sleeps for a while.

    Attributes:
        first: number of the shard it began with, None when there was none left.
    """

    def __init__(self, *arguments: Any) -> None:
        self.line, far = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(far, *arguments), daemon=True)
        self.process.start()
        far.close()
        self.first: int | None = None

    @property
    def pid(self) -> int:
        return int(self.process.pid or 0)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def answer(self) -> Any:
        """The bits of the totals, or the line of the error."""
        assert self.line.poll(120), "the worker neither finished nor failed"
        found = self.line.recv()
        self.process.join()
        return found


def start(
    count: int, store: Store, *, pause: float = 0.0, lease: float = 15.0, records: Path | None = None
) -> list[Worker]:
    """Workers in processes of their own, all of them past their first sample, or waiting for a shard."""
    crew = [Worker(store.address, store.scan_id, pause, lease, records) for _ in range(count)]
    for worker in crew:
        assert worker.line.recv() == "working"
    first = {shard.holder.pid: shard.number for shard in store.shards() if shard.holder}
    for worker in crew:
        worker.first = first.get(worker.pid)
        worker.line.send("go")
    return crew


def until(what: Callable[[], Any]) -> Any:
    """Wait for something to become true; returns it."""
    for _ in range(12000):
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it never happened")


def committed(store: Store) -> int:
    """Samples of all shards that are on the server."""
    return sum(shard.position - shard.samples.start for shard in store.shards())
