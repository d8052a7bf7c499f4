"""plotly figures as notebooks store them: their words and table for a page, their shape alone for a thumbnail."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tinyonn_lib.workbench.page import number_text

PLOTLY = "application/vnd.plotly.v1+json"
TABLE_ROWS = 500  # a table in a page is for reading; the artefacts have the rest
THUMB_POINTS = 1200  # points per trace in a picture of 300 px

Spec = dict[str, Any]

# plotly reads a little HTML in its labels and silently swallows any tag it does not know, such as a token "<pad>".
_UNKNOWN_TAG = re.compile(r"<(?!/?(?:br|b|i|em|strong|s|u|sub|sup|span|a|extra)\b[^<]*>)")


def _labels(value: Any) -> Any:
    """`value` with every unknown tag in its strings made visible text."""
    if isinstance(value, str):
        return _UNKNOWN_TAG.sub("&lt;", value) if "<" in value else value
    if isinstance(value, dict):
        return {k: _labels(v) for k, v in value.items()}
    return [_labels(v) for v in value] if isinstance(value, list) else value


def figure_summary(spec: Spec, number: int) -> dict[str, Any]:
    """What the template needs of one figure: alt text, table, height and the cleaned plotly spec."""
    layout = dict(spec.get("layout") or {})
    meta = _meta(layout)
    layout["meta"] = {k: v for k, v in meta.items() if k not in {"alt", "table", "thumbnail"}}
    # A fixed width would not fit a phone; a picture from elsewhere would be a request.
    layout.pop("width", None)
    layout["autosize"] = True
    layout["images"] = [
        image for image in layout.get("images") or [] if str(image.get("source", "")).startswith("data:image/")
    ]
    data = [t for t in spec.get("data") or [] if isinstance(t, dict)]
    height = layout.get("height")
    return {
        "number": number,
        "alt": alt_text(spec),
        "table": _table(meta.get("table")),
        "height": int(height) if isinstance(height, int | float) and 0 < height < 5000 else 450,
        "gl": any(str(t.get("type", "")).endswith("gl") or "3d" in str(t.get("type", "")) for t in data),
        "spec": _labels({"data": data, "layout": layout, "frames": spec.get("frames") or []}),
    }


def _meta(layout: Mapping[str, Any]) -> dict[str, Any]:
    meta = layout.get("meta")
    return meta if isinstance(meta, dict) else {}


def alt_text(spec: Spec) -> str:
    """The sentence that stands for the figure: `layout.meta["alt"]`, else its title, without markup."""
    layout = spec.get("layout") or {}
    title = layout.get("title")
    title = title.get("text") if isinstance(title, dict) else title
    given = _meta(layout).get("alt")
    return str(given) if given else re.sub(r"<[^>]+>", " ", str(title or "A figure without a description.")).strip()


def is_thumbnail(spec: Spec) -> bool:
    return bool(_meta(spec.get("layout") or {}).get("thumbnail"))


def _table(table: Any) -> dict[str, Any] | None:
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
        return None
    rows = [row for row in table["rows"] if isinstance(row, list | tuple)][:TABLE_ROWS]
    numeric = [all(isinstance(v, int | float | None) for v in column) for column in zip(*rows, strict=False)]
    total = table.get("total")
    total = total if isinstance(total, int) and total > len(rows) else max(len(rows), len(table["rows"]))
    return {
        "columns": [{"text": str(c), "number": n} for c, n in zip_longest(table.get("columns") or [], numeric)],
        "rows": [[{"text": number_text(v), "number": isinstance(v, int | float)} for v in row] for row in rows],
        "caption": f"{len(rows):,} of {total:,} rows" if total > len(rows) else f"{total:,} row{'s' * (total != 1)}",
    }


def thumbnail(spec: Spec) -> Spec:
    """The figure's shape alone, for 300 px: every trace, thinned, without axes, labels, legend or colour bar."""
    spec = figure_summary(spec, 0)["spec"]
    layout = {k: v for k, v in spec["layout"].items() if k in {"template", "barmode", "colorway", "shapes", "bargap"}}
    for key, value in spec["layout"].items():
        if re.match(r"[xy]axis\d*$", key) and isinstance(value, dict):
            kept = {k: value[k] for k in ("type", "range", "domain", "anchor", "overlaying", "matches") if k in value}
            layout[key] = {**kept, "visible": False}
        elif re.match(r"coloraxis\d*$", key) and isinstance(value, dict):
            layout[key] = {**value, "showscale": False}
    for key in ("xaxis", "yaxis"):
        layout.setdefault(key, {"visible": False})
    layout |= {"margin": {"l": 14, "r": 14, "t": 12, "b": 12}, "showlegend": False, "autosize": True}
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "title": {"text": ""}}
    return {"data": [_thin(trace) for trace in spec["data"]], "layout": layout}


def _thin(trace: Spec) -> Spec:
    """One trace with at most `THUMB_POINTS` points, without text, and drawn as SVG: a page full of WebGL goes blank."""
    drop = {"text", "customdata", "hovertext", "hovertemplate", "ids", "texttemplate", "error_x", "error_y", "z"}
    kind = str(trace.get("type", "scatter"))
    flat = kind in {"scatter", "scattergl", "bar", "histogram", "box", "violin"}
    thin = {k: v for k, v in trace.items() if not (flat and k in drop)}
    thin["showscale" if kind in {"heatmap", "contour"} else "showlegend"] = False
    if not flat:
        return thin
    thin["type"] = "scatter" if kind == "scattergl" else kind
    columns = {k: _decode(v) for k, v in thin.items()}
    length = max((len(v) for v in columns.values() if isinstance(v, list)), default=0)
    step = max(1, math.ceil(length / THUMB_POINTS))

    def cut(value: Any) -> Any:
        value = _decode(value)
        return value[::step] if isinstance(value, list) and len(value) == length and length > 20 else value

    for key, value in thin.items():
        if key == "marker" and isinstance(value, dict):
            value = {k: cut(v) for k, v in value.items()} | {"showscale": False}
            if isinstance(value.get("size"), int | float):
                value["size"] = min(value["size"], 4)
        thin[key] = cut(value)
    return thin


def _decode(value: Any) -> Any:
    """plotly's packed arrays ({"dtype", "bdata"}) as a list, anything else unchanged."""
    if not isinstance(value, dict) or not isinstance(value.get("bdata"), str):
        return value
    import numpy as np

    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(str(value.get("dtype", "f8"))))
    rounded: Sequence[Any] = (array.round(6) if array.dtype.kind == "f" else array).tolist()
    return rounded
