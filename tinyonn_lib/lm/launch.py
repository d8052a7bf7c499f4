"""Start processes on this host through `accelerate launch`, watch them, and say in one line what went wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

import yaml

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.worker import (
    ERROR,
    PARENT_VARIABLE,
    PROCESSES_VARIABLE,
    PROGRESS,
    RENDEZVOUS_VARIABLE,
)
from tinyonn_lib.progress import Progress

_LOOK_SECONDS = 1.0
# What torch's launcher says itself; from its first error on, nothing that a user needs follows.
_LAUNCHER = re.compile(r"^[EWI]\d{4} .*torch/distributed")


def launch(
    module: str,
    job: Path,
    *,
    processes: int,
    config: Path | None = None,
    log: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Train with several processes on this host; returns when they are done.

    They go when this process goes. Called again after a kill, they go on from the checkpoint of their `fit`. Cores are
    shared out among them, and no port is opened to the network.

    Args:
        module: what each process runs as `python -m module JOB`; see `worker` for how it is written.
        job: its file with what to do.
        processes: how many; with one GPU each.
        config: of accelerate, such as `params/accelerate/zero2.yaml`; None is DistributedDataParallel.
        log: gets every line that a process prints.
        progress: called with what the first process reports (`worker.report`).

    Raises:
        BenchError: what a process says went wrong, or one that was killed; no such config; DeepSpeed is missing.
    """
    if processes < 1:
        raise BenchError(f"{processes} processes cannot train: choose 1 or more.")
    _check(config)
    with tempfile.TemporaryDirectory(prefix="tinyonn-") as folder:
        known = environment(processes, folder) | {
            PROCESSES_VARIABLE: str(processes),
            RENDEZVOUS_VARIABLE: str(Path(folder) / "rendezvous"),
            "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed never compiles here, and its preparations to do so take 5 s
        }
        if not _gpu():
            known["DS_ACCELERATOR"] = "cpu"  # what DeepSpeed looks for otherwise takes seconds, too
        again = "run the same command again to go on from the last checkpoint"
        watch(
            command(module, job, processes, config), known, log=log, progress=progress, who="training process",
            again=again,
        )  # fmt: skip


def command(module: str, job: Path, processes: int, config: Path | None = None) -> list[str]:
    """How accelerate is called. Also fit to be typed, on each host of several."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"]
    if config is not None:
        accelerate += ["--config_file", str(config)]
    elif processes > 1:
        # Without --multi_gpu it starts a single process on a CPU, whatever the number, and does not say so.
        accelerate += ["--multi_gpu"]
    if config is not None or processes > 1:
        # The rendezvous is through a file: torch's default listens on a port that the whole network can reach. Port 0
        # because accelerate looks whether its own default is taken, and then changes the rendezvous.
        accelerate += ["--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file", "--main_process_port", "0"]
    return [*accelerate, "-m", module, str(job)]


def environment(processes: int, folder: str) -> dict[str, str]:
    """Of the processes: with their share of the cores, a folder for what is temporary, and the loopback network."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = int(os.environ.get("OMP_NUM_THREADS") or cores)
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")
    return {
        **os.environ,
        **({"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} if loopback else {}),
        PARENT_VARIABLE: "1",
        "OMP_NUM_THREADS": str(max(1, min(most, cores // processes))),
        "TMPDIR": folder,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP's advice
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    log: Callable[[str], None],
    who: str,
    again: str,
    progress: Progress | None = None,
    look: Callable[[], None] | None = None,
) -> None:
    """Run the launcher until it has ended, and pass on what its processes print.

    Args:
        log: gets their lines, but for the launcher's own, errors and progress.
        who, again: for the error's line: what one of them is called, and what to do.
        progress: gets what they report.
        look: called about every second, and at the end.

    Raises:
        BenchError: they did not end well.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # never written to: it closes when we are gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C is for us, not for them
    )
    tail: deque[str] = deque(maxlen=200)
    look = look or (lambda: None)
    ended = False
    try:
        for line in _lines(process, look):
            if line.startswith(PROGRESS):
                if progress is not None:
                    progress(*json.loads(line.removeprefix(PROGRESS)))
                continue
            tail.append(line)
            ended = ended or (bool(_LAUNCHER.match(line)) and line.startswith("E"))
            if not ended and not _LAUNCHER.match(line) and not line.startswith(ERROR):
                log(line)
        process.wait()
        look()
    finally:
        _end(process)
    if process.returncode:
        raise BenchError(reason(process.returncode, list(tail), who, again))


def reason(code: int, tail: Sequence[str], who: str, again: str) -> str:
    """Why they ended: their own line if they had one to say."""
    own = [line.removeprefix(ERROR) for line in tail if line.startswith(ERROR)]
    if own:
        return own[0]
    # The first is the one that failed; the others the launcher then ends itself.
    first_code = next((int(match[1]) for line in tail if (match := re.search(r"exitcode\s*: (-?\d+)", line))), 0)
    if (killed := -first_code) > 0:
        return f"a {who} was killed by signal {killed}{' (out of memory?)' if killed == 9 else ''}; {again}"
    before = [line for line in tail if line.strip() and (line.startswith("E") or not _LAUNCHER.match(line))]
    first = next((number for number, line in enumerate(before) if _LAUNCHER.match(line)), len(before))
    return f"a {who} ended with exit code {code} ({(before[:first] or ['no output'])[-1]}); {again}"


def _lines(process: subprocess.Popen[str], look: Callable[[], None]) -> Iterator[str]:
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_LOOK_SECONDS)
        except Empty:
            look()
            continue
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    """The closed pipe makes the workers leave, wherever they are; then their launcher leaves."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check(config: Path | None) -> None:
    if config is None:
        return
    try:
        kind = yaml.safe_load(config.read_text())["distributed_type"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise BenchError(f"{config} is not a config for accelerate with a distributed_type: {error!r}") from None
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise BenchError("DeepSpeed is not installed: pip install 'tinyonn[train]', or train without its config.")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
