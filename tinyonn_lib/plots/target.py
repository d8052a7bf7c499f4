"""Figures of what a selection is good for: the routers' warm-up, the target model's loss, benchmarks."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.plots.base import ACCENT, INK, PALETTE, QUIET, describe
from tinyonn_lib.plots.experts import KINDS
from tinyonn_lib.plots.selection import BELOW, beside, dots, labels, places


def target_loss(table: pd.DataFrame, *, thumbnail: bool = True) -> go.Figure:
    """Loss of the target model after training on each selection, minus the untrained one's, with 95 % intervals.

    Args:
        table: of `selection.contest`: `label, delta, low, high` (nats per token), `kind` (key of `KINDS`, or another).
    """
    rows = table.sort_values("delta", ascending=False)
    kinds = list(dict.fromkeys(table["kind"]))
    figure = go.Figure()
    for kind in kinds:
        here = rows[rows["kind"] == kind]
        y = places(here["label"], rows["label"])
        dots(figure, here, "delta", y, KINDS.get(kind, QUIET), kind or "other", len(kinds) > 1)
    figure.add_vline(x=0, line={"color": INK, "dash": "dot", "width": 1})
    labels(figure, rows["label"])
    beside(figure, range(len(rows)), [f"{delta:+.4f}" for delta in rows["delta"]])
    figure.update_xaxes(title="difference in loss, nats per token; less is better")
    figure.update_layout(
        title="Target model after training on each selection, 95 % intervals",
        height=170 + 30 * len(rows), margin={"r": 84, "b": 92}, legend=BELOW,
    )  # fmt: skip
    said = ", ".join(f"{row.label} {row.delta:+.4f}" for row in rows.iloc[::-1].itertuples())
    return describe(figure, f"Difference in loss, nats per token: {said}.", table, thumbnail=thumbnail)


def warmup(history: pd.DataFrame, *, smooth: int = 10) -> go.Figure:
    """Loss of the routers' warm-up, step by step through the epochs.

    Args:
        history: `step` (from 0 or 1 in each epoch), `loss, epoch`.
        smooth: steps that the line is the mean of.
    """
    rows = history.reset_index(drop=True)
    figure = go.Figure()
    faint = {"color": QUIET, "size": 3}
    x = rows.index + 1
    hover = "step %{x}: %{y:.4g}<extra></extra>"
    figure.add_scatter(x=x, y=rows["loss"], mode="markers", marker=faint, name="step", hovertemplate=hover)
    line = rows["loss"].rolling(smooth, min_periods=1).mean()
    figure.add_scatter(
        x=x, y=line, mode="lines", line_color=ACCENT, name=f"mean of {smooth} steps", hovertemplate=hover
    )
    for epoch, last in rows.groupby("epoch").apply(lambda part: part.index[-1] + 1).items():
        figure.add_vline(
            x=last, line={"color": QUIET, "dash": "dot", "width": 1}, annotation_text=f"epoch {epoch}",
            annotation_position="top left", annotation_font_size=11,
        )  # fmt: skip
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(title="loss, nats", rangemode="tozero")
    figure.update_layout(title="Warm-up of the routers", showlegend=True, margin={"b": 84}, legend=BELOW)
    ends = rows.groupby("epoch")["loss"].agg(steps="size", first="first", mean="mean", last="last").reset_index()
    alt = f"Loss of the warm-up over {len(rows)} steps: {line.iloc[0]:.3g} at first, {line.iloc[-1]:.3g} at the end."
    return describe(figure, alt, ends)


def benchmarks(table: pd.DataFrame, *, thumbnail: bool = True) -> go.Figure:
    """Base and tuned model, and their difference with its 95 % interval; one line of panels per metric.

    Args:
        table: of `evaluate.compare.compare`.
    """
    counts = table["metric"].value_counts(sort=False)
    sides = ("base and tuned", "tuned minus base")
    better = table.groupby("metric")["better"].first()
    titles = [
        f"{html.escape(metric)} ({better[metric]} is better): {side}" for metric in counts.index for side in sides
    ]
    height = int(26 * counts.sum() + 100 * len(counts) + 90)
    figure = make_subplots(
        len(counts), 2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04,
        row_heights=[count + 1 for count in counts], vertical_spacing=100 / (height - 150) if len(counts) > 1 else 0,
    )  # fmt: skip
    named: set[str] = set()
    for line, metric in enumerate(counts.index, 1):
        rows = table[table["metric"] == metric].iloc[::-1].assign(label=lambda here: here["task"])
        y = np.arange(len(rows))
        for name, colour, symbol in (("base", INK, "circle-open"), ("tuned", ACCENT, "circle")):
            figure.add_scatter(
                x=rows[name], y=y, mode="markers", marker={"color": colour, "symbol": symbol, "size": 9}, name=name,
                customdata=rows["label"].map(html.escape), legendgroup=name, showlegend=line == 1,
                hovertemplate=f"%{{customdata}}, {name}: %{{x:.4f}}<extra></extra>", row=line, col=1,
            )  # fmt: skip
        for verdict in dict.fromkeys(rows["verdict"]):
            chosen = (rows["verdict"] == verdict).to_numpy()
            colour = {"better": PALETTE[3], "worse": PALETTE[1]}.get(verdict, QUIET)
            dots(figure, rows[chosen], "difference", y[chosen], colour, verdict, verdict not in named, row=line, col=2)
            named.add(verdict)
        figure.add_vline(x=0, line={"color": INK, "dash": "dot", "width": 1}, row=line, col=2)
        labels(figure, rows["label"], row=line)
    figure.update_layout(
        title="Base against tuned on the same questions, 95 % intervals", height=height,
        margin={"t": 86, "b": 76}, legend=BELOW,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    said = "; ".join(
        f"{row.task} {row.metric} {row.base:.4g} to {row.tuned:.4g}, {row.verdict}"
        for row in table.head(6).itertuples()
    )
    more = f"; and {len(table) - 6} more" if len(table) > 6 else ""
    return describe(figure, f"Base against tuned: {said}{more}.", table, thumbnail=thumbnail)
