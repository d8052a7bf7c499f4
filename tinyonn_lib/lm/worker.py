"""One process of several that `accelerate launch` starts: `launch.launch` for a training, `scan.launch` for a scan.

A module of yours becomes a worker like this:

    def take_part(path: Path) -> None:
        job = json.loads(path.read_text())
        together = worker.accelerator()
        model = load_model(job["model"], device=str(together.device))
        history = fit(model, loss, batch, optimizer, checkpoint=..., progress=worker.report(), accelerator=together)
        if together.is_main_process:
            history.to_parquet(job["history"])

    if __name__ == "__main__":
        sys.exit(worker.run(take_part))

The same seeds everywhere; `fit` leaves the trained values in every process, the first one writes them down. What goes
wrong is raised as `BenchError`: the launching process shows that line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyonn_lib.errors import BenchError
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

# Set by `launch`: that stdin is a pipe whose other end the parent holds, how many processes there must be, and the
# file through which they meet.
PARENT_VARIABLE = "TINYONN_WORKER_PARENT"
PROCESSES_VARIABLE = "TINYONN_WORKER_PROCESSES"
RENDEZVOUS_VARIABLE = "TINYONN_WORKER_RENDEZVOUS"
# How lines begin that are meant for the parent.
ERROR = "tinyonn: "
PROGRESS = "tinyonn-progress: "


def run(take_part: Callable[[Path], None], argv: Sequence[str] | None = None) -> int:
    """What a worker's module does: take part in the job that its one argument names. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if PARENT_VARIABLE in os.environ:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        if len(arguments) != 1:
            raise BenchError("give one argument, the file of the job: accelerate launch -m MODULE JOB.json")
        take_part(Path(arguments[0]))
    except BenchError as error:
        print(f"{ERROR}{error}", file=sys.stderr, flush=True)
        return 1
    if "torch" in sys.modules:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def accelerator() -> Accelerator:
    """Meet the other processes. On a CPU they talk through gloo, on GPUs through NCCL.

    Raises:
        BenchError: there are not as many as were asked for.
    """
    import torch

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    asked = int(os.environ.get(PROCESSES_VARIABLE, world))
    if asked != world:
        raise BenchError(_fewer(asked, world))
    deepspeed, gpu = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true", torch.cuda.is_available()
    if deepspeed and not gpu:
        _without_shared_memory()
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's calls, at every step

    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

    handlers: list[KwargsHandler] = []
    if world > 1 or deepspeed:
        backend = "nccl" if gpu else "gloo"
        if meeting := os.environ.get(RENDEZVOUS_VARIABLE):
            # Otherwise the first process listens on a port that the whole network can reach.
            torch.distributed.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=world)
        handlers = [InitProcessGroupKwargs(backend=backend), DistributedDataParallelKwargs(find_unused_parameters=True)]
    # With cpu=True accelerate drops DeepSpeed and does not say so; without, it finds no processes but DeepSpeed's.
    made = Accelerator(cpu=not gpu and not deepspeed, mixed_precision="no", kwargs_handlers=handlers)
    if made.num_processes != asked or (deepspeed and made.distributed_type != "DEEPSPEED"):
        raise BenchError(_fewer(asked, made.num_processes))
    return made


def report() -> Progress:
    """Progress for `fit`, told to the parent; a line each when there is none."""
    before = PROGRESS if PARENT_VARIABLE in os.environ else ""
    return lambda done, total, note: print(before + json.dumps([done, total, note]), flush=True)


def _fewer(asked: int, found: int) -> str:
    return (
        f"{asked} training processes were asked for and accelerate started {found}: several on CPUs need --multi_gpu, "
        "or a config with distributed_type: DEEPSPEED"
    )


def _without_shared_memory() -> None:
    """DeepSpeed would compile an operation that only its inference uses, with a compiler that may be missing."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _leave_with_parent() -> None:
    os.read(0, 1)  # nothing ever comes: it returns when the parent is gone, however it went
    os._exit(1)
