"""What every figure has in common: colours, the template, words and table for a report, heat maps, samples of points.

Every figure carries in `layout.meta` what a report needs beside the picture: `alt` (one sentence that says what is to
be seen), `table` (the numbers behind it) and `thumbnail` (whether it stands for its phase on the index page).
"""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

ACCENT, INK, QUIET = "#0b6e6e", "#22313f", "#8a97a3"
PALETTE = ("#0b6e6e", "#d1682e", "#5b5ea6", "#3b8f4c", "#b23a6f", "#7a6a53", "#2f7fbf", "#c2a11f")
DIVERGING = "RdBu_r"
SEQUENTIAL = "Viridis"
TABLE_ROWS = 80
MAP_SAMPLE = 20_000

_AXIS = {
    "gridcolor": "#e8ecef",
    "zerolinecolor": "#c9d1d8",
    "ticks": "outside",
    "tickcolor": "#c9d1d8",
    "automargin": True,
}
pio.templates["tinyonn"] = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "colorway": PALETTE,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 64, "r": 24, "t": 56, "b": 52},
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 15}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": -0.2, "x": 0},
        "height": 420,
    }
)


ABOVE = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
"""A legend over the right end of a low figure: below, it would lie on the axis."""


def describe(figure: go.Figure, alt: str, table: pd.DataFrame, *, thumbnail: bool = False) -> go.Figure:
    """Give a figure its alt text and its table (first rows; the total is kept)."""
    shown = table.head(TABLE_ROWS)
    rows = [[_plain(v) for v in row] for row in shown.itertuples(index=False)]
    figure.update_layout(
        template="tinyonn",
        meta={
            "alt": alt,
            "table": {"columns": [str(c) for c in shown.columns], "rows": rows, "total": len(table)},
            "thumbnail": thumbnail,
        },
    )
    return figure


def _plain(value: Any) -> str | float | int:
    if isinstance(value, (np.integer, int)):
        return int(value)
    if isinstance(value, (np.floating, float)):
        return float(f"{value:.4g}")
    return str(value)


def stratified(table: pd.DataFrame, size: int, by: str = "layer", seed: int = 0) -> pd.DataFrame:
    """At most `size` rows, the same share of every group."""
    if len(table) <= size:
        return table
    return table.groupby(by).sample(frac=size / len(table), random_state=seed)


def density(figure: go.Figure, x: pd.Series, y: pd.Series, bins: int) -> None:
    """A grey picture of how many points are where, counted here: the page need not carry the points."""
    counts, xs, ys = np.histogram2d(x, y, bins=bins)
    figure.add_heatmap(
        z=np.log1p(counts.T).astype(np.float32),
        x=(xs[:-1] + xs[1:]) / 2,
        y=(ys[:-1] + ys[1:]) / 2,
        colorscale="Greys",
        showscale=False,
        hoverinfo="skip",
    )


def heat(
    table: pd.DataFrame, *, title: str, unit: str, alt: str, scale: str, span: float | None = None, digits: str = ".3g"
) -> go.Figure:
    """Heat map of a frame whose index is the row axis and whose columns are the column axis."""
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[html.escape(str(c)) for c in table.columns],
            y=[html.escape(str(i)) for i in table.index],
            colorscale=scale,
            zmin=None if span is None else -span,
            zmax=span,
            colorbar={"title": {"text": unit}},
            texttemplate=f"%{{z:{digits}}}" if table.size <= 120 else None,
        )
    )
    figure.update_layout(title=title)
    figure.update_yaxes(autorange="reversed", type="category", title=table.index.name)
    figure.update_xaxes(type="category", title=table.columns.name)
    return describe(figure, alt, table.reset_index())
