"""Progress: a tqdm bar in JupyterLab, sparse lines in batch.

`tqdm.auto` would leave a dead widget in a notebook that runs in batch, and a plain bar one line per update.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def reporter(what: str, unit: str, every: float = 10.0) -> Callable[[int, int, str], None]:
    """`report(done, total, note)` for one piece of work; in batch a line each `every` seconds and one at the end.

    A note that begins with "going on" tells where an earlier call stopped: it is shown at once, and the seconds left
    are reckoned from there.
    """
    return _bar(what, unit) if live() else _lines(what, unit, every)


def live() -> bool:
    """Is somebody looking? False in batch, plain papermill and nbconvert included: widgets would be dead there.

    Jupyter's server names the notebook to the kernels that it starts, VS Code leaves traces of its own.
    """
    if os.environ.get("TINYONN_BATCH"):
        return False
    if not any(name == "JPY_SESSION_NAME" or name.startswith("VSCODE_") for name in os.environ):
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _lines(what: str, unit: str, every: float) -> Callable[[int, int, str], None]:
    began = last = time.monotonic()
    first = 0

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal began, first, last
        now = time.monotonic()
        if note.startswith("going on"):
            began, first, last = now, done, now
            print(f"  {what}: {done:,} of {total:,} {unit}, {note}", flush=True)
            return
        if done < total and now - last < every:
            return
        last = now
        left = (now - began) * (total - done) / max(done - first, 1)
        tail = f", {left:.0f} s left" if done < total else f" in {now - began:.0f} s"
        print(f"  {what}: {done:,} of {total:,} {unit}{tail}" + (f", {note}" if note else ""), flush=True)

    return report


def _bar(what: str, unit: str) -> Callable[[int, int, str], None]:
    from tqdm.auto import tqdm

    bar = tqdm(desc=what, unit=unit, total=0)

    def report(done: int, total: int, note: str = "") -> None:
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report
