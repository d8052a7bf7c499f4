"""`reports/index.html`: every run at a glance, a card per phase, with copies of the reports beside it.

The folder holds nothing but relative links, so it can be zipped and sent. Everything comes from the files of the runs;
nothing here starts, changes or judges a run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench.figures import PLOTLY, alt_text, is_thumbnail, thumbnail
from tinyonn_lib.workbench.page import (
    TEMPLATE,
    number_text,
    page_scripts,
    read_manifest,
    seconds_text,
    short_text,
    size_text,
    write_atomic,
)
from tinyonn_lib.workbench.report import build_report
from tinyonn_lib.workbench.sweeps import sweep_table, times_table

_WATCHED = ("notebook.ipynb", "manifest.json", "report.html")
# What pages are made of besides runs: an upgrade of the bench renews them.
_LOOK = [
    *sorted(TEMPLATE.iterdir()),
    *(TEMPLATE.parent / f"{n}.py" for n in ("report", "index", "page", "figures", "sweeps")),
]


class PhaseInfo(Protocol):
    """What the index needs to know of a phase."""

    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def title(self) -> str: ...


# (runs/<run>, phase) -> "done", "stale", "unfinished" or "not run"
StatusOf = Callable[[Path, Any], str]


def publish(runs_root: Path, reports_root: Path, phases: Sequence[PhaseInfo], status_of: StatusOf) -> Path:
    """Build missing and outdated reports, copy them to `reports_root/<run>/<phase>.html`, write the index; its path.

    Looks only at time stamps when nothing changed. A notebook that cannot be read (torn by a kill) gets no report.
    """
    look = max(_mtime(path) for path in _LOOK)
    for run in _runs(runs_root, phases):
        for phase in phases:
            notebook, manifest, report = (run / phase.name / name for name in _WATCHED)
            if not notebook.exists():
                continue
            try:
                if _mtime(report) < max(_mtime(notebook), _mtime(manifest), look):
                    build_report(notebook, report)
            except BenchError:
                continue
            _copy(report, reports_root / run.name / f"{phase.name}.html")
    index = reports_root / "index.html"
    if not _is_current(index, _state(runs_root, phases, status_of)):
        build_index(runs_root, index, phases, status_of)
    return index


def build_index(runs_root: Path, out: Path, phases: Sequence[PhaseInfo], status_of: StatusOf) -> None:
    """Write the overview of all runs under `runs_root` to `out`; reports are linked where `publish` has put them."""
    import jinja2

    plain: list[dict[str, Any]] = []
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for run in _runs(runs_root, phases):
        cards = [_card(run, phase, out.parent, status_of(run, phase)) for phase in phases]
        base = base_of(run, phases)
        if base:
            sweeps.setdefault(base, []).append({"name": run.name, "cards": cards})
        else:
            plain.append({"name": run.name, "cards": cards, "facts": _run_facts(cards)})
    specs: list[tuple[int, Any]] = []
    for run_view in plain:
        for card in run_view["cards"]:
            figure, why = _glance(runs_root / run_view["name"] / card["name"])
            card |= {"thumb": len(specs) if figure else None, "alt": alt_text(figure) if figure else ""}
            card["why"] = why if card["status"] == "unfinished" else ""
            if figure:
                specs.append((len(specs), thumbnail(figure)))
    scripts = page_scripts("index.js" if specs else "", specs)
    every = plain + [row for rows in sweeps.values() for row in rows]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE), autoescape=True, trim_blocks=True)
    text = environment.get_template("index.html.j2").render(
        csp=scripts.csp, css=(TEMPLATE / "style.css").read_text(encoding="utf-8"), scripts=scripts.html,
        state=_state(runs_root, phases, status_of), runs=plain, times=times_table(every),
        sweeps=[sweep_table(base, rows, plain) for base, rows in sweeps.items()],
        facts=[f"{len(every)} run{'s' * (len(every) != 1)}", f"{len(phases)} phases"],
    )  # fmt: skip
    write_atomic(out, text)


def base_of(run: Path, phases: Sequence[PhaseInfo]) -> str:
    """The run that this one varies, or an empty string."""
    for phase in phases:
        params = read_manifest(run / phase.name).get("params") or {}
        if params.get("base") and params["base"] != run.name:
            return str(params["base"])
    return ""


def _runs(runs_root: Path, phases: Sequence[PhaseInfo]) -> list[Path]:
    """Run folders with at least one phase, by name."""
    if not runs_root.is_dir():
        return []
    names = {phase.name for phase in phases}
    found = [
        r for r in runs_root.iterdir() if r.is_dir() and r.name[0] not in "._" and any((r / n).is_dir() for n in names)
    ]
    return sorted(found, key=lambda run: run.name)


def _card(run: Path, phase: PhaseInfo, root: Path, status: str) -> dict[str, Any]:
    manifest = read_manifest(run / phase.name)
    link = f"{quote(run.name)}/{quote(phase.name)}.html"
    changed = {
        k: v for k, v in (manifest.get("changed") or {}).items()
        if k not in ("run", "base") and isinstance(v, list) and len(v) == 2
    }  # fmt: skip
    outputs = [o.get("bytes", 0) for o in (manifest.get("outputs") or {}).values() if isinstance(o, dict)]
    headline = manifest.get("headline")
    facts = [seconds_text(manifest.get("seconds")), size_text(sum(outputs)) if outputs else ""]
    return {
        "name": phase.name,
        "number": phase.number,
        "title": phase.title,
        "status": status,
        "link": link if (root / run.name / f"{phase.name}.html").exists() else "",
        "headline": headline if isinstance(headline, dict) else None,
        "values": changed,
        "changed": [short_text(f"{k} = {number_text(v[1])}") for k, v in changed.items()],
        "seconds": manifest.get("seconds"),
        "finished": str(manifest.get("finished") or "")[:16].replace("T", " "),
        "facts": [f for f in facts if f],
    }


def _run_facts(cards: list[dict[str, Any]]) -> list[str]:
    done = sum(card["status"] == "done" for card in cards)
    last = max((card["finished"] for card in cards), default="")
    total = sum(card["seconds"] or 0 for card in cards)
    return [f for f in (f"{done} of {len(cards)} phases done", seconds_text(total) if total else "", last) if f]


def _glance(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The figure that stands for the phase (the one marked as thumbnail, else the first), and its error, if any."""
    try:
        cells = json.loads((folder / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        figures = [o["data"][PLOTLY] for o in outputs if isinstance(o.get("data", {}).get(PLOTLY), dict)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None, ""
    errors = [str(o.get("evalue") or o.get("ename")) for o in outputs if o.get("output_type") == "error"]
    figure = next((f for f in figures if is_thumbnail(f)), figures[0] if figures else None)
    return figure, short_text(errors[0], 160) if errors else ""


# -- files ---------------------------------------------------------------------------------------------------------


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _copy(report: Path, target: Path) -> None:
    """Copy with a link back to the index, unless the copy is of this very version."""
    if _mtime(target) == _mtime(report):
        return
    back = b'<a href="../index.html">All reports</a>'
    write_atomic(target, report.read_bytes().replace(b"<!--tinyonn:nav-->", back, 1))
    stat = report.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _state(runs_root: Path, phases: Sequence[PhaseInfo], status_of: StatusOf) -> str:
    """A short hash of everything the index shows, by time stamps and statuses."""
    parts = [f"{p.name} {p.number} {p.title}" for p in phases]
    parts += [f"{path.name} {_mtime(path)}" for path in _LOOK]
    for run in _runs(runs_root, phases):
        for phase in phases:
            stamps = [_mtime(run / phase.name / name) for name in _WATCHED]
            parts.append(f"{run.name} {phase.name} {stamps} {status_of(run, phase)}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:24]


def _is_current(index: Path, state: str) -> bool:
    try:
        with index.open("rb") as file:
            return f'name="tinyonn-state" content="{state}"'.encode() in file.read(4096)
    except OSError:
        return False
