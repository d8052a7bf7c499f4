"""Reports and the index, from small notebooks that never saw a kernel."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat.v4 as nbf
import pytest

from tinyonn_lib.errors import BenchError
from tinyonn_lib.workbench import index as index_module
from tinyonn_lib.workbench import words
from tinyonn_lib.workbench.figures import PLOTLY, THUMB_POINTS, figure_summary, thumbnail
from tinyonn_lib.workbench.index import build_index, publish
from tinyonn_lib.workbench.page import clean_html, number_text
from tinyonn_lib.workbench.report import build_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"


@dataclass(frozen=True)
class Phase:
    name: str
    number: int
    title: str


PHASES = [Phase("scan", 2, "What does each neuron do?"), Phase("router", 5, f"Does it route? {HOSTILE}")]


def status_of(run: Path, phase: Phase) -> str:
    """What `runs.status_of` would say of these fakes, whose phases are not the real ones."""
    folder = run / phase.name
    if (folder / "manifest.json").exists():
        return "done"
    return "unfinished" if (folder / "notebook.ipynb").exists() else "not run"


class Page(HTMLParser):
    """The elements of a page as a browser would see them: scripts apart from text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str, **having: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k.rstrip("_")) == v for k, v in having.items())]


def check_inert(page: Page) -> None:
    """Nothing is fetched and nothing runs but the scripts whose hashes the page's own policy names."""
    policy = page.all("meta")[1]["content"] or ""
    assert policy.startswith("default-src 'none'; script-src ")
    for attrs, code in page.scripts:
        assert not attrs.get("src")
        if attrs.get("type") != "application/json":
            assert base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in policy
        else:
            json.loads(code)
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "svg"}, tag
        assert not [name for name in attrs if name.startswith("on")], attrs
        assert (attrs.get("src") or "data:").startswith("data:"), attrs
        assert not (attrs.get("href") or "").lower().strip().startswith(("javascript:", "data:"))
        assert not re.search(r"url\(|@import", attrs.get("style") or "")
    for css in re.findall(r"<style>(.*?)</style>", page.source, flags=re.S):
        assert not re.search(r"url\(|@import|https?:", css)


def figure(points: int = 3, **meta: Any) -> Any:
    trace: dict[str, Any] = {"type": "scattergl", "mode": "markers", "x": list(range(points)), "y": list(range(points))}
    trace |= {"customdata": [HOSTILE, "<br</script>"], "meta": {HOSTILE: HOSTILE}}
    layout = {"title": {"text": f"A <b>title</b> {HOSTILE}"}, "width": 900, "height": 300, "meta": meta}
    return nbf.new_output("display_data", data={PLOTLY: {"data": [trace], "layout": layout}})


def stream(text: str, name: str = "stdout") -> Any:
    return nbf.new_output("stream", name=name, text=text)


def code(source: str, *outputs: Any, count: int | None = 1, tags: tuple[str, ...] = ()) -> Any:
    return nbf.new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


def manifest(run: str, phase: str, **more: Any) -> dict[str, Any]:
    base = {"phase": phase, "run": run, "params": {"run": run, "base": ""}, "changed": {}, "inputs": {}}
    rest = {"outputs": {"a.parquet": {"sha256": "0" * 64, "bytes": 2_500_000}}, "digest": f"{run}/{phase}"}
    return base | rest | {"seconds": 12.34, "device": "cpu", "headline": {"label": "neurons", "value": "1,536"}} | more


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(run: str, phase: str, *cells: Any, done: dict[str, Any] | None = None, **metadata: Any) -> Path:
        folder = tmp_path / "runs" / run / phase
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "notebook.ipynb"
        path.write_text(nbformat_json(cells, metadata), encoding="utf-8")
        if done is not None:
            (folder / "manifest.json").write_text(json.dumps(done), encoding="utf-8")
        return path

    return write


def nbformat_json(cells: tuple[Any, ...], metadata: dict[str, Any]) -> str:
    return json.dumps(nbf.new_notebook(cells=list(cells), metadata=metadata))


def report_of(notebook: Path) -> Page:
    out = notebook.parent / "report.html"
    build_report(notebook, out)
    assert out.stat().st_size < 15_000_000
    return Page(out)


def test_page_stands_alone_with_plotly_once(write: Write) -> None:
    table = {"columns": ["neuron", "norm"], "rows": [[7, 0.123456], [8, None]], "total": 1536}
    page = report_of(
        write(
            "demo", "scan",
            nbf.new_markdown_cell("# What does `each` neuron do?\n\nIntro, [a paper](https://example.org)."),
            *(nbf.new_markdown_cell(f"## {i}. Section") for i in range(3)),
            code("plots.show(fig)", figure(alt="Norms fall with depth.", table=table), figure(alt="Second.")),
            done=manifest("demo", "scan", changed={"tokens": [100, 200]}),
        )
    )  # fmt: skip
    check_inert(page)
    runs = [c for a, c in page.scripts if a.get("type") != "application/json"]
    assert sum("plotly.js v" in c for c in runs) == 1
    assert len(page.all("script", type="application/json")) == 2
    assert len(page.all("div", role="img")) == 2
    assert page.all("div", role="img")[0]["aria-label"] == "Norms fall with depth."
    assert "2 of 1,536 rows" in page.text
    assert "0.12346" in page.text
    assert page.text.count("What does each neuron do?") == 2  # the title and the heading
    assert "run demo" in page.text
    assert "12.3 s" in page.text
    assert "1 changed parameter" in page.text
    assert "3. Section" not in page.text
    assert "2. Section" in page.text
    assert page.all("nav")
    spec = json.loads(next(c for a, c in page.scripts if a.get("data-figure") == "1"))
    assert "width" not in spec["layout"]
    assert spec["layout"]["meta"] == {}


def test_code_is_folded_not_deleted(write: Write) -> None:
    page = report_of(
        write(
            "demo", "scan",
            code("tokens = 100; lr = 1e-3", tags=("parameters",)),
            code("tokens = 200\nlr = 1e-3", tags=("injected-parameters",)),
            code("answer = 42", stream("  5%|  \r100%|##", "stderr"), stream("\nWarning: old", "stderr")),
        )
    )  # fmt: skip
    assert len(page.all("details", class_="code")) == 3
    assert not [a for a in page.all("details", class_="code") if "open" in a]
    assert len(page.all("button")) == 1
    assert "answer" in page.text
    assert "Parameters and their defaults" in page.text
    assert "1 changed parameter" in page.text  # found by comparing the two cells, without a manifest
    assert "2 lines on the error stream" in page.text
    assert "5%" not in page.text.replace("100%", "")


def test_parameters_stand_in_one_place(write: Write) -> None:
    meanings = words.parameters({"tokens": "200"}, {"tokens": "100"}, {"tokens": "how much text"})
    done = manifest("demo", "scan", params={"tokens": 200}, versions={"torch": "2"})
    shown = nbf.new_output("display_data", data={"text/html": meanings, "text/plain": "<HTML>"})
    page = report_of(write("demo", "scan", code("start()", shown), done=done))
    check_inert(page)
    assert page.all("details", class_="parameters")
    assert "how much text" in page.text
    assert "200 (default 100)" in page.text
    assert "Versions" in page.text
    assert "Params" not in page.text
    assert "Params" in report_of(write("demo", "scan", code("start()"), done=done)).text  # of an earlier workbench


def test_hostile_text_stays_text(write: Write) -> None:
    frame = f"<style scoped>td {{}}</style><table class='dataframe'><tr><td>{HOSTILE}</td><td>1.5</td></tr></table>"
    bundles = [
        {"text/html": frame, "text/plain": "x"},
        {"text/markdown": HOSTILE + "[a](javascript:alert(4)) ![i](https://example.org/i.png)"},
        {"application/javascript": "alert(5)", "text/plain": "js"},
        {"text/vnd.mermaid": HOSTILE},
        {"text/latex": HOSTILE},
        {"image/svg+xml": "<svg onload='alert(6)'><script>alert(7)</script></svg>"},
        {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": HOSTILE},
    ]
    cell = code(
        f"x = '''{HOSTILE}'''", stream(HOSTILE), stream(HOSTILE, "stderr"),
        figure(alt=HOSTILE, table={"columns": [HOSTILE], "rows": [[HOSTILE]], "total": HOSTILE}), figure(),
        *(nbf.new_output("display_data", data=b, metadata={"image/png": {"width": "1 onerror=x"}}) for b in bundles),
        nbf.new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE, "\x1b[31mred\x1b[0m"]),
        tags=(HOSTILE.replace(",", ""),),
    )  # fmt: skip
    notebook = write(
        "demo", "scan", nbf.new_markdown_cell(f"# T {HOSTILE}\n\n{HOSTILE}\n\n## {HOSTILE}"), cell,
        done=manifest(HOSTILE, HOSTILE, device=HOSTILE, changed={HOSTILE: [HOSTILE, HOSTILE]}, metrics={"m": HOSTILE},
                      headline={"label": HOSTILE, "value": HOSTILE}, versions={HOSTILE: HOSTILE}),
        title=HOSTILE, authors=[{"name": HOSTILE}], widgets={"application/vnd.jupyter.widget-state+json": HOSTILE},
    )  # fmt: skip
    page = report_of(notebook)
    check_inert(page)
    assert len([a for a, _ in page.scripts if a.get("type") != "application/json"]) == 2
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "alert(5)" not in page.text
    label = json.loads(next(c for a, c in page.scripts if a.get("data-figure") == "1"))["layout"]["title"]["text"]
    assert "<b>title</b>" in label
    assert "<script" not in label
    assert "<img" not in label


def test_partial_notebook_says_so(write: Write) -> None:
    failed = nbf.new_output("error", ename="BenchError", evalue="no such file: texts.jsonl", traceback=["Error"])
    page = report_of(write("demo", "scan", code("a = 1"), code("load()", failed), code("later()", count=None)))
    assert "This phase did not finish." in page.text
    assert "Error: no such file: texts.jsonl" in page.text
    assert page.all("a", href="#cell-1")
    assert "not run" in page.text
    killed = {"papermill": {"start_time": "2026-01-01T00:00:00", "end_time": None, "exception": None}}
    assert (
        "It was interrupted." in report_of(write("demo", "scan", code("a = 1"), code("b", count=None), **killed)).text
    )
    assert "did not finish" not in report_of(write("demo", "scan", code("a = 1"))).text


def test_torn_notebook_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "notebook.ipynb").write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(BenchError, match="not a complete notebook"):
        build_report(tmp_path / "notebook.ipynb", tmp_path / "report.html")
    with pytest.raises(BenchError, match="no such file"):
        build_report(tmp_path / "nothing.ipynb", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_clean_html_keeps_what_reads_well() -> None:
    kept = "<h2 id='a'>A</h2><table class='dataframe'><thead><tr><th>n</th></tr></thead><tr><td>1.5</td></tr></table>"
    assert 'id="a"' in clean_html(kept)
    assert '<td class="n">1.5</td>' in clean_html(kept)
    assert clean_html("<img src='https://example.org/x.png' alt='a><script>'>") == "[picture left out]"
    assert "data:image/png;base64,AAAA" in clean_html("<img src='data:image/png;base64,AAAA'>")
    assert [number_text(v) for v in (None, 3, 0.1234567, float("nan"), True)] == ["–", "3", "0.12346", "–", "True"]


def test_thumbnail_is_the_bare_shape() -> None:
    packed = {"dtype": "f8", "bdata": base64.b64encode(b"\0" * 8 * 9000).decode()}
    trace = {
        "type": "scattergl",
        "x": packed,
        "y": packed,
        "text": ["t"] * 9000,
        "marker": {"color": packed, "size": 9},
    }
    small = thumbnail({"data": [trace], "layout": {"title": {"text": "T"}, "xaxis": {"type": "log", "title": "x"}}})
    assert small["data"][0]["type"] == "scatter"
    assert len(small["data"][0]["x"]) == len(small["data"][0]["marker"]["color"]) <= THUMB_POINTS
    assert "text" not in small["data"][0]
    assert small["layout"]["xaxis"] == {"type": "log", "visible": False}
    assert figure_summary({"data": [], "layout": {"title": {"text": "No <b>meta</b>"}}}, 1)["table"] is None
    image = {"data": [], "layout": {"images": [{"source": "https://example.org/x.png"}]}}
    assert figure_summary(image, 1)["spec"]["layout"]["images"] == []


def test_index_has_a_card_per_phase(write: Write, tmp_path: Path) -> None:
    write("demo", "scan", code("x", figure(alt="first"), figure(alt="marked", thumbnail=True)),
          done=manifest("demo", "scan", changed={"tokens": [100, 200], "run": ["default", "demo"]}))  # fmt: skip
    error = nbf.new_output("error", ename="ValueError", evalue=f"bad {HOSTILE}", traceback=[])
    write("demo", "router", code("x", error))
    build_index(tmp_path / "runs", tmp_path / "reports" / "index.html", PHASES, status_of)
    page = Page(tmp_path / "reports" / "index.html")
    check_inert(page)
    assert len(page.all("li")) == 2
    assert [a["aria-label"] for a in page.all("div", role="img")] == ["marked"]
    for word in ("done", "unfinished", "1,536", "tokens = 200", "12.3 s", "2.5 MB", "bad </script>", "1 of 2 phases"):
        assert word in page.text, word
    assert "run = demo" not in page.text


def test_sweeps_are_a_table(write: Write, tmp_path: Path) -> None:
    write("demo", "scan", done=manifest("demo", "scan"))
    for lr in (1e-2, 1e-3, 3e-3):
        changed = {"lr": [5e-4, lr], "steps": [100, 400], "base": ["", "demo"]}
        params = {"run": f"lr={lr}", "base": "demo"}
        done = manifest(f"lr={lr}", "router", params=params, changed=changed, inputs={"scan": "demo/scan"},
                        headline={"label": "ΔNLL", "value": f"+{lr}"})  # fmt: skip
        write(f"lr={lr}", "router", code("x"), done=done)
    page = Page(publish(tmp_path / "runs", tmp_path / "reports", PHASES, status_of))
    check_inert(page)
    text = page.text[page.text.index("Variations of demo") : page.text.index("Seconds per phase")]
    rows = [text.index(name) for name in ("demo (base)", "lr=0.001", "lr=0.003", "lr=0.01")]
    assert rows == sorted(rows)
    assert "router.lr" in text
    assert "router.steps = 400" in text
    assert "stale" not in text
    assert "+0.003" in text
    assert len(page.all("li")) == 2  # only the base run has cards
    assert page.all("a", href="lr%3D0.01/router.html")
    assert (tmp_path / "reports" / "lr=0.01" / "router.html").exists()


def test_publish_does_only_what_is_due(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def spy(notebook: Path, out: Path) -> None:
        built.append(notebook.parent.name)
        build_report(notebook, out)

    monkeypatch.setattr(index_module, "build_report", spy)
    scan = write("demo", "scan", code("x", figure()), done=manifest("demo", "scan"))
    write("demo", "router", code("x"), done=manifest("demo", "router"))
    torn = write("torn", "scan")
    torn.write_text("{", encoding="utf-8")
    runs, reports = tmp_path / "runs", tmp_path / "reports"
    index = publish(runs, reports, PHASES, status_of)
    assert built == ["scan", "router", "scan"]
    assert "unfinished" in Page(index).text
    assert Page(reports / "demo" / "scan.html").all("a", href="../index.html")
    torn.unlink()
    publish(runs, reports, PHASES, status_of)
    before, began = index.stat().st_mtime_ns, time.perf_counter()
    assert publish(runs, reports, PHASES, status_of) == index
    assert time.perf_counter() - began < 0.5
    assert len(built) == 3
    assert index.stat().st_mtime_ns == before
    os.utime(scan, (time.time() + 5, time.time() + 5))
    publish(runs, reports, PHASES, status_of)
    assert built[3:] == ["scan"]
    assert index.stat().st_mtime_ns > before


def test_no_runs_yet(tmp_path: Path) -> None:
    page = Page(publish(tmp_path / "runs", tmp_path / "reports", PHASES, status_of))
    assert "No runs yet." in page.text
    assert not page.scripts
