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

from tinyonn_lib import __version__
from tinyonn_lib.errors import BenchError
from tinyonn_lib.lm import launch, worker
from tinyonn_lib.progress import Progress
from tinyonn_lib.selection.parts import Parts, content, read
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
        base = self.base or _base(Path(self.selector))
        return {
            "selector": content(self.selector, "model"), "base": content(base, "model") if base else "",
            "dtype": self.dtype, "options": self.options, "version": __version__,
        }  # fmt: skip


def _base(selector: Path) -> str:
    """Folder or hub id of the model that a selector names; "" if it names none."""
    from tinyonn_lib.selection.selector import FILE

    note = read(selector / FILE)
    return str((selector / note["base"]).resolve()) if note.get("base_is_folder") else note.get("base", "")


Make = Callable[[Job, str], Scores]
"""A scorer for a job on a device."""


def run(
    job: Job,
    processes: int = 1,
    *,
    scorer: Scores | None = None,
    progress: Progress | None = None,
    module: str = "",
    log: Callable[[str], None] = print,
) -> None:
    """Score a data set with one process, this one, or several that are started; `select.cut` goes on from there.

    Scores do not depend on how many there are. Called again after a kill, it goes on with the chunks that are missing.
    Once all rows are scored, chunks of other questions in the folder are deleted.

    Args:
        processes: how many; with one GPU each where there are any.
        scorer: what `make_scorer` would make of the job, if it is at hand; for this process alone.
        progress: called with (records done, records, "").
        module: what the processes run; this one by default.
        log: gets every line that a process prints.

    Raises:
        BenchError: as `select.score`; what a process says went wrong, or one that was killed.
    """
    if processes < 1:
        raise BenchError(f"{processes} processes cannot score: choose 1 or more.")
    parts = Parts.ask(Path(job.folder), question(job.source, job.settings(), job.column, job.chunk))
    if not parts.complete():
        if processes == 1 and not module:
            _take(job, scorer or make_scorer(job, job.device), (0, 1), progress)
        else:
            _start(job, processes, parts, progress, module or "tinyonn_lib.selection.select_worker", log)
    parts.drop_others()


def _start(
    job: Job, processes: int, parts: Parts, progress: Progress | None, module: str, log: Callable[[str], None]
) -> None:
    total, told = count(job.source) if progress else 0, 0

    def look() -> None:
        nonlocal told
        if progress and (done := parts.done()) != told:
            told = done
            progress(done, max(total, done), "")

    with tempfile.TemporaryDirectory(prefix="tinyonn-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps({"job": asdict(job), "processes": processes}))
        command = launch.command(module, file, processes)
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
    _take(job, make(job, _device(job.device, local)), (rank, world), None)


def _take(job: Job, scorer: Scores, share: tuple[int, int], progress: Progress | None) -> None:
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
