"""Run one phase's notebook in batch: papermill, in this process, with one clear line when it fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.phases import ROOT, Phase
from tinyonn_lib.workbench.report import build_report
from tinyonn_lib.workbench.runs import PENDING, folder_of, seal

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
    with _environment(phase):
        try:
            papermill.execute_notebook(
                phase.notebook,
                out,
                parameters=dict(values),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                cwd=ROOT,
                # The kernel talks over loopback; encrypted, so that no other user of the machine can listen in.
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
            )
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise KeyboardInterrupt from None
            build_report(out, folder / "report.html")  # as far as it got, with the error on top
            raise BenchError(_explain(phase, error, out)) from None
        except DeadKernelError:
            raise BenchError(
                f"The kernel of {phase.name} died, most often for lack of memory: "
                f"lower its sizes in params/{phase.name}.yaml and run `tinyonn {phase.name}` again."
            ) from None
        except OSError as error:
            raise BenchError(f"{phase.name}: {error}. Run `tinyonn {phase.name}` again to go on.") from None
    if not (folder / PENDING).is_file():
        raise BenchError(f"{phase.notebook.name} ended without run.finish(): its last cell must hand over.")
    build_report(out, folder / "report.html")
    seal(folder)


def _explain(phase: Phase, error: Any, out: Path) -> str:
    if error.ename == "BenchError":
        return str(error.evalue)
    if any(sign in error.evalue for sign in NO_SPACE):
        return (
            f"No space left on the disk of {out.parent}: make room or set TINYONN_HOME to another disk, "
            f"then run `tinyonn {phase.name}` again; it goes on from its last checkpoint."
        )
    return f"{phase.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue} (traceback in {out})"


@contextmanager
def _environment(phase: Phase) -> Iterator[None]:
    """What the kernel inherits; restored afterwards."""
    wanted = {
        "TINYONN_BATCH": phase.name,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # Threads that spin while they wait take the second core from whoever has work.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
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
