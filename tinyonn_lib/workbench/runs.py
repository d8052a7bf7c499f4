"""Run folders: `runs/<run>/<phase>/` with artefacts and, written last and atomically, `manifest.json`.

A phase is *done* when its manifest exists and matches: same parameters, same inputs, outputs untouched.
Phases hand over by files only; a file is looked at again (sha256) before the next phase reads it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tinyonn_lib.errors import BenchError
from tinyonn_lib.progress import Progress
from tinyonn_lib.workbench import page, progress, words
from tinyonn_lib.workbench.params import changed
from tinyonn_lib.workbench.phases import PHASES, Phase, runs_root
from tinyonn_lib.workbench.schemas import Params

MANIFEST = "manifest.json"
PENDING = ".manifest.json"
FAILED = "failed.ipynb"
LOG, KEPT = ".tensorboard", ".kept"
NOT_OUTPUTS = {MANIFEST, FAILED, "notebook.ipynb", "report.html"}
WHOLE_HASH = 64_000_000  # bytes: larger files of the user are told apart by size and time
# Parameters that say where and in what steps a phase works, not what it computes: a change of these keeps the result.
PLACE = ("run", "base", "redis_url", "flush_seconds", "checkpoint_seconds", "workers")
# Parameters that may name a file or folder of the user's.
PATHS = ("texts", "model", "other_texts", "choice", "selector", "heldout_texts", "mmlu")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas", "scikit-learn", "umap-learn", "plotly")

State = Literal["done", "stale", "unfinished", "not run"]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """A short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: object) -> None:
    """Atomically: a reader sees the old file or the new one, never half of it."""
    page.write_atomic(path, json.dumps(value, indent=2) + "\n")


def folder_of(run: str, phase: str) -> Path:
    return runs_root() / run / phase


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished phase; None when there is none, or not a whole one."""
    manifest = page.read_manifest(folder)
    return manifest if "digest" in manifest else None


def find(phase: str, run: str, base: str = "") -> tuple[Path, dict[str, Any]] | None:
    """The finished phase that a run sees: its own, else its base run's."""
    for name in filter(None, (run, base)):
        manifest = read_manifest(folder_of(name, phase))
        if manifest:
            return folder_of(name, phase), manifest
    return None


def input_digests(phase: Phase, values: Mapping[str, Any]) -> dict[str, str]:
    """`{input phase: digest of its manifest}` for a run.

    Raises:
        BenchError: An input is not there, or was made from something that has changed since; it says what to run.
    """
    run, found = str(values["run"]), {}
    for name in phase.reads(values):
        where = f"`tinyonn {name}{'' if run == 'default' else f' run={run}'}` first, or `tinyonn all`"
        hit = find(name, run, values["base"])
        if hit is None:
            raise BenchError(f"{phase.name} needs {name}, which is not finished in run '{run}': {where}.")
        manifest = hit[1]
        if (
            input_digests(PHASES[name], {**manifest["params"], "run": run, "base": values["base"]})
            != manifest["inputs"]
        ):
            raise BenchError(f"{phase.name} needs {name}, whose own inputs have changed since: {where}.")
        found[name] = str(manifest["digest"])
    return found | _external(values)


def _external(values: Mapping[str, Any]) -> dict[str, str]:
    """Files and folders of the user's that parameters name: what they hold is an input like any other."""
    given = {key: Path(str(values[key])) for key in PATHS if values.get(key)}
    return {f"{key} {path.name}": _content(path) for key, path in given.items() if path.exists()}


def _content(path: Path) -> str:
    if path.is_file():
        stat = path.stat()
        return digest([stat.st_size, sha256(path) if stat.st_size <= WHOLE_HASH else stat.st_mtime_ns])
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def _science(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in PLACE}


def _intact(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Outputs there, of the recorded size, and, if touched since, of the recorded hash."""
    sealed = (folder / MANIFEST).stat().st_mtime_ns
    for name, entry in manifest["outputs"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if path.stat().st_mtime_ns > sealed and sha256(path) != entry["sha256"]:
            return False
    return True


def state(phase: Phase, values: Mapping[str, Any], *, exactly: bool = True) -> State:
    """Where a phase stands in the run that `values` name; `exactly` also compares the other parameters."""
    folder = folder_of(values["run"], phase.name)
    hit = find(phase.name, values["run"], values["base"])
    if hit is None:
        return "unfinished" if (folder / "notebook.ipynb").exists() else "not run"
    place, manifest = hit
    try:
        inputs = input_digests(phase, values)
    except BenchError:
        return "stale"
    same = not exactly or _science(manifest["params"]) == _science(values)
    return "done" if same and manifest["inputs"] == inputs and _intact(place, manifest) else "stale"


def status_of(run_folder: Path, phase: Phase) -> State:
    """Where a phase stands by its own parameters, whatever the defaults are now: what a report shows."""
    manifest = read_manifest(run_folder / phase.name)
    values = manifest["params"] if manifest else {"run": run_folder.name, "base": ""}
    return state(phase, {**values, "run": run_folder.name})


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: object) -> str:
    """What a phase ran on, for people."""
    if not str(device).startswith("cuda"):
        return f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    import torch

    return str(torch.cuda.get_device_name(str(device)))


def seal(folder: Path) -> None:
    """Turn the pending manifest into the manifest; from here on the phase is done."""
    (folder / PENDING).replace(folder / MANIFEST)
    shutil.rmtree(folder / ".resume", ignore_errors=True)


@dataclass
class Run:
    """One phase at work in its folder; made by `tinyonn_lib.workbench.start`.

    An earlier result of the phase stands until this one writes its first artefact, so that a mistake in a parameter
    costs nothing.
    """

    phase: Phase
    params: Params
    folder: Path
    inputs: dict[str, str]
    lock: FileLock
    began: float
    writing: bool = False

    @property
    def resume(self) -> Path:
        """A private folder for checkpoints; its name holds parameters and inputs, so nothing foreign is resumed."""
        path = self.folder / ".resume" / digest([_science(self.params.model_dump()), self.inputs])
        path.mkdir(parents=True, exist_ok=True)
        return path

    def path(self, name: str) -> Path:
        """Where to write an artefact of this phase; the first call clears an earlier result away."""
        self._clear()
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def log(self) -> Path:
        """A folder for tensorboard. It is no artefact: it holds times, and it outlives a kill."""
        return self.folder / LOG

    @property
    def kept(self) -> Path:
        """A folder for work that other parameters can use again; whoever puts it there sees to it that it fits."""
        return self.folder / KEPT

    def input(self, phase: str, name: str) -> Path:
        """An artefact of an earlier phase, file or folder, its hash checked against that phase's manifest."""
        folder, manifest = self._earlier(phase)
        files = {f: e for f, e in manifest["outputs"].items() if f == name or f.startswith(name + "/")}
        if not files:
            left = ", ".join(sorted({file.partition("/")[0] for file in manifest["outputs"]} - {"report.html"}))
            raise BenchError(f"{phase} left no '{name}', but {left}: choose one, or run `tinyonn {phase}` again.")
        for file, entry in files.items():
            if not (folder / file).is_file() or sha256(folder / file) != entry["sha256"]:
                raise BenchError(
                    f"{phase}/{file} is not what {phase} wrote (missing or damaged): run `tinyonn {phase}` again."
                )
        return folder / name

    def _earlier(self, phase: str) -> tuple[Path, dict[str, Any]]:
        hit = find(phase, self.params.run, self.params.base)
        if hit is None or phase not in self.phase.upstream():
            raise BenchError(f"{self.phase.name} cannot read {phase}: not one of its inputs, or not finished.")
        return hit

    def asked(self, phase: str) -> dict[str, Any]:
        """The parameters that an earlier phase ran with."""
        return dict(self._earlier(phase)[1]["params"])

    def has(self, phase: str, name: str) -> bool:
        """Whether an earlier phase left such an artefact: some are made only where there is something to say."""
        return name in self._earlier(phase)[1]["outputs"]

    def table(self, phase: str, name: str) -> Any:
        """A parquet artefact of an earlier phase as a pandas frame."""
        import pandas as pd

        return pd.read_parquet(self.input(phase, name))

    def say(self, markdown: str) -> None:
        """Show computed text; what comes from data sets goes through `facts` or `quote`, which escape."""
        from IPython.display import Markdown, display

        display(Markdown(markdown))

    def facts(self, values: Mapping[str, Any]) -> None:
        """Show names and values as a table."""
        self.say(words.facts_table(values))

    def quote(self, samples: Mapping[str, str]) -> None:
        """Show what a model wrote: prompt → text."""
        self.say(words.quotations(samples))

    def _clear(self) -> None:
        if self.writing:
            return
        self.writing = True
        # In batch the notebook in the folder is the one that runs now; by hand it would be that of another run.
        batch = os.environ.get("TINYONN_BATCH") == self.phase.name
        keep = {".resume", ".lock", ".before", LOG, KEPT} | ({"notebook.ipynb"} if batch else set())
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.resume.parent.iterdir():
            if path != self.resume:
                shutil.rmtree(path)

    def model(self) -> str:
        """The dense model this run is about: a hub id or folder given to scan, else the one pretrain made."""
        scanned = find("scan", self.params.run, self.params.base)
        own = self.params.model_dump().get("model") or (scanned and scanned[1]["params"]["model"])
        return str(own or self.input("pretrain", "model"))

    def need_space(self, size: int) -> None:
        """Refuse before a large artefact is begun; `size` in bytes."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise BenchError(
                f"{self.phase.name} needs {size / 1e6:.0f} MB on disk and {free / 1e6:.0f} MB are free: make room "
                f"or set TINYONN_HOME to another disk, then run `tinyonn {self.phase.name}` again; nothing is lost."
            )

    def progress(self, what: str, unit: str = "it") -> Progress:
        """`report(done, total, note)`: a bar in JupyterLab, sparse lines in batch."""
        return progress.reporter(what, unit)

    def finish(
        self,
        metrics: Mapping[str, float | int | str],
        headline: tuple[str, str],
        device: object = "cpu",
        costs: Mapping[str, float] | None = None,
    ) -> None:
        """Hash the artefacts and write the manifest.

        Args:
            headline: (label, value) for the index card.
            device: where the work was done, such as `model.device`.
            costs: what depends on the clock, and so differs from run to run.
        """
        self._clear()
        files = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        names = [p.relative_to(self.folder).as_posix() for p in files]
        outputs = [n for n in names if not n.startswith(".") and n not in NOT_OUTPUTS]
        entries = {n: {"sha256": sha256(self.folder / n), "bytes": (self.folder / n).stat().st_size} for n in outputs}
        values = self.params.model_dump()
        manifest = {
            "phase": self.phase.name,
            "run": self.params.run,
            "params": values,
            "changed": changed(self.phase, values),
            "inputs": self.inputs,
            "outputs": entries,
            "metrics": dict(metrics),
            "costs": dict(costs or {}),
            "headline": {"label": headline[0], "value": headline[1]},
            "versions": versions(),
            "device": device_name(device),
            "seconds": round(time.time() - self.began, 2),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            # What later phases depend on: what was asked and what came out, not when or how fast.
            "digest": digest([_science(values), self.inputs, {n: e["sha256"] for n, e in entries.items()}]),
        }
        write_json(self.folder / PENDING, manifest)
        # In batch the command line seals, once the executed notebook and the report are on disk, too.
        if os.environ.get("TINYONN_BATCH") != self.phase.name:
            seal(self.folder)
        self.lock.release()


_open: dict[Path, FileLock] = {}


def open_run(phase: Phase, params: Params, patience: float = 15.0) -> Run:
    """Take the phase's folder: check its inputs and lock it.

    `patience` (seconds) lets the kernel of a killed command notice that its parent is gone.
    """
    folder = folder_of(params.run, phase.name)
    inputs = input_digests(phase, params.model_dump())
    folder.mkdir(parents=True, exist_ok=True)
    lock = _open.setdefault(folder, FileLock(folder / ".lock"))
    if not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise BenchError(
                f"Another process is working on runs/{params.run}/{phase.name}: wait for it, shut down its kernel, "
                f"or choose another folder with run=NAME."
            ) from None
    (folder / PENDING).unlink(missing_ok=True)
    return Run(phase, params, folder, inputs, lock, time.time())


def known_runs() -> list[str]:
    """Names of the runs on disk, oldest first."""
    root = runs_root()
    folders = (
        [p for p in root.iterdir() if p.is_dir() and any((p / n).is_dir() for n in PHASES)] if root.is_dir() else []
    )
    return [p.name for p in sorted(folders, key=lambda p: p.stat().st_ctime)]
