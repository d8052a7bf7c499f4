"""Run one phase's notebook in batch: papermill, in this process, with one clear line when it fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.phases import ROOT, Phase
from tinyonn_lib.workbench.report import build_report
from tinyonn_lib.workbench.runs import FAILED, MANIFEST, PENDING, folder_of, seal

CONFIG = {
    # The kernel talks over loopback; encrypted, so that no other user of the machine can listen in.
    "KernelManager": {"transport_encryption": "auto"},
    # Its own notes ("KeyboardInterrupt caught in kernel" at shutdown) would stand beside the one line that helps.
    "NotebookClient": {"extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]},
}
NO_SPACE = ("No space left on device", "os error 28", "Disk quota exceeded")


def execute(phase: Phase, values: Mapping[str, Any]) -> None:
    """Execute the notebook into its run folder, build the report, then seal the manifest.

    Raises:
        BenchError: The phase failed. The partial notebook stays in the folder, checkpoints stay, no manifest appears.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    folder = folder_of(str(values["run"]), phase.name)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "notebook.ipynb"
    _set_aside(folder)
    with _environment(phase), _packed_parameters():
        try:
            papermill.execute_notebook(
                phase.notebook,
                out,
                parameters=dict(values),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                cwd=ROOT,
                config=Config(CONFIG),
            )
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise KeyboardInterrupt from None
            raise BenchError(_explain(phase, error, _after_failure(folder))) from None
        except DeadKernelError:
            raise BenchError(
                f"The kernel of {phase.name} died, most often for lack of memory: "
                f"lower its sizes in params/{phase.name}.yaml and run `tinyonn {phase.name}` again."
            ) from None
        except OSError as error:
            raise BenchError(_explain_disk(phase, error, out)) from None
    if not (folder / PENDING).is_file():
        raise BenchError(f"{phase.notebook.name} ended without run.finish(): its last cell must hand over.")
    try:
        build_report(out, folder / "report.html")
    except OSError as error:
        raise BenchError(_explain_disk(phase, error, out)) from None
    finally:
        shutil.rmtree(folder / ".before", ignore_errors=True)
        seal(folder)  # last; a page can be built again, so for want of one no result is lost


def _set_aside(folder: Path) -> None:
    """Keep the pages of the result that stands until the phase replaces it."""
    before = folder / ".before"
    if (folder / MANIFEST).is_file() and not before.is_dir():
        before.mkdir()
        for name in ("notebook.ipynb", "report.html"):
            if (folder / name).is_file():
                (folder / name).replace(before / name)


def _after_failure(folder: Path) -> Path:
    """Where the notebook that failed is now: apart, if it replaced nothing and the earlier result stands."""
    out, before = folder / "notebook.ipynb", folder / ".before"
    if (folder / MANIFEST).is_file() and before.is_dir():
        out = out.replace(folder / FAILED)
        for page in before.iterdir():
            page.replace(folder / page.name)
    else:
        with contextlib.suppress(OSError):  # on a full disk there is no page, but still the line that says so
            build_report(out, folder / "report.html")  # as far as it got, with the error on top
    shutil.rmtree(before, ignore_errors=True)
    return out


def _explain(phase: Phase, error: Any, out: Path) -> str:
    if error.ename == "BenchError":
        return str(error.evalue)
    if any(sign in error.evalue for sign in NO_SPACE):
        return _no_space(phase, out)
    return f"{phase.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue} (traceback in {out})"


def _explain_disk(phase: Phase, error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(phase, out)
    return f"{phase.name}: {error}. Run `tinyonn {phase.name}` again to go on."


def _no_space(phase: Phase, out: Path) -> str:
    return (
        f"No space left on the disk of {out.parent}: make room or set TINYONN_HOME to another disk, "
        f"then run `tinyonn {phase.name}` again; it goes on from its last checkpoint."
    )


def threads() -> dict[str, str]:
    """OpenMP settings for kernels, where the user has set none: the cores we may use, at most eight, and no spinning.

    Small models do not gain from more; threads that spin while they wait take cores from whoever has work.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(min(cores, 8)), "OMP_WAIT_POLICY": "passive"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextmanager
def _packed_parameters() -> Iterator[None]:
    """Without papermill's warnings about a cell with several parameters to a line, of which it can read none.

    It injects them all the same. A name that no phase has never comes this far: `validate` refuses it.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("Passed unknown parameter", "Unable to parse line"))

    loggers = [logging.getLogger(name) for name in ("papermill", "papermill.translators")]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)


@contextmanager
def _environment(phase: Phase) -> Iterator[None]:
    """What the kernel inherits; restored afterwards."""
    wanted = {
        "TINYONN_BATCH": phase.name,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **threads(),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
