"""Figures of the experts: what they are made of, how often they are called, what is lost."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tinyonn_lib.plots.base import ACCENT, DIVERGING, PALETTE, QUIET, describe, heat


def expert_means(partition: pd.DataFrame, scores: pd.DataFrame) -> go.Figure:
    """Mean S_p of every expert, one row per layer; `layer, expert, neuron` and `layer, neuron, sp`."""
    joined = partition.merge(scores[["layer", "neuron", "sp"]], on=["layer", "neuron"])
    table = joined.groupby(["layer", "expert"])["sp"].mean().unstack().rename(columns={-1: "shared", -2: "dropped"})
    span = float(np.abs(table.to_numpy()).max()) or 1.0
    experts = partition.loc[partition["expert"] >= 0, "expert"].nunique()
    alt = f"Mean S_p of {experts} experts in each of {table.shape[0]} layers, within ±{span:.2f}."
    return heat(table, title="Mean S_p of each expert", unit="S_p", alt=alt, scale=DIVERGING, span=span, digits=".1f")


def trial(table: pd.DataFrame, text: str, *, thumbnail: bool = True) -> go.Figure:
    """ΔNLL of all partitions by the oracle router, the ridge router and their own, one panel per active share.

    Args:
        table: `experts.trial.Trial.table`.
        text: which kind of text.
    """
    rows = table[table["text"] == text]
    kind = rows["router"].where(rows["router"].isin(["oracle", "ridge"]), "its own")
    shares = sorted(rows["active"].unique())
    middle = rows[(kind == "oracle") & (rows["active"] == shares[len(shares) // 2])]
    order = middle.sort_values("mean", ascending=False)["partition"].tolist()  # the best on top
    titles = [f"{share:.0%} active" for share in shares]
    figure = make_subplots(1, len(shares), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    looks = {"oracle": (QUIET, "circle-open"), "ridge": (ACCENT, "circle"), "its own": (PALETTE[1], "diamond")}
    for column, share in enumerate(shares, 1):
        for name, (colour, symbol) in looks.items():
            here = rows[(rows["active"] == share) & (kind == name)]
            spans = {"array": here["high"] - here["mean"], "arrayminus": here["mean"] - here["low"], "thickness": 1}
            figure.add_scatter(
                x=here["mean"],
                y=here["partition"].map(html.escape),
                error_x=spans,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=f"{name} router",
                legendgroup=name,
                showlegend=column == 1,
                customdata=here["router"],
                hovertemplate="%{y}, %{customdata} router<br>ΔNLL %{x:.3f}<extra></extra>",
                row=1,
                col=column,
            )
        static = rows[(rows["active"] == share) & rows["method"].isin(["flap_static", "flap_static + bias"])]
        pruned = static["mean"].min()
        figure.add_vline(x=pruned, line={"color": PALETTE[1], "dash": "dot", "width": 1}, row=1, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    figure.update_xaxes(title="ΔNLL, nats per token", rangemode="tozero")
    figure.update_layout(
        title=f"What is lost on {html.escape(text)} text, 95 % intervals; dotted: FLAP's static pruning",
        margin={"t": 90},
        height=160 + 32 * len(order),
    )
    figure.update_annotations(font_size=13)
    best = rows.loc[rows.groupby([rows["active"], kind == "oracle"])["mean"].idxmin()]
    alt = f"ΔNLL on {text} text by partition and active share. Least lost: " + ", ".join(
        f"{row.method} at {row.active:.0%} ({row.mean:+.3f})" for row in best.itertuples()
    )
    value = [f"{row.mean:+.4f} [{row.low:+.4f}, {row.high:+.4f}]" for row in rows.itertuples()]
    share = [f"{row.share:.0%} active, k = {row.k:g}" for row in rows.itertuples()]
    wide = rows.assign(value=value, share=share).pivot_table(
        index=["partition", "router", "seeds", "files"], columns="share", values="value", aggfunc="first", sort=False
    )
    return describe(figure, html.escape(alt) + ".", wide.reset_index(), thumbnail=thumbnail)


def projection(table: pd.DataFrame) -> go.Figure:
    """ΔNLL of the small model before and after alignment, one bar per init; `experts.projection.compare`."""
    rows = table[~table["init"].str.startswith("large")]
    moments = ("before", "after")
    titles = [f"{moment} alignment" for moment in moments]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, moment in enumerate(moments, 1):
        here = rows[rows["moment"] == moment].rename(columns={"init": "method", "delta_nll": "mean"})
        colours = [ACCENT if "gradient" in name else QUIET for name in here["method"]]
        _add_interval_bars(figure, here, colours, row=1, col=column)
    figure.update_layout(title="Small model minus large: ΔNLL, 95 % intervals", showlegend=False, margin={"t": 90})
    figure.update_annotations(font_size=13)
    after = rows[rows["moment"] == "after"]
    alt = "ΔNLL of the small model after alignment, by init: " + ", ".join(
        f"{row.init} {row.delta_nll:+.3f}" for row in after.itertuples()
    )
    return describe(figure, alt + ".", table.round(4))


KINDS = {"router": ACCENT, "control": PALETTE[1], "reference": QUIET}
"""What a method of `intervals` may be, and its colour: a trained router, what it must beat, what puts it in place."""


def intervals(table: pd.DataFrame, *, thumbnail: bool = True) -> go.Figure:
    """ΔNLL of several methods, bars with 95 % intervals in the table's order, one panel per active share.

    Args:
        table: `method, kind` (key of `KINDS`), `active, mean, low, high`, and what else its readers want to see.
    """
    table = table if "kind" in table else table.assign(kind="router")
    shares = sorted(table["active"].unique())
    order = list(dict.fromkeys(table["method"].map(html.escape)))[::-1]
    titles = [f"{share:.0%} of the FFN parameters active" for share in shares]
    figure = make_subplots(1, len(shares), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for column, share in enumerate(shares, 1):
        here = table[table["active"] == share]
        _add_interval_bars(figure, here, [KINDS[kind] for kind in here["kind"]], row=1, col=column)
    for kind in dict.fromkeys(table["kind"]):
        square = {"color": KINDS[kind], "symbol": "square", "size": 11}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=square, name=kind, showlegend=True)
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    figure.update_layout(
        title="ΔNLL to the dense model, nats per token, 95 % intervals",
        height=170 + 30 * len(order),
        margin={"t": 84, "b": 76},
        legend={"y": 0, "yref": "container", "yanchor": "bottom"},
    )
    figure.update_annotations(font_size=13)
    alt = "ΔNLL, nats per token: " + "; ".join(
        f"{share:.0%} active: " + ", ".join(f"{r.method} {r.mean:+.3f}" for r in rows.itertuples())
        for share, rows in table.groupby("active")
    )
    return describe(figure, alt + ".", table, thumbnail=thumbnail)


def _add_interval_bars(figure: go.Figure, table: pd.DataFrame, colours: Sequence[str], **place: int) -> None:
    """Horizontal bars in the table's order, top first, their value behind the interval.

    A bar more than twice as long as three quarters of them would squeeze the others: it is cut, with an arrow.
    """
    rows = table.iloc[::-1]
    names = rows["method"].map(lambda v: html.escape(str(v)))
    edge = max(2 * float(rows["mean"].quantile(0.75)), 0.0) or float("inf")
    cut = rows["mean"] > edge
    figure.add_bar(
        x=rows["mean"].clip(upper=edge),
        y=names,
        orientation="h",
        marker_color=list(colours)[::-1],
        error_x={
            "array": (rows["high"] - rows["mean"]).mask(cut),
            "arrayminus": (rows["mean"] - rows["low"]).mask(cut),
            "thickness": 1,
        },
        customdata=rows[["mean", "low", "high"]],
        hovertemplate="%{y}<br>%{customdata[0]:+.4f} [%{customdata[1]:+.4f}, %{customdata[2]:+.4f}]<extra></extra>",
        showlegend=False,
        **place,
    )
    ends = rows["high"].fillna(rows["mean"]).mask(cut, edge)
    text = [f" {'→ ' * far}{mean:+.3f}" for mean, far in zip(rows["mean"], cut, strict=True)]
    figure.add_scatter(
        x=ends,
        y=names,
        mode="text",
        text=text,
        textposition="middle right",
        hoverinfo="skip",
        showlegend=False,
        **place,
    )
    span = [min(0.0, float(rows["low"].fillna(0).min()) * 1.1), float(ends.max()) * 1.3 or 1.0]
    figure.update_xaxes(range=span, **place)
