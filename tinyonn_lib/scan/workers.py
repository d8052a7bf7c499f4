"""One worker of a scan that several processes share: `accelerate launch -m tinyonn_lib.scan.workers JOB.json`.

A worker needs nobody: it loads the model, takes shards from the store and goes when all are complete. Start as many as
there are GPUs, on as many hosts as there are, each with the same job file; `launch.launch` does it for one host. From
the launcher a worker reads only `LOCAL_RANK` (which GPU is its own) and `WORLD_SIZE`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm.worker import PARENT_VARIABLE, run
from tinyonn_lib.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from tinyonn_lib.scan.statistics import Totals
    from tinyonn_lib.scan.store import Store

# Set by `launch`: the store's URL with its password, which does not belong into a file.
URL_VARIABLE = "TINYONN_WORKER_URL"
_SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """What a worker has to know. All workers of a scan get the same.

    Attributes:
        model: folder or hub id.
        samples: parquet file with a column `ids` (token ids of each sample) and, for the records, maybe `sequence` (id
            of the text it is from).
        scan_id: name of the scan in the store.
        url: redis URL of the store; the password comes from `TINYONN_REDIS_PASSWORD`.
        fingerprint, targets, rho, rows, shards, flush_seconds: as in `scan_samples`.
        dtype, device: as in `load_model`; "auto" and "cuda" give each worker of a host a GPU of its own.
        records: folder for the records, empty for none; one that all hosts share.
        processes: how many workers the launcher must have started, 0 for any number.
    """

    model: str
    samples: str | Path
    scan_id: str = ""
    url: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    targets: str | list[str] = "neurons"
    rho: float = 0.05
    rows: bool = True
    shards: int = 8
    flush_seconds: float = 5.0
    dtype: str = "float32"
    device: str = "auto"
    records: str | Path = ""
    processes: int = 0

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Back from `write`.

        Raises:
            BenchError: no such file, or not a job.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise BenchError(f"{path} is not a job for a scan worker: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda path: take_part(Job.read(path)), argv)


def take_part(job: Job) -> None:
    """Load the model, connect to the store, and work until the whole scan is complete.

    Raises:
        BenchError: as `scan_samples`, or the launcher did not do what it was asked for.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    if job.processes not in (0, world):
        raise BenchError(
            f"{job.processes} scan workers were asked for and accelerate started {world}: for several on CPUs it needs "
            "--multi_gpu, too"
        )
    from tinyonn_lib.lm.load import load_model
    from tinyonn_lib.scan.connect import with_password
    from tinyonn_lib.scan.store import Store

    model = load_model(job.model, job.dtype, _device(job.device, rank))  # type: ignore[arg-type]
    with Store(os.environ.get(URL_VARIABLE) or with_password(job.url), job.scan_id) as store:
        work(job, model, store, _lines() if rank == 0 and PARENT_VARIABLE not in os.environ else None)


def work(job: Job, model: nn.Module, store: Store, progress: Progress | None) -> Totals:
    """Do a share of the job with a loaded model, until the whole scan is complete.

    Raises:
        BenchError: no samples to read; as `scan_samples`.
    """
    import pandas as pd

    from tinyonn_lib.scan.scan import scan_samples

    try:
        table = pd.read_parquet(job.samples)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read the samples in {job.samples}: {error}") from None
    if "ids" not in table:
        raise BenchError(f"{job.samples} has no column ids: write one list of token ids per sample")
    return scan_samples(
        model,
        [ids.tolist() for ids in table["ids"]],
        store,
        targets=job.targets,
        rho=job.rho,
        rows=job.rows,
        shards=job.shards,
        flush_seconds=job.flush_seconds,
        fingerprint=job.fingerprint,
        records=Path(job.records) if job.records else None,
        sequences=table["sequence"].tolist() if "sequence" in table else None,
        progress=progress,
    )


def _device(wanted: str, rank: int) -> str:
    import torch

    if wanted not in ("auto", "cuda") or not torch.cuda.is_available():
        return wanted
    if rank >= torch.cuda.device_count():
        raise BenchError(f"{torch.cuda.device_count()} GPUs here and more workers: start one per GPU at most")
    return f"cuda:{rank}"


def _lines() -> Progress:
    """Progress of the whole scan, a line now and then."""
    said = -_SAY_SECONDS

    def say(done: int, total: int, text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_SECONDS or done == total:
            said = time.monotonic()
            print(f"{done} of {total} samples, {text}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
