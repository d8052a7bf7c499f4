"""One executed notebook in, one HTML page out that opens anywhere: no network, no server, no second file.

The notebook is reduced to a plain summary (title, facts, figures, cells with safe outputs), then rendered by a small
template that escapes everything. A content security policy in the page forbids every request and every script but our
own, so text that slipped through somewhere could still do nothing.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import words
from tinyonn_lib.workbench.figures import PLOTLY, figure_summary
from tinyonn_lib.workbench.page import (
    TEMPLATE,
    clean_html,
    number_text,
    page_scripts,
    read_manifest,
    seconds_text,
    size_text,
    write_atomic,
)

LIMIT = 15_000_000  # bytes: what mail servers commonly still accept
TEXT_LIMIT = 200_000  # characters of one output: more is a log file, not a report
# Best first. Anything else (widgets, javascript, mermaid) has no safe static form and is left out.
_SHOWN = [PLOTLY, "text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]
_WIDGET = "application/vnd.jupyter.widget-view+json"
_log = logging.getLogger(__name__)


def build_report(notebook: Path, out: Path) -> None:
    """Write the executed `notebook` as one self-contained HTML page to `out`.

    A `manifest.json` beside the notebook adds the run's name, time, device, changed parameters and metrics; without
    one the page says what the notebook itself knows. Raises `BenchError` when the notebook cannot be read.
    """
    nb = read_notebook(notebook)
    # While a phase is being sealed its manifest is still under the pending name.
    manifest = read_manifest(notebook.parent) or read_manifest(notebook.parent, ".manifest.json")
    page = _summary(nb, manifest, notebook)
    page["figures"] = _simplify(nb)
    scripts = page_scripts("report.js", [(fig["number"], fig.pop("spec")) for fig in page["figures"]])
    page |= {"csp": scripts.csp, "css": (TEMPLATE / "style.css").read_text(encoding="utf-8")}
    # The scripts go in last: nbconvert parses and prints the whole page again, and plotly.js alone has 5 MB.
    write_atomic(out, _render(nb, page).replace("<!--tinyonn:scripts-->", scripts.html, 1))
    if out.stat().st_size > LIMIT:
        _log.warning("%s has %.1f MB: thin out its figures", out.name, out.stat().st_size / 1e6)


def read_notebook(path: Path) -> Any:
    """The notebook as nbformat's version 4 node; `BenchError` when it is missing, torn or no notebook."""
    import nbformat

    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (OSError, ValueError, KeyError, AttributeError, nbformat.reader.NotJSONError) as err:
        why = "no such file" if isinstance(err, FileNotFoundError) else "not a complete notebook"
        raise BenchError(f"{path}: {why}; run the phase again") from err


# -- the summary ---------------------------------------------------------------------------------------------------


def _summary(nb: Any, manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """What stands above and below the cells. Takes the H1 out of the notebook: the header prints it."""
    changed = manifest.get("changed")
    if not isinstance(changed, dict):
        changed = _changed_by_injection(nb)
    finished = str(manifest.get("finished") or "").replace("T", " ")[:16]
    facts = [seconds_text(manifest.get("seconds")), str(manifest.get("device") or ""), finished]
    folder = path.absolute().parent if path.name == "notebook.ipynb" else Path()  # runs/<run>/<phase>
    run, phase = str(manifest.get("run") or folder.parent.name), str(manifest.get("phase") or folder.name)
    unfinished = _unfinished(nb)
    toc = _prepare_text(nb)
    return {
        "title": toc.pop(0)["text"] or path.stem.replace("_", " "),
        "run": run,
        "eyebrow": [f for f in (f"run {run}" if run else "", phase) if f],
        "headline": manifest["headline"] if isinstance(manifest.get("headline"), dict) else None,
        "facts": [f for f in facts if f],
        "changed": [[k, *map(number_text, v)] for k, v in changed.items() if isinstance(v, list) and len(v) == 2],
        "unfinished": unfinished,
        "toc": toc if len(toc) > 2 else [],
        "made": _made({k: v for k, v in manifest.items() if k != "params" or not _shows_parameters(nb)}),
        "has_code": any(c.cell_type == "code" and c.source.strip() for c in nb.cells),
    }


def _shows_parameters(nb: Any) -> bool:
    """Whether the table that `start` shows, values and meanings, stands among the cells."""
    data = [o.get("data", {}) for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    return any(str(d.get("text/html", "")).startswith(words.PARAMETERS) for d in data)


def _made(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    parts = []
    for key, head in (("metrics", "metric"), ("params", "parameter"), ("versions", "package"), ("inputs", "phase")):
        if isinstance(manifest.get(key), dict) and manifest[key]:
            rows = [[k, number_text(v)] for k, v in manifest[key].items()]
            parts.append({"title": key.capitalize(), "head": [head, "value"], "rows": rows})
    outputs = manifest.get("outputs")
    if isinstance(outputs, dict) and outputs:
        files = [(k, v) for k, v in outputs.items() if isinstance(v, dict)]
        rows = [[k, size_text(v.get("bytes")), str(v.get("sha256", ""))[:16]] for k, v in files]
        parts.append({"title": "Files", "head": ["file", "size", "sha256"], "rows": rows})
    return parts


def _changed_by_injection(nb: Any) -> dict[str, list[Any]]:
    """Parameters that papermill's injected cell sets differently from the `parameters` cell."""
    values: dict[str, dict[str, Any]] = {"parameters": {}, "injected-parameters": {}}
    for cell in nb.cells:
        for tag in set(values) & set(cell.metadata.get("tags") or []):
            try:
                for node in ast.parse(cell.source).body:
                    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                    if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                        values[tag][target.id] = ast.literal_eval(node.value)
            except (SyntaxError, ValueError):
                continue
    default, injected = values["parameters"], values["injected-parameters"]
    return {k: [default.get(k), v] for k, v in injected.items() if k not in default or default[k] != v}


def _unfinished(nb: Any) -> dict[str, str] | None:
    """Why the notebook stopped before its end, if it did: an error, a kill, or cells that were not run by hand."""
    code = [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.strip()]
    for i, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                return {"why": _error_text(output), "anchor": f"cell-{i}"}
    papermill = nb.metadata.get("papermill")
    if papermill:
        if papermill.get("exception") or (papermill.get("start_time") and not papermill.get("end_time")):
            left = [i for i, c in code if not c.get("execution_count")]
            return {"why": "It was interrupted.", "anchor": f"cell-{left[0]}" if left else ""}
        return None
    left = [i for i, c in code if not c.get("execution_count") and not c.outputs]
    if left and len(left) < len(code):
        return {"why": f"{len(left)} of its {len(code)} code cells were not run.", "anchor": f"cell-{left[0]}"}
    return None


def _error_text(output: Any) -> str:
    name = "Error" if output.get("ename") == "BenchError" else output.get("ename", "Error")
    text = f"{name}: {output.get('evalue', '')}"
    return text if len(text) < 600 else text[:600] + " …"


def _prepare_text(nb: Any) -> list[dict[str, str]]:
    """Title, then sections, as contents entries. The title's line leaves its cell, papermill's error notes go."""
    title, entries = "", []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        if "papermill-error-cell-tag" in (cell.metadata.get("tags") or []):
            cell.source = ""  # the banner says it better
        heading = re.match(r"\s*# +(.+)\n?", cell.source)
        if heading and not title:
            title = _plain(heading[1])
            cell.source = cell.source[heading.end() :]
        outside_code = re.sub(r"^```.*?^```", "", cell.source, flags=re.S | re.M)
        entries += [
            {"text": _plain(h), "anchor": f"cell-{i}"} for h in re.findall(r"^## +(.+)$", outside_code, flags=re.M)
        ]
    return [{"text": title, "anchor": ""}, *entries]


def _plain(markdown: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"[`*]|(?<!\w)_|_(?!\w)", "", text).strip().rstrip("#").strip()


# -- the cells -----------------------------------------------------------------------------------------------------


def _simplify(nb: Any) -> list[dict[str, Any]]:
    """Bring each cell to the few forms the template knows, drop all foreign metadata, and return the figures."""
    import nbformat

    figures: list[dict[str, Any]] = []
    left = {i for i, c in enumerate(nb.cells) if c.cell_type == "code" and not c.outputs and not c.execution_count}
    for i, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags") or []
        took = (cell.metadata.get("papermill") or {}).get("duration")
        label = "Parameters of this run" if "injected-parameters" in tags else "Code"
        cell.metadata = nbformat.from_dict({
            "anchor": f"cell-{i}",
            "label": "Parameters and their defaults" if "parameters" in tags else label,
            "time": "not run" if i in left else seconds_text(took) if took and took >= 1 else "",
        })  # fmt: skip
        if cell.cell_type == "code":
            outputs = [_output(o, figures) for o in _merge_streams(cell.outputs)]
            cell.outputs = [nbformat.from_dict(o) for o in outputs if o]
    nb.cells = [c for c in nb.cells if c.cell_type == "code" or c.source.strip()]
    nb.metadata = nbformat.from_dict({"language_info": {"name": "python", "pygments_lexer": "python"}})
    return figures


def _merge_streams(outputs: list[Any]) -> list[Any]:
    """Adjacent pieces of one stream joined, then each line cut to what a progress bar left standing."""
    merged: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n")]
            output.text = _short("\n".join(lines).strip("\n"))
    return merged


def _output(output: Any, figures: list[dict[str, Any]]) -> dict[str, Any] | None:
    if output.output_type == "stream":
        lines = output.text.count("\n") + 1
        label = f"{lines} line{'s' * (lines > 1)} on the error stream"
        return {**output, "metadata": {"label": label}} if output.text.strip() else None
    if output.output_type == "error":
        return {**output, "metadata": {"label": _error_text(output)}}
    shown: dict[str, Any] = {"output_type": "display_data", "data": {}, "metadata": {}}
    kind = next((k for k in _SHOWN if output.data.get(k)), None)
    if _WIDGET in output.data:  # its text form is a repr; a bar that ended has nothing to say at all
        if re.search(r"\d+%\||it/s", str(output.data.get("text/plain", ""))):
            return None
        return shown | {"metadata": {"note": "Open the notebook in JupyterLab to use the control that stands here."}}
    if kind is None:
        return None
    value = output.data[kind]
    if kind == PLOTLY and isinstance(value, dict):
        figures.append(figure_summary(value, len(figures) + 1))
        return shown | {"data": {"text/plain": "figure"}, "metadata": {"figure": len(figures) - 1}}
    return shown | {"data": {kind: _short(str(value)) if kind.startswith("text/") else value}}


def _short(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}\n… {len(text) - TEXT_LIMIT:,} more characters"


def _render(nb: Any, page: dict[str, Any]) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATE.parent)], template_name=TEMPLATE.name, template_file="report.html.j2",
        sanitize_html=True, exclude_anchor_links=True, embed_images=False,
        filters={"clean_html": clean_html},
    )  # fmt: skip
    body, _ = exporter.from_notebook_node(nb, resources={"report": page})
    return str(body)
