"""Start scan workers on this host through `accelerate launch`, watch them, and fetch the totals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

from torch import nn

from tinyonn_lib.errors import BenchError
from tinyonn_lib.scan.statistics import Totals
from tinyonn_lib.scan.store import Store
from tinyonn_lib.scan.workers import PARENT_VARIABLE, URL_VARIABLE, Job, work

_LOOK_SECONDS = 1.0
# What torch's launcher says itself; from its first error on, nothing that a user needs follows.
_LAUNCHER = re.compile(r"^[EWI]\d{4} .*torch/distributed")


def scan(
    job: Job,
    store: Store,
    processes: int,
    model: nn.Module,
    *,
    progress: Callable[[int, int, str], None] | None = None,
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
    progress: Callable[[int, int, str], None] | None = None,
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
        process = subprocess.Popen(
            command(path, processes),
            stdin=subprocess.PIPE,  # never written to: it closes when we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(store, processes, folder),
            start_new_session=True,  # Ctrl-C is for us, not for them
        )
        tail: deque[str] = deque(maxlen=200)
        try:
            _watch(process, _Board(store, progress), log, tail)
        finally:
            _end(process)
    if process.returncode:
        raise BenchError(_reason(process.returncode, list(tail)))
    return store.totals()


def command(job: Path, processes: int) -> list[str]:
    """How accelerate is called. job: the file. Also fit to be typed, on each host of several."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"]
    if processes > 1:
        # Without --multi_gpu it starts a single process on a CPU, whatever the number, and does not say so. The
        # rendezvous is through a file: torch's default listens on a port that the whole network can reach.
        accelerate += ["--multi_gpu", "--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file"]
    return [*accelerate, "-m", "tinyonn_lib.scan.workers", str(job)]


def _environment(store: Store, processes: int, folder: str) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = int(os.environ.get("OMP_NUM_THREADS") or cores)
    return {
        **os.environ,
        URL_VARIABLE: store.connection.url,
        PARENT_VARIABLE: "1",
        "OMP_NUM_THREADS": str(max(1, min(most, cores // processes))),
        "TMPDIR": folder,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }


class _Board:
    """Tells how far the workers are together, as the store has it, whenever that has changed."""

    def __init__(self, store: Store, progress: Callable[[int, int, str], None] | None) -> None:
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


def _watch(process: subprocess.Popen[str], board: _Board, log: Callable[[str], None], tail: deque[str]) -> None:
    """Until the launcher has ended: pass on what the workers print, and how far they are together."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while True:
        try:
            line = lines.get(timeout=_LOOK_SECONDS)
        except Empty:
            board.look()
            continue
        if line is None:
            break
        tail.append(line)
        ended = ended or (bool(_LAUNCHER.match(line)) and line.startswith("E"))
        if not ended and not _LAUNCHER.match(line) and not line.startswith("tinyonn: "):
            log(line)
    process.wait()
    board.look()


def _end(process: subprocess.Popen[str]) -> None:
    """The closed pipe makes the workers leave, wherever they are; then their launcher leaves."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(code: int, tail: list[str]) -> str:
    """The workers' own line if they had one to say."""
    own = [line.removeprefix("tinyonn: ") for line in tail if line.startswith("tinyonn: ")]
    if own:
        return own[0]
    again = "what was committed is safe; run the same command again to go on"
    if killed := next((int(match[1]) for line in tail if (match := re.search(r"exitcode\s*: -(\d+)", line))), 0):
        return f"a scan worker was killed by signal {killed}{' (out of memory?)' if killed == 9 else ''}; {again}"
    before = [line for line in tail if line.strip()]
    first = next((number for number, line in enumerate(before) if _LAUNCHER.match(line)), len(before))
    return f"the scan workers ended with exit code {code} ({(before[:first] or ['no output'])[-1]}); {again}"
