"""Tables over runs for the index: runs that vary one base run side by side, and the time that each phase took."""

from __future__ import annotations

from typing import Any

from tinyonn_lib.workbench.page import number_text, short_text


def sweep_table(base: str, rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """One row per run: the parameters in which the runs differ, then the headline of each phase they ran."""
    used = [i for i, _ in enumerate(rows[0]["cards"]) if any(r["cards"][i]["status"] != "not run" for r in rows)]
    for row in rows:
        row["values"] = {f"{c['name']}.{k}": v for c in row["cards"] for k, v in c["values"].items()}
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    texts = {key: {number_text(row["values"].get(key, [None, None])[1]) for row in rows} for key in keys}
    varied = [key for key in keys if len(texts[key]) > 1 or len(rows) == 1]
    default = {key: row["values"][key][0] for row in rows for key in row["values"]}

    def order(row: dict[str, Any]) -> list[tuple[bool, float, str]]:  # numbers by size, not "1.0e-2" before "1.0e-3"
        values = [row["values"].get(key, [None, default[key]])[1] for key in varied]
        return [(isinstance(v, str), v if isinstance(v, int | float) else 0.0, str(v)) for v in values]

    def view(row: dict[str, Any], name: str, values: dict[str, Any]) -> dict[str, Any]:
        cells = [row["cards"][i] for i in used]
        return {
            "name": name,
            "params": [number_text(values.get(key, [None, default[key]])[1]) for key in varied],
            "cells": [None if c["status"] == "not run" else _cell(c) for c in cells],
        }

    first = [view(run, f"{base} (base)", {}) for run in plain if run["name"] == base]
    return {
        "base": base,
        "params": varied,
        "phases": [rows[0]["cards"][i]["name"] for i in used],
        "common": [short_text(f"{k} = {next(iter(texts[k]))}") for k in keys if k not in varied],
        "rows": first + [view(row, row["name"], row["values"]) for row in sorted(rows, key=order)],
    }


def _cell(card: dict[str, Any]) -> dict[str, str]:
    headline = card["headline"] or {}
    text = str(headline.get("value") or "report")
    return {"text": text, "label": str(headline.get("label", "")), "link": card["link"], "status": card["status"]}


def times_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each phase of each run; phases that nobody has timed have no column."""
    timed = [r for r in runs if any(isinstance(c["seconds"], int | float) for c in r["cards"])]
    used = [i for i, _ in enumerate(timed[0]["cards"]) if any(r["cards"][i]["seconds"] for r in timed)] if timed else []
    rows = []
    for run in timed:
        seconds = [run["cards"][i]["seconds"] for i in used]
        text = [f"{s:,.1f}" if isinstance(s, int | float) else "" for s in seconds]
        rows.append({"name": run["name"], "seconds": text, "total": f"{sum(s or 0 for s in seconds):,.1f}"})
    return {"phases": [timed[0]["cards"][i]["name"] for i in used] if timed else [], "rows": rows}
