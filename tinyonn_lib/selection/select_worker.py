"""Score a data set with several processes: `accelerate launch -m tinyonn_lib.selection.select_worker JOB.json`.

Each loads the selector and takes every n-th chunk; they need not talk to each other. `run` does it for one host. A
module of yours can score otherwise, by calling `take_part` with a function that makes its scorer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import launch, worker
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.parts import Parts, content
from tinyonn_lib.selection.select import Scores, count, question, score

_WHO, _AGAIN = "scoring process", "finished chunks are kept; run the same command again to go on"


@dataclass(frozen=True)
class Job:
    """What to score, and with what.

    Attributes:
        source, column, chunk: as in `select.score`.
        folder: for the chunks; one that all processes share.
        selector, dtype, device, base: as in `selector.load_selector`; "auto" and "cuda" give each process a GPU of its
            own.
        options: of `scoring.Scorer`: trash, ratio, length, batch_tokens, seed, baselines.
    """

    source: str
    folder: str
    selector: str
    options: dict[str, Any] = field(default_factory=dict)
    column: str = "text"
    chunk: int = 1024
    dtype: str = "float32"
    device: str = "auto"
    base: str = ""

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on besides the data.

        Raises:
            BenchError: no such selector.
        """
        base = content(self.base, "model") if self.base else ""
        return {
            "selector": content(self.selector, "model"), "base": base, "dtype": self.dtype, "options": self.options
        }  # fmt: skip


Make = Callable[[Job, str], Scores]
"""A scorer for a job on a device."""


def run(
    job: Job,
    processes: int = 1,
    *,
    progress: Progress | None = None,
    module: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Score a data set with one process, this one, or several that are started; `select.cut` goes on from there.

    Scores do not depend on how many there are. Called again after a kill, it goes on with the chunks that are missing.

    Args:
        processes: how many; with one GPU each where there are any.
        progress: called with (records done, records, "").
        module: what the processes run; this one by default.
        log: gets every line that a process prints.

    Raises:
        BenchError: as `select.score`; what a process says went wrong, or one that was killed.
    """
    if processes < 1:
        raise BenchError(f"{processes} processes cannot score: choose 1 or more.")
    parts = Parts.ask(Path(job.folder), question(job.source, job.settings(), job.column, job.chunk))
    if parts.complete():
        return
    if processes == 1 and not module:
        _take(job, make_scorer, (0, 1), job.device, progress)
        return
    total, told = count(job.source) if progress else 0, 0

    def look() -> None:
        nonlocal told
        if progress and (done := parts.done()) != told:
            told = done
            progress(done, max(total, done), "")

    with tempfile.TemporaryDirectory(prefix="tinyonn-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps({"job": asdict(job), "processes": processes}))
        command = launch.command(module or "tinyonn_lib.selection.select_worker", file, processes)
        launch.watch(
            command, launch.environment(processes, folder), log=log, who=_WHO, again=_AGAIN, look=look
        )  # fmt: skip


def take_part(path: Path, make: Make) -> None:
    """One of the processes: score its share.

    Raises:
        BenchError: not a job; the launcher did not start as many as were asked for, or more than there are GPUs.
    """
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rank, local, world = (int(os.environ.get(name, default)) for name, default in defaults.items())
    try:
        given = json.loads(path.read_text())
        job, processes = Job(**given["job"]), given["processes"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{path} is not a job for a scoring process: {error}") from None
    if processes != world:
        raise BenchError(
            f"{processes} scoring processes were asked for and accelerate started {world}: for several on CPUs it "
            "needs --multi_gpu, too"
        )
    _take(job, make, (rank, world), _device(job.device, local), None)


def _take(job: Job, make: Make, share: tuple[int, int], device: str, progress: Progress | None) -> None:
    scorer = make(job, device)
    score(
        job.source, scorer, Path(job.folder), settings=job.settings(), column=job.column, chunk=job.chunk, share=share,
        progress=progress,
    )  # fmt: skip


def make_scorer(job: Job, device: str) -> Scores:
    """`scoring.Scorer` on the job's selector."""
    from tinyonn_lib.selection.scoring import Scorer
    from tinyonn_lib.selection.selector import load_selector

    selector = load_selector(job.selector, job.dtype, device, job.base)  # type: ignore[arg-type]
    return Scorer(selector, **job.options)


def _device(wanted: str, rank: int) -> str:
    import torch

    if wanted not in ("auto", "cuda") or not torch.cuda.is_available():
        return wanted
    if rank >= torch.cuda.device_count():
        raise BenchError(f"{torch.cuda.device_count()} GPUs here and more processes: choose one per GPU at most.")
    return f"cuda:{rank}"


if __name__ == "__main__":
    sys.exit(worker.run(lambda path: take_part(path, make_scorer)))
